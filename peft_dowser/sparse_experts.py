"""The sparse product with experts: every row times the matrix W + D of its own expert.

As in `sparse_linear`, W + D is formed as a merge writes it, used and dropped; of a fused parameter only the matrices of
the experts that have rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .fused import Product
from .sparse_linear import add_delta_, dense_temporary, product_at, sum_of


def sparse_experts(product: Product, weight: Tensor, values: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """Compute a product with W + D in the place of the fused parameter W, without keeping W + D.

    For the rows x and the output gradient g of each expert, with the positions in its own matrix:
    Forward:  y = x (W + D)^T, by the very product that the module asks for
    Backward: dx = g (W + D),  dD = (g^T x)[positions]

    Args:
        product: what the experts module asks for; where its `x` has another dtype than `weight`, W + D is cast to it.
        weight: frozen matrices, contiguous, shape `(experts, out, in)`, or `(experts, in, out)` if
            `product.transposed`; where `product.expert` is set, those of this expert alone, shape `(1, ., .)`.
        values: one delta per active adapter, shape `(nnz_a,)` each.
        positions: their flat positions in `weight`, strictly increasing.

    Returns:
        The product, of `product.shape`: the bits that the merged module gives.
    """
    form = (product.experts, product.ends, product.function, product.transposed)
    return _sparse_experts(product.x, weight, list(values), list(positions), *form)


def expert_bounds(positions: Tensor, shape: Sequence[int]) -> list[int]:
    """Where the positions of each expert begin in a sorted list, and at last where those of the last one end.

    Args:
        positions: flat positions in a fused parameter, strictly increasing.
        shape: shape of the parameter, `(experts, ., .)`.
    """
    if shape[0] == 1:
        return [0, positions.numel()]
    starts = torch.arange(shape[0] + 1, device=positions.device, dtype=positions.dtype) * (shape[1] * shape[2])
    return torch.searchsorted(positions, starts).tolist()


def _product(
    x: Tensor, weight: Tensor, experts: Tensor | None, ends: Tensor | None, function: str, transposed: bool
) -> Product:
    """The product again, from what an op can take: one expert is the first, and only one."""
    expert = 0 if function == "linear" else None
    return Product(x, function, transposed, weight.shape[2 if transposed else 1], expert, experts, ends)


@torch.library.custom_op("dowser::experts", mutates_args=())
def _sparse_experts(
    x: Tensor,
    weight: Tensor,
    values: list[Tensor],
    positions: list[Tensor],
    experts: Tensor | None,
    ends: Tensor | None,
    function: str,
    transposed: bool,
) -> Tensor:
    product = _product(x, weight, experts, ends, function, transposed)
    hit = [expert for expert, _ in product.rows_by_expert()]
    total = dense_temporary(weight.shape, weight)
    for expert in hit:
        total[expert].copy_(weight[expert])
    for delta, at in zip(values, positions, strict=True):
        bounds = expert_bounds(at, weight.shape)
        for expert in hit:
            part = slice(bounds[expert], bounds[expert + 1])
            add_delta_(total, at[part], delta[part])
    total = total.to(x.dtype)
    return product.compute(total if product.expert is None else total[0])


@_sparse_experts.register_fake
def _(x, weight, values, positions, experts, ends, function, transposed):
    return x.new_empty(_product(x, weight, experts, ends, function, transposed).shape)


@torch.library.custom_op("dowser::experts_input_grad", mutates_args=())
def _input_grad(
    grad: Tensor,
    weight: Tensor,
    values: list[Tensor],
    positions: list[Tensor],
    experts: Tensor | None,
    ends: Tensor | None,
    function: str,
    transposed: bool,
) -> Tensor:
    found = grad.new_zeros(len(grad), weight.shape[1 if transposed else 2])
    bounds = [expert_bounds(at, weight.shape) for at in positions]
    for expert, rows in _product(grad, weight, experts, ends, function, transposed).rows_by_expert():
        parts = [slice(begin[expert], begin[expert + 1]) for begin in bounds]
        own = [at[part] - expert * weight[0].numel() for at, part in zip(positions, parts, strict=True)]
        matrix = sum_of(weight[expert], [delta[part] for delta, part in zip(values, parts, strict=True)], own)
        matrix = matrix.to(grad.dtype)
        found[rows] = grad[rows] @ (matrix.T if transposed else matrix)
    return found


@_input_grad.register_fake
def _(grad, weight, values, positions, experts, ends, function, transposed):
    return grad.new_empty(len(grad), weight.shape[1 if transposed else 2])


@torch.library.custom_op("dowser::experts_values_grad", mutates_args=())
def _values_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    values: list[Tensor],
    positions: list[Tensor],
    experts: Tensor | None,
    ends: Tensor | None,
    function: str,
    transposed: bool,
) -> list[Tensor]:
    found = [torch.zeros_like(delta) for delta in values]
    bounds = [expert_bounds(at, weight.shape) for at in positions]
    for expert, rows in _product(x, weight, experts, ends, function, transposed).rows_by_expert():
        left, right = (x[rows], grad[rows]) if transposed else (grad[rows], x[rows])
        for total, at, begin in zip(found, positions, bounds, strict=True):
            part = slice(begin[expert], begin[expert + 1])
            total[part] = product_at(left, right, at[part] - expert * weight[0].numel())
    return found


@_values_grad.register_fake
def _(grad, x, weight, values, positions, experts, ends, function, transposed):
    return [torch.empty_like(delta) for delta in values]


def _setup_context(ctx, inputs, output):
    x, weight, values, positions, experts, ends, *ctx.form = inputs
    ctx.save_for_backward(x, weight, experts, ends, *values, *positions)
    ctx.adapters = len(values)


def _backward(ctx, grad):
    x, weight, experts, ends, *rest = ctx.saved_tensors
    deltas = rest[: ctx.adapters], rest[ctx.adapters :]
    wants_x, _, wants_values, *_ = ctx.needs_input_grad
    grad = grad.reshape(len(x), -1)
    grad_x = None
    if wants_x:
        grad_x = _input_grad(grad, weight, *deltas, experts, ends, *ctx.form)
    grad_values: list[Tensor | None] = [None] * ctx.adapters
    if any(wants_values):
        grad_values = _values_grad(grad, x, weight, *deltas, experts, ends, *ctx.form)
    return grad_x, None, grad_values, [None] * ctx.adapters, None, None, None, None


_sparse_experts.register_autograd(_backward, setup_context=_setup_context)
