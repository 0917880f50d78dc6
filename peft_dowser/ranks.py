"""Distributed runs: what one rank fails at fails on all, and every rank has the same mask."""

import hashlib
from collections.abc import Callable, Mapping
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from .codec import decode, encode
from .target import Target

T = TypeVar("T")


def rank() -> int:
    """Number of this rank; 0 outside a distributed run."""
    return dist.get_rank() if _is_distributed() else 0


def gather(part: T) -> list[T]:
    """What every rank has, in the order of the ranks. All ranks must call it."""
    if not _is_distributed():
        return [part]
    parts: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return cast(list[T], parts)


def on_every_rank(work: Callable[[], T]) -> T:
    """Do some work on every rank; an error on one of them is raised on all, so that none waits for it for ever."""
    result: list[T] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        if not _is_distributed():
            raise
        failure = error
    failures = [error for error in gather(failure) if error is not None]
    if failures:
        raise failures[0] if failure is None else failure
    return result[0]


def from_rank(source: int, work: Callable[[], T]) -> T:
    """Do some work on one rank and hand the result to all; an error is raised on all."""
    if not _is_distributed():
        return work()
    result = on_every_rank(lambda: work() if rank() == source else None)
    return cast(T, _sent(result, source))


def by_all_ranks(work: Callable[[], T]) -> T:
    """Do some work in which all ranks must take part, and hand the result of rank 0 to all.

    An error is raised where it happens: the other ranks wait in the middle of the work, and cannot be told.
    """
    result = work()
    return _sent(result, 0) if _is_distributed() else result


def same_on_all_ranks(choose: Callable[[], dict[str, Tensor]], targets: Mapping[str, Target]) -> dict[str, Tensor]:
    """Choose the masks on rank 0 and hand them to the others.

    Raises:
        ValueError: the ranks have different base models. This and every other error is raised on all ranks.
    """
    if not _is_distributed():
        return choose()
    masks = on_every_rank(lambda: choose() if rank() == 0 else {})
    shapes = _sent({name: targets[name].shape for name in masks}, 0)
    on_every_rank(lambda: _check_shapes(shapes, targets))
    codes = {name: _sent(_packed(masks[name], targets[name]) if masks else None, 0) for name in shapes}
    return on_every_rank(lambda: masks or {name: _unpacked(code, targets[name]) for name, code in codes.items()})


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _sent(value: T, source: int) -> T:
    """The value that rank `source` has."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], targets: Mapping[str, Target]) -> None:
    for name, shape in shapes.items():
        found = targets[name].shape if name in targets else None
        if found != shape:
            raise ValueError(
                f"Rank {rank()}: module '{name}' has a weight of shape {found}, on rank 0 it is {shape}. Load the same "
                "base model with the same config on every rank."
            )


def _packed(mask: Tensor, target: Target) -> tuple[Tensor, int]:
    return encode(mask, target.numel).cpu(), mask.numel()


def _unpacked(packed: tuple[Tensor, int] | None, target: Target) -> Tensor:
    code, nnz = cast(tuple[Tensor, int], packed)
    device = target.device
    # A rank that rank 0 will send its weights has them on the meta device until then.
    return decode(code, target.numel, nnz).to("cpu" if device.type == "meta" else device)


def digest_of(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of masks and of the names of their targets, in hexadecimal."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {mask.numel()} ".encode())
        digest.update(mask.cpu().numpy().tobytes())
    return digest.hexdigest()
