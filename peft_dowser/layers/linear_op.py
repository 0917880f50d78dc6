"""The sparse linear op: y = x (W + D)^T + b, with D given by a few values at sorted flat positions of W.

The sum is formed in the dtype of W exactly as a merge writes it, used, and dropped: nothing of the size of W lives from
forward to backward, and the output is bit for bit the output of the merged layer. Nothing asks a GPU for a number,
which would make the host wait. In eager mode one `torch.autograd.Function` runs; `torch.compile` gets custom ops of
`torch.library`, which it sees as one node each, and which take twice the host's time.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from ..delta.apply import add_delta_, entries_plus

# Bytes of the dense weight gradient that a CPU forms at a time. Elsewhere it is formed whole, in as much memory as
# W + D took: the host would have to wait for the number where the positions of a block begin.
_PRODUCT_BLOCK = 64 << 20

# On CPU the sampled product, computed in float32, beats the dense one below these densities: of float32, 28 ms against
# 68 ms at 0.1, 129 ms at 0.5 (2048 x 2048, 512 tokens, one core); of bfloat16, with instructions for it, 9 ms against
# 22 ms at 0.01, 17 ms at 0.05, 36 ms at 0.1; of float16, without such, 26 ms against 960 ms at 0.1. Elsewhere the dense
# product wins.
_SAMPLED_DENSITY = {torch.float32: 0.2, torch.bfloat16: 0.06, torch.float16: math.inf}

# Tokens of a sampled product at a time: the factors then stay in the cache (12 ms instead of 20 ms, 1024 x 2816).
_TOKEN_BLOCK = 64

_thread = threading.local()

# A weight, or what computes it anew in every forward and backward, as from a quantized one.
Weight: TypeAlias = Tensor | Callable[[], Tensor]

_DELTAS = "Tensor[] values, Tensor[] positions, bool transposed"
# The layer under `torch.compile`.


def in_autocast(x: Tensor) -> Tensor:
    """A tensor in the dtype in which autocast computes a product; unchanged if autocast is off, or in float64."""
    device = x.device.type
    # Torch knows no autocast of meta, and torch 2.10 cannot trace `is_autocast_available`.
    casts = device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def refuse_tangents(*inputs: object) -> None:
    """Refuse forward-mode differentiation: an op without a rule for it silently loses the derivative.

    Raises:
        NotImplementedError: a tensor has a tangent, as in `torch.func.jvp` and in `torch.autograd.forward_ad`.
    """
    if any(unpack_dual(value).tangent is not None for value in inputs if isinstance(value, Tensor)):
        raise NotImplementedError(
            "An adapted layer has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, forward_ad). Merge "
            "the adapter before, with merge_adapter() or merge_and_unload(), or differentiate backward."
        )


def refuse_second_derivatives() -> None:
    """Refuse a second derivative in a backward: its result has no graph, and would count as constant.

    Raises:
        NotImplementedError: the backward runs with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "An adapted layer has no second derivative (create_graph=True). Merge the adapter before, with "
            "merge_adapter() or merge_and_unload(), or differentiate once."
        )


def dense_temporary(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialized memory of the size of a weight, valid until the next call in this thread.

    On CPU it is one buffer, kept: every fresh allocation of that size costs its page faults again (15 ms instead of
    6 ms for W + D of 2048 x 5632 in float32), and fragments the heap. On a GPU the allocator of torch does the same.
    """
    if not like.is_cpu:
        return like.new_empty(shape)
    count = math.prod(shape)
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < count * like.element_size():
        buffer = _thread.buffer = torch.empty(count * like.element_size(), dtype=torch.uint8, device="cpu")
    return buffer[: count * like.element_size()].view(like.dtype).view(shape)


def sum_of(weight: Weight, values: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """W + D_1 + D_2 + ..., each delta added in turn by `add_delta_`; a temporary."""
    total = dense_temporary(weight.shape, weight).copy_(weight) if isinstance(weight, Tensor) else weight()
    for delta, at in zip(values, positions, strict=True):
        add_delta_(total, at, delta)
    return total


def sparse_linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    values: list[Tensor],
    positions: list[Tensor],
    transposed: bool,
) -> Tensor:
    """Apply a linear layer whose weight is W + D, without keeping W + D.

    Forward:  y = x (W + D)^T + b
    Backward: dx = dy (W + D),  dD = (dy^T x)[positions],  db = sum dy

    Args:
        x: input, shape `(..., in)`. Where its dtype differs from that of `weight` (autocast), W + D is cast to it.
        weight: frozen base weight, shape `(out, in)`, or `(in, out)` if `transposed`; contiguous. Or a function that
            returns such a tensor, to which D is added; not under `torch.compile`.
        bias: bias, shape `(out,)`, or None.
        values: one delta per active adapter, shape `(nnz_a,)` each, any float dtype.
        positions: their flat positions in `weight` as stored, strictly increasing, int32 or int64.
        transposed: whether the weight is stored as `(in, out)`, as in transformers' Conv1D.

    Returns:
        Output, shape `(..., out)`, dtype of `x`: the bits that the merged layer gives.
    """
    if torch.compiler.is_compiling():
        return linear_op(x, cast(Tensor, weight), bias, values, positions, transposed)
    return _SparseLinear.apply(x, weight, bias, transposed, *values, *positions)


def _output(
    x: Tensor, weight: Weight, bias: Tensor | None, values: list[Tensor], positions: list[Tensor], transposed: bool
) -> Tensor:
    total = sum_of(weight, values, positions).to(x.dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    if transposed:
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ total if bias is None else torch.addmm(bias, flat, total)
    else:
        product = F.linear(x, total, bias)
    if product.dim() == x.dim() and not product._is_view():
        return product
    # No view: of an op's output torch forbids that, where the model then changes it in place.
    return torch.ops.aten._unsafe_view(product, (*x.shape[:-1], product.shape[-1]))


def input_grad(grad: Tensor, weight: Weight, values: list[Tensor], positions: list[Tensor], transposed: bool) -> Tensor:
    """The gradient g (W + D) of the input of `sparse_linear`, where g, shape `(..., out)`, is that of its output."""
    total = sum_of(weight, values, positions).to(grad.dtype)
    return grad @ (total.T if transposed else total)


def values_grad(
    grad: Tensor, x: Tensor, values: list[Tensor], positions: list[Tensor], transposed: bool
) -> list[Tensor]:
    """The gradients of the values of each adapter, shape `(nnz_a,)`, where `grad` is that of the output."""
    rows, columns = (_rows(x), _rows(grad)) if transposed else (_rows(grad), _rows(x))
    return [product_at(rows, columns, at).to(delta.dtype) for delta, at in zip(values, positions, strict=True)]


def _rows(of: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return of if of.dim() == 2 else of.reshape(-1, of.shape[-1])


def _keep(ctx: Any, x: Tensor, weight: Weight, bias: Tensor | None, deltas: Sequence[Tensor], transposed: bool) -> None:
    """Keep for the backward; `deltas` are the values of all adapters, then their positions."""
    is_there = isinstance(weight, Tensor)
    ctx.save_for_backward(x, weight if is_there else None, *deltas)
    ctx.compute_weight = None if is_there else weight
    ctx.transposed = transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(
    ctx: Any, grad: Tensor, wants: Sequence[bool], of_input: Callable[..., Tensor], of_values: Callable[..., Any]
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """The gradients of x, bias and values, as far as `wants` says so of each of the three."""
    x, weight, *deltas = ctx.saved_tensors
    values, positions = halves(deltas)
    wants_x, wants_bias, wants_values = wants
    grad_x = of_input(grad, ctx.compute_weight or weight, values, positions, ctx.transposed) if wants_x else None
    grad_bias = _rows(grad).sum(0).to(ctx.bias_dtype) if wants_bias else None
    if not wants_values:
        return grad_x, grad_bias, [None] * len(values)
    return grad_x, grad_bias, of_values(grad, x, values, positions, ctx.transposed)


def halves(deltas: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The values of all adapters, and their positions, which follow them."""
    return list(deltas[: len(deltas) // 2]), list(deltas[len(deltas) // 2 :])


class _SparseLinear(torch.autograd.Function):
    """The layer in eager mode."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, *deltas):
        _keep(ctx, x, weight, bias, deltas, transposed)
        return _output(x, weight, bias, *halves(deltas), transposed)

    @staticmethod
    def backward(ctx, grad):
        refuse_second_derivatives()
        wants_x, _, wants_bias, _, *wants_values = ctx.needs_input_grad
        wants = wants_x, wants_bias, any(wants_values)
        grad_x, grad_bias, grad_values = _gradients(ctx, grad, wants, input_grad, values_grad)
        return grad_x, None, grad_bias, None, *grad_values, *[None] * len(grad_values)


linear_op = torch.library.custom_op(
    "dowser::linear", _output, mutates_args=(), schema=f"(Tensor x, Tensor weight, Tensor? bias, {_DELTAS}) -> Tensor"
)


input_grad_op = torch.library.custom_op(
    "dowser::linear_input_grad",
    input_grad,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor weight, {_DELTAS}) -> Tensor",
)


values_grad_op = torch.library.custom_op(
    "dowser::linear_values_grad",
    values_grad,
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, {_DELTAS}) -> Tensor[]",
)


@linear_op.register_fake
def _(x, weight, bias, values, positions, transposed):
    return x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])


@input_grad_op.register_fake
def _(grad, weight, values, positions, transposed):
    return grad.new_empty(*grad.shape[:-1], weight.shape[0 if transposed else 1])


@values_grad_op.register_fake
def _(grad, x, values, positions, transposed):
    return [torch.empty_like(delta) for delta in values]


def _setup_context(ctx, inputs, output):
    x, weight, bias, values, positions, transposed = inputs
    _keep(ctx, x, weight, bias, (*values, *positions), transposed)


def _backward(ctx, grad):
    wants_x, _, wants_bias, wants_values, *_ = ctx.needs_input_grad
    wants = wants_x, wants_bias, any(wants_values)
    grad_x, grad_bias, grad_values = _gradients(ctx, grad, wants, input_grad_op, values_grad_op)
    return grad_x, None, grad_bias, grad_values, [None] * len(grad_values), None


linear_op.register_autograd(_backward, setup_context=_setup_context)


def product_at(rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    """Entries of rows^T columns at flat positions.

    Args:
        rows: shape `(tokens, m)`.
        columns: shape `(tokens, n)`, same dtype.
        positions: strictly increasing positions in the `(m, n)` product, shape `(nnz,)`.

    Returns:
        The entries, shape `(nnz,)`, float32 or the dtype of `rows`.
    """
    numel = rows.shape[1] * columns.shape[1]
    density = _SAMPLED_DENSITY.get(rows.dtype, 0) if rows.is_cpu else 0
    if positions.numel() < density * numel:
        return _sampled_product(rows, columns, positions)
    return _dense_product(rows, columns, positions)


@cache
def _expect_csr() -> None:
    """Swallow torch's single warning that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False, device="cpu")


def _sampled_product(rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    _expect_csr()
    height, width = rows.shape[1], columns.shape[1]
    starts = torch.arange(height + 1, device=positions.device, dtype=positions.dtype) * width
    pattern = torch.sparse_csr_tensor(
        torch.searchsorted(positions, starts, out_int32=positions.dtype == torch.int32),
        positions % width,
        torch.zeros(positions.numel(), dtype=torch.float32, device=rows.device),
        (height, width),
        check_invariants=False,
    )
    for row_block, column_block in zip(_token_blocks(rows), _token_blocks(columns), strict=True):
        torch.sparse.sampled_addmm(pattern, row_block, column_block.T, out=pattern)
    return pattern.values()


def _token_blocks(values: Tensor) -> Iterator[Tensor]:
    """Blocks of tokens, each transposed to `(features, tokens)`, float32 and contiguous."""
    for block in values.split(_TOKEN_BLOCK):
        yield block.T.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _dense_product(rows: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
    height, width = rows.shape[1], columns.shape[1]
    block = max(1, _PRODUCT_BLOCK // (width * rows.element_size())) if rows.is_cpu else height
    if height > block:
        return _dense_product_by_blocks(rows, columns, positions, block)
    product = torch.mm(rows.T, columns, out=dense_temporary((height, width), rows))
    return torch.index_select(product.view(-1), 0, positions)


def _dense_product_by_blocks(rows: Tensor, columns: Tensor, positions: Tensor, block: int) -> Tensor:
    height, width = rows.shape[1], columns.shape[1]
    firsts = torch.arange(0, height, block, device=positions.device, dtype=positions.dtype)
    ends = torch.searchsorted(positions, firsts[1:] * width).tolist()
    found = rows.new_empty(positions.numel())
    product = dense_temporary((block, width), rows)
    for number, (begin, end) in enumerate(zip([0, *ends], [*ends, positions.numel()], strict=True)):
        row_block = rows[:, number * block : (number + 1) * block]
        part = torch.mm(row_block.T, columns, out=product[: row_block.shape[1]])
        torch.index_select(part.view(-1), 0, positions[begin:end] - number * block * width, out=found[begin:end])
    return found


def summed_rows(weight: Tensor, rows: Tensor, values: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """Rows of W + D_1 + D_2 + ..., differentiable with respect to the values.

    Each delta is added in turn and rounded once to the dtype of the weight: the rule of `delta.apply.add_delta_`.

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
