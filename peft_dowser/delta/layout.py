"""What the numbers of an adapter mean in a weight: single entries of it, or whole input channels."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .apply import Delta, MergedEntries, merged_entries
from .codec import DeltaFormatError, position_dtype

# What is chosen to train: the paper's single weights, or all weights of an input channel.
Granularity: TypeAlias = Literal["weight", "input_channel"]


class StoredDelta(NamedTuple):
    """A delta as a layer and a file hold it.

    Attributes:
        positions: flat positions of single weights, or numbers of input channels; strictly increasing, int32 (int64
            where a `Layout` has more than 2**31 - 1 of them).
        values: what is added, shape `(nnz,)`, or `(out, k)` for k input channels.
    """

    positions: Tensor
    values: Tensor


@dataclass(frozen=True)
class Layout:
    """What positions and values mean in one weight.

    Attributes:
        shape: shape of the weight as it is stored.
        channel_dim: dimension of the weight along which its input channels are numbered; None where the positions are
            flat positions of single weights.
    """

    shape: tuple[int, ...]
    channel_dim: int | None = None

    @property
    def size(self) -> int:
        """How many positions there are to choose from."""
        return math.prod(self.shape) if self.channel_dim is None else self.shape[self.channel_dim]

    @property
    def group(self) -> int:
        """How many weights train at each position."""
        return math.prod(self.shape) // self.size

    def count(self, nnz: int) -> int:
        """How many positions `nnz` trained weights have.

        Raises:
            DeltaFormatError: these would not be whole input channels, or more than the weight has.
        """
        if nnz % self.group:
            raise DeltaFormatError(
                f"there are {nnz} values, which are not whole input channels of {self.group} weights each"
            )
        if nnz > self.size * self.group:
            raise DeltaFormatError(f"there are {nnz} values, but the weight has only {self.size * self.group} entries")
        return nnz // self.group

    def values_shape(self, count: int) -> tuple[int, ...]:
        """The shape of the values at `count` positions."""
        return (count,) if self.channel_dim is None else (self.group, count)

    def flat(self, positions: Tensor) -> Tensor:
        """The flat positions of all weights that train, strictly increasing, from the positions."""
        if self.channel_dim is None:
            return positions
        positions = positions.to(position_dtype(math.prod(self.shape)))
        others = torch.arange(self.group, dtype=positions.dtype, device=positions.device)
        if self.channel_dim == 0:
            return (positions[:, None] * self.group + others).view(-1)
        return (others[:, None] * self.size + positions).view(-1)

    def delta(self, stored: StoredDelta) -> Delta:
        """The delta of single weights."""
        return Delta(self.flat(stored.positions), self._as_in_weight(stored.values).reshape(-1))

    def merged(self, weight: Tensor, stored: StoredDelta) -> MergedEntries:
        """What a merge would write into a weight, see `merged_entries`."""
        return merged_entries(weight, Delta(stored.positions, self._as_in_weight(stored.values)), self.channel_dim)

    def stored(self, delta: Delta) -> StoredDelta:
        """A delta of single weights as it is stored: with zeros where an input channel has weights outside it."""
        if self.channel_dim is None:
            return StoredDelta(delta.positions, delta.values)
        width = self.shape[1]
        row, column = delta.positions // width, delta.positions % width
        channel, other = (row, column) if self.channel_dim == 0 else (column, row)
        channels, place = channel.unique(return_inverse=True)
        values = delta.values.new_zeros(self.values_shape(len(channels)))
        values[other.long(), place] = delta.values
        return StoredDelta(channels.to(position_dtype(self.size)), values)

    def _as_in_weight(self, values: Tensor) -> Tensor:
        """Values `(out, k)` with their dimensions in the order of the weight."""
        return values.T if self.channel_dim == 0 else values
