"""Weight patches: what an adapter writes into a base, for a server that has loaded the base. See PATCH.md."""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils.logging import tqdm

from ..delta.apply import report_vanished
from ..delta.format import quoted
from ..delta.safe_files import open_tensors, write_tensors
from .merging import open_merged

# What the metadata of a patch says it is, and how its tensors are called after the weight that they belong to.
_KIND = "weight patch 1"
_INDICES, _VALUES = ".indices", ".values"

# int32 where it reaches, as vLLM takes both.
_INT32_LIMIT = 2**31


class WeightPatch(NamedTuple):
    """New values for some entries of one tensor of a checkpoint: the fields of vLLM's `CheckpointWeightPatch`.

    Attributes:
        name: name of the tensor in the checkpoint.
        shape: its shape there.
        dtype: its dtype there.
        values: the new entries, shape `(k,)`, in that dtype; they replace the old ones and are not added to them.
        indices: where they go in the flattened tensor, shape `(k,)`, int32 or int64, strictly increasing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Tensor
    indices: Tensor


def write_patch(
    adapter: str | Path, output: str | Path, base: str | Path | None = None, revert: str | Path | None = None
) -> dict[str, int]:
    """Write what a merge changes in a base checkpoint: the entries of W + D whose bits differ from W.

    A program that has loaded the base makes it the merged model by writing these entries, bit for bit, and the base
    again by writing the revert patch. Both count positions in the tensors of the checkpoint, whose names they use, as
    vLLM's `CheckpointWeightPatch` does.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        output: file for the patch (safetensors); `read_patch` reads it.
        base: folder or Hub id of the base model, a safetensors checkpoint; None takes the one that the adapter names.
        revert: file for the patch that takes this one back: the entries of W at the same positions.

    Returns:
        Number of entries by tensor of the checkpoint, without the tensors in which nothing changes.

    Raises:
        ValueError: the adapter is damaged or does not fit the base, the base is damaged, a sum is not finite, or both
            files are one.
        OSError: a checkpoint cannot be found, or a file cannot be written.

    Note: one tensor of the base is in memory at a time, and the patch: 4 bytes per changed entry, and its values.
    """
    outputs = [Path(path).absolute() for path in (output, revert) if path is not None]
    if len(set(outputs)) != len(outputs):
        raise ValueError(f"The patch and its revert cannot be one file, '{output}'.")
    sums, originals = [], []
    with ExitStack() as files:
        merged = open_merged(adapter, base, files)
        for key in tqdm(merged.changed_tensors(), desc="Patching", unit="tensor"):
            before, after = merged.base.tensor(key), merged.read(key)
            indices = _changed(before, after)
            if len(indices):
                sums.append(_patch(key, after, indices))
                originals.append(_patch(key, before, indices))
    report_vanished([merged.vanished])
    for path, patches in zip(outputs, (sums, originals), strict=False):
        _write(patches, path)
    return {patch.name: len(patch.indices) for patch in sums}


def read_patch(path: str | Path) -> list[WeightPatch]:
    """Read a patch that `write_patch` has written.

    Raises:
        ValueError: the file is damaged, or not a weight patch.
        OSError: it cannot be found.
    """
    with ExitStack() as files:
        file = open_tensors(Path(path), files)
        shapes = _shapes(file.metadata() or {}, path)
        if set(file.keys()) != {name + part for name in shapes for part in (_INDICES, _VALUES)}:
            raise ValueError(f"'{path}' does not have indices and values of exactly the tensors that it names.")
        patches = [_read(file, name, tuple(shape)) for name, shape in shapes.items()]
    for patch in patches:
        _check(patch, path)
    return patches


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Where the bits of two tensors of one dtype differ, in the flattened tensor."""
    bits = [tensor.contiguous().view(-1, 1).view(torch.uint8) for tensor in (before, after)]
    indices = (bits[0] != bits[1]).any(-1).nonzero().view(-1)
    return indices.int() if before.numel() < _INT32_LIMIT else indices


def _patch(name: str, tensor: Tensor, indices: Tensor) -> WeightPatch:
    values = tensor.contiguous().view(-1).index_select(0, indices)
    return WeightPatch(name, tuple(tensor.shape), tensor.dtype, values, indices)


def _write(patches: list[WeightPatch], path: Path) -> None:
    """Write the file whole, or not at all."""
    tensors = {patch.name + _INDICES: patch.indices for patch in patches}
    tensors |= {patch.name + _VALUES: patch.values for patch in patches}
    shapes = json.dumps({patch.name: patch.shape for patch in patches})
    with TemporaryDirectory(prefix=".patch-", dir=path.parent) as work:
        write_tensors(tensors, Path(work) / "patch", {"kind": _KIND, "shapes": shapes})
        (Path(work) / "patch").replace(path)


def _shapes(metadata: Mapping[str, str], path: str | Path) -> dict[str, list[int]]:
    """The shapes of the patched tensors, as the header of a file tells them."""
    try:
        shapes = json.loads(metadata["shapes"]) if metadata["kind"] == _KIND else None
    except (KeyError, ValueError):
        shapes = None
    if not isinstance(shapes, dict) or not all(_is_shape(shape) for shape in shapes.values()):
        raise ValueError(f"'{path}' is not a weight patch that this release reads; `peft-dowser patch` writes them.")
    return shapes


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _read(file: Any, name: str, shape: tuple[int, ...]) -> WeightPatch:
    # A copy: the memory of a file changes with it.
    values, indices = (file.get_tensor(name + part).clone() for part in (_VALUES, _INDICES))
    return WeightPatch(name, shape, values.dtype, values, indices)


def _check(patch: WeightPatch, path: str | Path) -> None:
    values, indices, problem = patch.values, patch.indices, None
    if not values.is_floating_point() or indices.dtype not in (torch.int32, torch.int64):
        problem = f"values must be floating-point and indices int32 or int64, got {values.dtype} and {indices.dtype}"
    elif values.dim() != 1 or values.shape != indices.shape or not len(indices):
        problem = (
            f"values and indices must be lists of one length, got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    elif int(indices[0]) < 0 or int(indices[-1]) >= math.prod(patch.shape) or not bool((indices.diff() > 0).all()):
        problem = f"indices must be strictly increasing positions in a tensor of shape {patch.shape}"
    elif bool(values.isnan().any()):
        problem = "values must not be NaN"
    if problem is not None:
        raise ValueError(f"'{path}', tensor {quoted(patch.name)}: {problem}. The file is damaged or was edited.")
