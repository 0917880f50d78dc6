"""Rows of W + D: what an embedding looks up, of which a batch needs few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .sparse_linear import entries_plus


def summed_rows(weight: Tensor, rows: Tensor, values: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """Rows of W + D_1 + D_2 + ..., differentiable with respect to the values.

    Each delta is added in turn and rounded once to the dtype of the weight: the rule of `sparse_linear.add_delta_`.

    Args:
        weight: frozen weight, shape `(height, width)`, any float dtype; read only.
        rows: numbers of the rows, strictly increasing, shape `(count,)`, int64.
        values: one delta per adapter, shape `(nnz_a,)` each, any float dtype.
        positions: their flat positions in `weight`, strictly increasing, int32 or int64.

    Returns:
        The rows, shape `(count, width)`, dtype of `weight`.
    """
    total = weight.detach().index_select(0, rows)
    for delta, at in zip(values, positions, strict=True):
        chosen, places = _entries_in(at, rows, weight.shape[1])
        flat = total.view(-1)
        sums = _Sum.apply(flat.index_select(0, places), delta.index_select(0, chosen))
        total = flat.index_copy(0, places, sums).view(total.shape)
    return total


class _Sum(torch.autograd.Function):
    """`entries_plus`, differentiable with respect to both."""

    @staticmethod
    def forward(ctx, entries, values):
        ctx.dtype = values.dtype
        return entries_plus(entries, values)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.to(ctx.dtype)


def _entries_in(positions: Tensor, rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which positions are in the given rows, and where they are in the memory of these rows alone."""
    firsts = rows.to(positions.dtype) * width
    begins = torch.searchsorted(positions, firsts)
    counts = torch.searchsorted(positions, firsts + width) - begins
    numbers = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
    # The n-th entry of a row is the n-th position after the row's first one.
    skipped = begins - (counts.cumsum(0) - counts)
    chosen = torch.arange(len(numbers), device=rows.device) + skipped[numbers]
    return chosen, positions[chosen].long() + (numbers - rows[numbers]) * width
