"""The sparse product with experts: every row times the matrix W + D of its own expert.

As in `sparse_linear`, W + D is formed as a merge writes it, used and dropped; of a fused parameter only the matrices of
the experts that have rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused import Product
from .sparse_linear import add_delta_, dense_temporary, product_at, sum_of


def sparse_experts(product: Product, weight: Tensor, values: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """Compute a product with W + D in the place of the fused parameter W, without keeping W + D.

    For the rows x and the output gradient g of each expert, with the positions in its own matrix:
    Forward:  y = x (W + D)^T, by the very product that the module asks for
    Backward: dx = g (W + D),  dD = (g^T x)[positions]

    Args:
        product: what the experts module asks for.
        weight: frozen matrices, contiguous, shape `(experts, out, in)`, or `(experts, in, out)` if
            `product.transposed`; where `product.expert` is set, those of this expert alone, shape `(1, ., .)`.
        values: one delta per active adapter, shape `(nnz_a,)` each.
        positions: their flat positions in `weight`, strictly increasing.

    Returns:
        The product, of `product.shape`: the bits that the merged module gives.
    """
    return _SparseExperts.apply(product.x, weight, product, len(values), *values, *positions)  # type: ignore[return-value]


def expert_bounds(positions: Tensor, shape: Sequence[int]) -> list[int]:
    """Where the positions of each expert begin in a sorted list, and at last where those of the last one end.

    Args:
        positions: flat positions in a fused parameter, strictly increasing.
        shape: shape of the parameter, `(experts, ., .)`.
    """
    starts = torch.arange(shape[0] + 1, device=positions.device, dtype=positions.dtype) * (shape[1] * shape[2])
    return torch.searchsorted(positions, starts).tolist()


class _SparseExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, product: Product, adapters: int, *deltas: Tensor) -> Tensor:
        ctx.rows = [(0, slice(None))] if product.expert is not None else list(product.rows_by_expert())
        ctx.transposed, ctx.adapters = product.transposed, adapters
        ctx.save_for_backward(x, weight, *deltas)
        values, positions = deltas[:adapters], deltas[adapters:]
        total = dense_temporary(weight.shape, weight)
        for expert, _ in ctx.rows:
            total[expert].copy_(weight[expert])
        for delta, at in zip(values, positions, strict=True):
            bounds = expert_bounds(at, weight.shape)
            for expert, _ in ctx.rows:
                part = slice(bounds[expert], bounds[expert + 1])
                add_delta_(total, at[part], delta[part])
        return product.compute(x, total[0] if product.expert is not None else total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *deltas = ctx.saved_tensors
        values, positions = deltas[: ctx.adapters], deltas[ctx.adapters :]
        grad = grad.reshape(len(x), -1)
        bounds = [expert_bounds(at, weight.shape) for at in positions]
        grad_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        grad_values = [torch.zeros_like(delta) for delta in values]
        for expert, rows in ctx.rows:
            parts = [slice(begin[expert], begin[expert + 1]) for begin in bounds]
            own = [at[part] - expert * weight[0].numel() for at, part in zip(positions, parts, strict=True)]
            own_grad = grad[rows]
            if grad_x is not None:
                matrix = sum_of(weight[expert], [delta[part] for delta, part in zip(values, parts, strict=True)], own)
                matrix = matrix.to(grad.dtype)
                grad_x[rows] = (own_grad @ (matrix.T if ctx.transposed else matrix)).to(x.dtype)
            own_x = x[rows].to(grad.dtype)
            left, right = (own_x, own_grad) if ctx.transposed else (own_grad, own_x)
            for found, at, part in zip(grad_values, own, parts, strict=True):
                found[part] = product_at(left, right, at)
        return grad_x, None, None, None, *grad_values, *[None] * ctx.adapters
