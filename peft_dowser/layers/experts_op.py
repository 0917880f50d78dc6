"""The sparse product with experts: every row times the matrix W + D of its own expert.

As in `sparse_linear`, W + D is formed as a merge writes it, used and dropped, and only for the experts that have rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.fused import Product
from ..delta.apply import add_delta_
from .linear_op import dense_temporary, product_at, refuse_tangents, sum_of


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
    refuse_tangents(product.x, weight, *values)
    form = (product.experts, product.ends, product.function, product.transposed)
    return _sparse_experts(product.x, weight, list(values), list(positions), *form)


def expert_bounds(positions: Tensor, shape: Sequence[int]) -> list[int]:
    """Where the positions of each expert begin in a sorted list, and where the positions of the last expert end.

    Args:
        positions: flat positions in a fused parameter, strictly increasing.
        shape: shape of the parameter, `(experts, ., .)`.
    """
    if shape[0] == 1:
        return [0, positions.numel()]
    starts = torch.arange(shape[0] + 1, device=positions.device, dtype=positions.dtype) * (shape[1] * shape[2])
    return torch.searchsorted(positions, starts).tolist()


def _slices(positions: Sequence[Tensor], weight: Tensor) -> list[list[slice]]:
    """By expert and adapter: which of the adapter's positions are in the expert's matrix."""
    bounds = [expert_bounds(at, weight.shape) for at in positions]
    return [[slice(each[expert], each[expert + 1]) for each in bounds] for expert in range(len(weight))]


def _product(
    x: Tensor, weight: Tensor, experts: Tensor | None, ends: Tensor | None, function: str, transposed: bool
) -> Product:
    """The product again, from what an op can take: one expert is the first, and only one."""
    expert = 0 if function == "linear" else None
    return Product(x, function, transposed, weight.shape[2 if transposed else 1], expert, experts, ends)


# The host waits for the numbers of rows of each expert, which a CUDA graph does not allow.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dowser::experts", mutates_args=(), tags=_TAGS)
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
    total, slices = dense_temporary(weight.shape, weight), _slices(positions, weight)
    for expert in hit:
        total[expert].copy_(weight[expert])
        for delta, at, part in zip(values, positions, slices[expert], strict=True):
            add_delta_(total, at[part], delta[part])
    total = total.to(x.dtype)
    return product.compute(total if product.expert is None else total[0])


@_sparse_experts.register_fake
def _(x, weight, values, positions, experts, ends, function, transposed):
    return x.new_empty(_product(x, weight, experts, ends, function, transposed).shape)


@torch.library.custom_op("dowser::experts_grads", mutates_args=(), tags=_TAGS)
def _grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    values: list[Tensor],
    positions: list[Tensor],
    experts: Tensor | None,
    ends: Tensor | None,
    function: str,
    transposed: bool,
    wants_x: bool,
    wants_values: bool,
) -> list[Tensor]:
    """The gradients of x and of the values, in one op: finding the rows of each expert costs a synchronization."""
    grad_x = torch.zeros_like(x)
    grad_values = [torch.zeros_like(delta) for delta in values]
    slices = _slices(positions, weight)
    for expert, rows in _product(x, weight, experts, ends, function, transposed).rows_by_expert():
        parts, own_grad = slices[expert], grad[rows]
        own = [at[part] - expert * weight[0].numel() for at, part in zip(positions, parts, strict=True)]
        if wants_x:
            deltas = [delta[part] for delta, part in zip(values, parts, strict=True)]
            matrix = sum_of(weight[expert], deltas, own).to(grad.dtype)
            grad_x[rows] = own_grad @ (matrix.T if transposed else matrix)
        if wants_values:
            left, right = (x[rows], own_grad) if transposed else (own_grad, x[rows])
            for found, at, part in zip(grad_values, own, parts, strict=True):
                found[part] = product_at(left, right, at)
    return [grad_x, *grad_values]


@_grads.register_fake
def _(grad, x, weight, values, positions, experts, ends, function, transposed, wants_x, wants_values):
    return [torch.empty_like(tensor) for tensor in (x, *values)]


def _setup_context(ctx, inputs, output):
    x, weight, values, positions, experts, ends, *ctx.form = inputs
    ctx.save_for_backward(x, weight, experts, ends, *values, *positions)
    ctx.adapters = len(values)


def _backward(ctx, grad):
    x, weight, experts, ends, *rest = ctx.saved_tensors
    deltas = rest[: ctx.adapters], rest[ctx.adapters :]
    wants_x, _, wants_values, *_ = ctx.needs_input_grad
    wanted = wants_x, any(wants_values)
    grad_x, *grad_values = _grads(grad.reshape(len(x), -1), x, weight, *deltas, experts, ends, *ctx.form, *wanted)
    return grad_x, None, grad_values, [None] * ctx.adapters, None, None, None, None


_sparse_experts.register_autograd(_backward, setup_context=_setup_context)
