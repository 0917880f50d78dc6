"""The sparse product with experts: every row times the matrix W + D of its own expert.

As in `sparse_linear`, W + D is formed as a merge writes it, used and dropped; a `torch.autograd.Function` runs in eager
mode, and custom ops of `torch.library` run under `torch.compile`.

On a CPU only the experts that have rows are formed, one after the other. Elsewhere the host would have to wait to be
told which these are, and each would cost a dozen kernels; so where there are as many rows as experts, all experts are
formed at once, and grouped products have grouped products as gradients. A batched product copies a matrix for every
row, which pays for a few rows only, and torch cannot group its gradient in every dtype: that stays a loop.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ..base.fused import Product
from ..delta.apply import add_delta_
from .linear_op import (
    dense_temporary,
    halves,
    input_grad,
    refuse_second_derivatives,
    refuse_tangents,
    sum_of,
    values_grad,
)

# `experts`, `ends`, `function` and `transposed` of a product, as an op of `torch.library` can take them; and `expert`.
_Form: TypeAlias = tuple[Tensor | None, Tensor | None, str, bool, int | None]

_Deltas: TypeAlias = Sequence[Tensor]


def sparse_experts(product: Product, weight: Tensor, values: _Deltas, positions: _Deltas) -> Tensor:
    """Compute a product with W + D in the place of the fused parameter W, without keeping W + D.

    For the rows x and the output gradient g of each expert, with the positions in its own matrix:
    Forward:  y = x (W + D)^T, by the very product that the module asks for
    Backward: dx = g (W + D),  dD = (g^T x)[positions]

    Args:
        product: what the experts module asks for; where its `x` has another dtype than `weight`, W + D is cast to it.
        weight: frozen matrices, contiguous, shape `(experts, out, in)`, or `(experts, in, out)` if
            `product.transposed`.
        values: one delta per active adapter, shape `(nnz_a,)` each; where `product.expert` is set, that of this expert.
        positions: their flat positions in `weight`, strictly increasing.

    Returns:
        The product, of `product.shape`: the bits that the merged module gives.
    """
    refuse_tangents(product.x, weight, *values)
    form = (product.experts, product.ends, product.function, product.transposed)
    if torch.compiler.is_compiling():
        return _op(product.x, weight, list(values), list(positions), *form)
    return _SparseExperts.apply(product.x, weight, (*form, product.expert), *values, *positions)


def expert_bounds(positions: Tensor, shape: Sequence[int]) -> list[int]:
    """Where the positions of each expert begin in a sorted list, and where the positions of the last expert end.

    Args:
        positions: flat positions in a fused parameter, strictly increasing.
        shape: shape of the parameter, `(experts, ., .)`.
    """
    starts = torch.arange(shape[0] + 1, device=positions.device, dtype=positions.dtype) * (shape[1] * shape[2])
    return torch.searchsorted(positions, starts).tolist()


def _product(x: Tensor, weight: Tensor, form: _Form) -> Product:
    experts, ends, function, transposed, expert = form
    return Product(x, function, transposed, weight.shape[2 if transposed else 1], expert, experts, ends)


def _is_whole(product: Product, weight: Tensor) -> bool:
    """Whether all experts are formed at once. Fewer rows than experts have fewer experts than it would form."""
    return not weight.is_cpu and product.expert is None and len(product.x) >= len(weight)


def _slices(product: Product, weight: Tensor, positions: _Deltas) -> Iterator[tuple[int, slice | Tensor, list[slice]]]:
    """Each expert that has rows; its rows; and which positions of each adapter are in its matrix."""
    if product.expert is not None:
        yield product.expert, slice(None), [slice(None)] * len(positions)
        return
    bounds = [expert_bounds(at, weight.shape) for at in positions]
    for expert, rows in product.rows_by_expert():
        yield expert, rows, [slice(each[expert], each[expert + 1]) for each in bounds]


def _sum_of_experts(product: Product, weight: Tensor, values: _Deltas, positions: _Deltas) -> Tensor:
    """W + D: of the expert of the product, or a tensor like `weight`, of which only experts with rows are filled."""
    if product.expert is not None:
        own = [at - product.expert * weight[0].numel() for at in positions]
        return sum_of(weight[product.expert], values, own)
    if _is_whole(product, weight):
        return sum_of(weight, values, positions)
    total = dense_temporary(weight.shape, weight)
    for expert, _, parts in _slices(product, weight, positions):
        total[expert].copy_(weight[expert])
        for delta, at, part in zip(values, positions, parts, strict=True):
            add_delta_(total, at[part], delta[part])
    return total


def _output(x: Tensor, weight: Tensor, values: _Deltas, positions: _Deltas, form: _Form) -> Tensor:
    product = _product(x, weight, form)
    return product.compute(_sum_of_experts(product, weight, values, positions).to(x.dtype))


def _grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    values: _Deltas,
    positions: _Deltas,
    form: _Form,
    wants_x: bool,
    wants_values: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """The gradients of x and of the values."""
    product = _product(x, weight, form)
    if _is_whole(product, weight) and product.has_grouped_grads:
        return _grouped_grads(grad, product, weight, values, positions, wants_x, wants_values)
    grad_x = torch.zeros_like(x) if wants_x else None
    grad_values = [torch.zeros_like(delta) for delta in values] if wants_values else None
    for expert, rows, parts in _slices(product, weight, positions):
        own = [at[part] - expert * weight[0].numel() for at, part in zip(positions, parts, strict=True)]
        deltas = [delta[part] for delta, part in zip(values, parts, strict=True)]
        if grad_x is not None:
            grad_x[rows] = input_grad(grad[rows], weight[expert], deltas, own, product.transposed)
        if grad_values is not None:
            found = values_grad(grad[rows], x[rows], deltas, own, product.transposed)
            for one, part, own_grad in zip(grad_values, parts, found, strict=True):
                one[part] = own_grad
    return grad_x, grad_values


def _grouped_grads(
    grad: Tensor,
    product: Product,
    weight: Tensor,
    values: _Deltas,
    positions: _Deltas,
    wants_x: bool,
    wants_values: bool,
) -> tuple[Tensor | None, list[Tensor] | None]:
    grad_x = grad_values = None
    if wants_x:
        grad_x = product.input_grad(grad, _sum_of_experts(product, weight, values, positions).to(grad.dtype))
    if wants_values:
        of_weight = product.weight_grad(grad).view(-1)
        grad_values = [
            of_weight.index_select(0, at).to(delta.dtype) for delta, at in zip(values, positions, strict=True)
        ]
    return grad_x, grad_values


class _SparseExperts(torch.autograd.Function):
    """The product in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, form, *deltas):
        ctx.save_for_backward(x, weight, *deltas)
        ctx.form = form
        return _output(x, weight, *halves(deltas), form)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        x, weight, *deltas = ctx.saved_tensors
        values, positions = halves(deltas)
        wants_x, _, _, *wants = ctx.needs_input_grad
        grad = grad.reshape(*x.shape[:-1], -1).contiguous()  # batched products have a further dimension of 1
        grad_x, grad_values = _grads(grad, x, weight, values, positions, ctx.form, wants_x, any(wants))
        return grad_x, None, None, *(grad_values or [None] * len(values)), *[None] * len(positions)


_FORM = "Tensor? experts, Tensor? ends, str function, bool transposed"
_ARGUMENTS = f"Tensor x, Tensor weight, Tensor[] values, Tensor[] positions, {_FORM}"

# Where it loops over experts, the host waits for the number of rows of each, which a CUDA graph does not allow.
_TAGS = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op("dowser::experts", mutates_args=(), tags=_TAGS, schema=f"({_ARGUMENTS}) -> Tensor")
def _op(x, weight, values, positions, *form):
    return _output(x, weight, values, positions, (*form, None))


@torch.library.custom_op(
    "dowser::experts_grads",
    mutates_args=(),
    tags=_TAGS,
    schema=f"(Tensor grad, {_ARGUMENTS}, bool wants_x, bool wants_values) -> Tensor[]",
)
def _grads_op(grad, x, weight, values, positions, experts, ends, function, transposed, wants_x, wants_values):
    form = (experts, ends, function, transposed, None)
    grad_x, grad_values = _grads(grad, x, weight, values, positions, form, wants_x, wants_values)
    return [*([] if grad_x is None else [grad_x]), *(grad_values or [])]


@_op.register_fake
def _(x, weight, values, positions, *form):
    return x.new_empty(_product(x, weight, (*form, None)).shape)


@_grads_op.register_fake
def _(grad, x, weight, values, positions, experts, ends, function, transposed, wants_x, wants_values):
    return [torch.empty_like(tensor) for tensor in (*[x] * wants_x, *(values if wants_values else ()))]


def _setup_context(ctx, inputs, output):
    x, weight, values, positions, experts, ends, *ctx.form = inputs
    ctx.save_for_backward(x, weight, experts, ends, *values, *positions)


def _backward(ctx, grad):
    x, weight, experts, ends, *deltas = ctx.saved_tensors
    values, positions = halves(deltas)
    wants_x, _, wants, *_ = ctx.needs_input_grad
    grad, form = grad.reshape(len(x), -1).contiguous(), (experts, ends, *ctx.form)
    found = _grads_op(grad, x, weight, values, positions, *form, wants_x, any(wants))
    grad_values = found[wants_x:] if any(wants) else [None] * len(values)
    return found[0] if wants_x else None, None, grad_values, [None] * len(positions), None, None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
