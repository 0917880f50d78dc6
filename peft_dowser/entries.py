"""The entries of a weight that a merge writes: computed before the weight changes, so that they can be refused."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .sparse_linear import delta_blocks, entries_plus

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class MergedEntries:
    """What a merge does to the entries of a weight at the positions of a delta.

    Attributes:
        originals: what is there, shape `(nnz,)`.
        sums: W + D, rounded as `add_delta_` rounds it, shape `(nnz,)`, in the dtype of the weight.
    """

    originals: Tensor
    sums: Tensor

    def vanished(self, values: Tensor) -> int:
        """How many of the values, shape `(nnz,)`, are not 0 and change nothing."""
        return int(((self.sums == self.originals) & (values != 0)).count_nonzero())

    def not_finite(self) -> int:
        """How many sums are not finite."""
        if bool(torch.isfinite(self.sums.sum(dtype=torch.promote_types(self.sums.dtype, torch.float32)))):
            return 0  # much the faster test, and false only where a sum of finite numbers overflows
        return int((~torch.isfinite(self.sums)).count_nonzero())

    def check_finite(self, adapter_name: str, module: str) -> None:
        """Refuse sums that are not finite.

        Raises:
            ValueError: there are some; the message names adapter and module.
        """
        if bad := self.not_finite():
            raise ValueError(
                f"Adapter '{adapter_name}': merging would write {bad} values that are not finite in "
                f"{self.sums.dtype} into module '{module}'. The adapter or the base is broken, or the values are too "
                "large for the dtype of the base; nothing was merged into this module."
            )


def merged_entries(weight: Tensor, positions: Tensor, values: Tensor) -> MergedEntries:
    """Compute what a merge would write; the weight is read only.

    Args:
        weight: contiguous weight, any float dtype.
        positions: distinct flat positions, shape `(nnz,)`, int32 or int64.
        values: the delta at these positions, shape `(nnz,)`, any float dtype.
    """
    originals = weight.view(-1).index_select(0, positions)
    return MergedEntries(originals, entries_plus(originals, values))


def write_entries_(weight: Tensor, positions: Tensor, entries: Tensor) -> None:
    """Write entries into a weight in place."""
    bits = _BITS[weight.element_size()]  # `scatter_` of integers takes half as long as `index_copy_`
    flat = weight.view(-1).view(bits)
    for at, entry in zip(delta_blocks(positions), delta_blocks(entries.view(bits)), strict=True):
        flat.scatter_(0, at.long(), entry)


def checksum(entries: Tensor) -> int:
    """The sum of the bits of all entries as integers: another one where any single entry was changed."""
    return int(entries.contiguous().view(_BITS[entries.element_size()]).sum(dtype=torch.int64))
