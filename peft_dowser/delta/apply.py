"""The one rule by which a sparse delta is added to a weight, how its sums are written, and how a weight is put back."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Entries of a delta added or written at a time: bounds the temporaries, which so stay in the cache of a CPU. On a GPU
# each block costs the launch of its kernels.
_DELTA_BLOCK = 1 << 18

_DELTA_BLOCK_ON_GPU = 1 << 22

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# A merge reports vanished values from this fraction on.
_NOTEWORTHY = 0.01


class Delta(NamedTuple):
    """A sparse delta of one matrix.

    Attributes:
        positions: flat positions, strictly increasing, shape `(nnz,)`, int32 (int64 above 2**31 - 1 entries).
        values: what is added to the base at these positions, shape `(nnz,)`, float32.

    Note: an unscaled value is the float32 nearest to W - W*. In a float16, bfloat16 or float32 base, W* plus this value
    is W bit for bit wherever W lies between W* / 2 and 2 W*; elsewhere it may be off by 2**-24 |D| and a rounding, for
    which no float32 is fine enough.
    """

    positions: Tensor
    values: Tensor


def add_delta_(weight: Tensor, positions: Tensor, values: Tensor) -> None:
    """Add a sparse delta to a weight in place: w <- round(float32(w) + delta), rounded once to the dtype of `weight`.

    This is the one rule by which forward, backward and merge form W + D. The weight is contiguous and of any float
    dtype; `values` of any float dtype belong to distinct flat `positions`, int32 or int64, both of shape `(nnz,)`.
    """
    flat = weight.view(-1)
    if weight.is_cpu and weight.element_size() >= max(4, values.element_size()):
        # The same addition in one pass (6 ms instead of 12, 2048 x 5632 at 0.1); on a GPU it would be an atomic one.
        flat.index_add_(0, positions, values.to(weight.dtype))
        return
    for at, delta in zip(delta_blocks(positions), delta_blocks(values), strict=True):
        at = at.long()
        entries = flat.index_select(0, at)
        _put_(flat, at, entries_plus(entries, delta, out=entries))


def entries_plus(entries: Tensor, values: Tensor, out: Tensor | None = None) -> Tensor:
    """What `add_delta_` makes of the entries of a weight, both of shape `(nnz,)`; in `out`, perhaps the entries.

    Note: computed in the wider dtype of both, at least float32, and rounded once to the dtype of `entries`, in one
        kernel. It is an addition everywhere; the atomic one of `index_add_` takes subnormal numbers for 0 on a GPU.
    """
    return torch.add(entries, values, out=torch.empty_like(entries) if out is None else out)


def delta_blocks(entries: Tensor) -> Sequence[Tensor]:
    """Entries of a delta, or their positions, as many as are worked on at a time."""
    block = _DELTA_BLOCK if entries.is_cpu else _DELTA_BLOCK_ON_GPU
    return (entries,) if entries.numel() <= block else entries.split(block)


@dataclass(frozen=True)
class Overwritten:
    """What a write of W + D has replaced in a weight, and how it is put back.

    Attributes:
        positions: where it has written, flat; or whole columns, their numbers along `dim`.
        originals: what was there.
        checksum: `checksum` of what it wrote; None where nobody asks later.
        dim: dimension of the weight in which the positions are counted; None where they are flat.
    """

    positions: Tensor
    originals: Tensor
    checksum: tuple[torch.dtype, int] | None = None
    dim: int | None = None

    def was_changed(self, weight: Tensor) -> bool:
        """Whether the weight holds other entries than were written; not where it was cast meanwhile."""
        if self.checksum is None or weight.dtype != self.checksum[0]:
            return False
        return checksum(_read_entries(weight, self.positions, self.dim)) != self.checksum

    def undo(self, weight: Tensor) -> None:
        """Put the originals back into the weight."""
        _write_entries_(weight, self.positions, self.originals.to(weight.dtype), self.dim)


@dataclass(frozen=True)
class MergedEntries:
    """What a merge does to the entries of a weight at the positions of a delta, in the shape of its values.

    Attributes:
        delta: the delta.
        dim: as in `merged_entries`.
        originals: what is there.
        sums: W + D, rounded as `add_delta_` rounds it, in the dtype of the weight.
    """

    delta: Delta
    originals: Tensor
    sums: Tensor
    dim: int | None = None

    def vanished(self) -> int:
        """How many values are not 0 and change nothing."""
        changed = (self.sums - self.originals).count_nonzero()  # a difference of two floats is 0 only if they are equal
        return int(self.delta.values.count_nonzero() - changed)

    def not_finite(self) -> int:
        """How many sums are not finite."""
        if bool(torch.isfinite(self.sums.sum(dtype=torch.promote_types(self.sums.dtype, torch.float32)))):
            return 0  # much the faster test, and false only where a sum of finite numbers overflows
        return int((~torch.isfinite(self.sums)).count_nonzero())

    def check_finite(self, adapter_name: str, module: str) -> None:
        """Refuse sums that are not finite, with a ValueError that names adapter and module."""
        if bad := self.not_finite():
            raise ValueError(
                f"Adapter '{adapter_name}': merging would write {bad} values that are not finite in "
                f"{self.sums.dtype} into module '{module}'. The adapter or the base is broken, or the values are too "
                "large for the dtype of the base; nothing was merged into this module."
            )

    def write(self, weight: Tensor) -> None:
        """Write the sums into the weight."""
        _write_entries_(weight, self.delta.positions, self.sums, self.dim)

    def overwritten(self, with_checksum: bool = True) -> Overwritten:
        """What to keep before `write` is called."""
        known = checksum(self.sums) if with_checksum else None
        return Overwritten(self.delta.positions, self.originals, known, self.dim)


def merged_entries(weight: Tensor, delta: Delta, dim: int | None = None) -> MergedEntries:
    """Compute what a merge would write into a contiguous weight of any float dtype, which is read only.

    With `dim` the delta is one of whole columns: its positions are numbers along this dimension of a matrix, and its
    values have the shape of those columns.
    """
    originals = _read_entries(weight, delta.positions, dim)
    return MergedEntries(delta, originals, entries_plus(originals, delta.values), dim)


def checksum(entries: Tensor) -> tuple[torch.dtype, int]:
    """The dtype of the entries and the sum of their bits as integers, which changes with any single entry."""
    bits = entries.contiguous().view(_BITS[entries.element_size()])
    return entries.dtype, int(bits.sum(dtype=torch.int64))


def _read_entries(weight: Tensor, positions: Tensor, dim: int | None) -> Tensor:
    return weight.view(-1).index_select(0, positions) if dim is None else weight.index_select(dim, positions)


def _write_entries_(weight: Tensor, positions: Tensor, entries: Tensor, dim: int | None) -> None:
    if dim is not None:
        bits = _BITS[weight.element_size()]
        weight.view(bits).index_copy_(dim, positions.long(), entries.view(bits))
        return
    flat = weight.view(-1)
    for at, entry in zip(delta_blocks(positions), delta_blocks(entries), strict=True):
        _put_(flat, at.long(), entry)


def _put_(flat: Tensor, positions: Tensor, entries: Tensor) -> None:
    """Write entries at int64 positions."""
    if flat.is_cpu:  # `scatter_` of integers takes half as long as that of floats, a hundredth of that of 16 bits
        bits = _BITS[flat.element_size()]
        flat, entries = flat.view(bits), entries.view(bits)
    flat.scatter_(0, positions, entries)


def report_vanished(vanished: list[dict[str, tuple[int, int]]]) -> None:
    """Say once how many trained values a merge has rounded away; a few of many always are."""
    lost = sum(counts[0] for layer in vanished for counts in layer.values())
    total = sum(counts[1] for layer in vanished for counts in layer.values())
    if lost and lost >= _NOTEWORTHY * total:
        logger.warning(
            "%d of %d merged values (%.1f %%) are too small to change a weight in the dtype of the base.",
            lost,
            total,
            100 * lost / total,
        )
