"""Several ranks: bases whose weights are sharded over them, and work that one rank does for all.

The hooks of a sharded base gather the weights of a module for its forward and for its backward. All ranks must take
part in that, and in the same order: wherever weights of such a base are used, every rank does the same.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Whether this rank holds only a part: a DTensor of FSDP2, or a parameter that DeepSpeed ZeRO-3 has partitioned."""
    return isinstance(tensor, DTensor) or tensor.numel() != getattr(tensor, "ds_numel", tensor.numel())


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a model is sharded, even while some or all of its weights are gathered."""
    sharding = FSDPModule | FullyShardedDataParallel
    return (
        is_zero3(model)
        or any(isinstance(module, sharding) for module in model.modules())
        or any(is_sharded_tensor(parameter) for parameter in model.parameters())
    )


def is_zero3(model: nn.Module) -> bool:
    """Whether it is sharded by DeepSpeed ZeRO-3, even while some or all of its weights are gathered."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, which may be sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole parameter. Of a sharded one it is a temporary, for which all ranks must ask together."""
    if isinstance(parameter, DTensor):
        # FSDP2 may keep its parts on the CPU, which the connection between the ranks may not reach.
        part = cast(DTensor, parameter.detach().to(parameter.device_mesh.device_type))
        return part.full_tensor()
    if not is_sharded_tensor(parameter):
        return parameter
    import deepspeed  # pyright: ignore[reportMissingImports]

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach()  # DeepSpeed gives the parameter other storage afterwards, and leaves this one alone


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered: what is set on these, such as `requires_grad`, does not last."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_not_sharded(model: nn.Module) -> None:
    if is_sharded_model(model):
        raise ValueError(
            f"{_sharded(model)}. Add or load the adapter before the model is sharded: before fully_shard, "
            "accelerator.prepare or deepspeed.initialize, and outside deepspeed.zero.Init. Where the base can only be "
            "probed sharded, run probe(model, config) on all its ranks, .save(path) what it returns on one of them, "
            "and make the adapter with DowserConfig(statistics=path)."
        )


def check_gathered_by_module(model: nn.Module) -> None:
    """Refuse, with a ValueError, a model that is sharded by something other than FSDP2 or an engine of DeepSpeed.

    Its own hooks do not gather the weights module by module.
    """
    if not is_gathered_by_module(model):
        raise ValueError(
            f"{_sharded(model)}, by FSDP1, tensor parallelism or deepspeed.zero.Init, which the probe cannot follow. "
            "Shard the base with FSDP2 (fully_shard), or with ZeRO-3 by deepspeed.initialize."
        )


def is_gathered_by_module(model: nn.Module) -> bool:
    """Whether every weight that is spread over ranks is gathered by the hooks of FSDP2 or an engine of DeepSpeed."""
    modules = list(model.modules())
    units = [module for module in modules if isinstance(module, FSDPModule)]
    by_fsdp2 = {id(parameter) for unit in units for parameter in unit.parameters()}
    by_others = (isinstance(p, DTensor) and not (id(p) in by_fsdp2 and _is_plain(p)) for p in model.parameters())
    no_engine = is_zero3(model) and not any(hasattr(module, "ds_id") for module in modules)
    return not (no_engine or any(isinstance(module, FullyShardedDataParallel) for module in modules) or any(by_others))


def _is_plain(parameter: DTensor) -> bool:
    """Whether it is sharded once: over all ranks, or over a group of them, of which other groups are copies (HSDP)."""
    return all(placement.is_replicate() for placement in parameter.placements[:-1])


def _sharded(model: nn.Module) -> str:
    names = [name for name, parameter in model.named_parameters() if is_sharded_tensor(parameter)]
    first = f", '{names[0]}' the first of {len(names)}" if names else ""
    return f"Parameters of {type(model).__name__} are sharded over the ranks{first}"


def rank() -> int:
    """Number of this rank; 0 outside a distributed run."""
    return dist.get_rank() if is_distributed() else 0


def all_gather(part: T) -> list[T]:
    """What every rank has, in the order of the ranks. All ranks must call it."""
    if not is_distributed():
        return [part]
    parts: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return cast(list[T], parts)


def on_every_rank(work: Callable[[], T]) -> T:
    """Do some work on every rank; an error on one of them is raised on all, so that none waits for it forever."""
    result: list[T] = []
    failure: Exception | None = None
    try:
        result.append(work())
    except Exception as error:
        if not is_distributed():
            raise
        failure = error
    failures = [error for error in all_gather(failure) if error is not None]
    if failures:
        raise failures[0] if failure is None else failure
    return result[0]


def on_one_rank(source: int, work: Callable[[], T]) -> T:
    """Do some work on one rank and hand the result to all; an error is raised on all."""
    return cast(T, broadcast(on_every_rank(lambda: work() if rank() == source else None), source))


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast(value: T, source: int = 0) -> T:
    """The value that rank `source` has. All ranks must call it."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]
