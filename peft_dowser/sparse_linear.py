"""The sparse linear op: y = x (W + D)^T + b, with D given by a few values at sorted flat positions of W.

The sum is formed in the dtype of W exactly as a merge writes it, used, and dropped: nothing of the size of W lives from
forward to backward, and the output is bit for bit that of the merged layer. The ops are `torch.library` custom ops, so
`torch.compile` sees them as one node each.
"""

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

# Entries of a delta added or written at a time: bounds the temporaries, which so stay in the cache.
DELTA_BLOCK = 1 << 18
# Bytes of the dense weight gradient formed at a time.
_PRODUCT_BLOCK = 64 << 20
# On CPU the sampled product, computed in float32, beats the dense one below these densities: of float32, 28 ms against
# 68 ms at 0.1, 129 ms at 0.5 (2048 x 2048, 512 tokens, one core); of bfloat16, with instructions for it, 9 ms against
# 22 ms at 0.01, 17 ms at 0.05, 36 ms at 0.1; of float16, without such, 26 ms against 960 ms at 0.1. Elsewhere the dense
# product wins.
_SAMPLED_DENSITY = {torch.float32: 0.2, torch.bfloat16: 0.06, torch.float16: math.inf}
# Tokens of a sampled product at a time: the factors then stay in the cache (12 ms instead of 20 ms, 1024 x 2816).
_TOKEN_BLOCK = 64
_thread = threading.local()


def add_delta_(weight: Tensor, positions: Tensor, values: Tensor) -> None:
    """Add a sparse delta to a weight in place: w <- round(float32(w) + delta), rounded once to the dtype of `weight`.

    This is the one rule by which forward, backward and merge form W + D.

    Args:
        weight: contiguous weight, any float dtype; written at `positions` only.
        positions: distinct flat positions, shape `(nnz,)`, int32 or int64.
        values: the delta at these positions, shape `(nnz,)`, any float dtype.
    """
    flat = weight.view(-1)
    wide = sum_dtype(weight, values)
    if weight.dtype == wide:
        flat.index_add_(0, positions, values.to(wide))
        return
    # Written as integers of the same size: `scatter_` of those takes half as long as `index_copy_`.
    bits = flat.view(torch.int16 if weight.element_size() == 2 else torch.int32)
    for at, delta in zip(positions.split(DELTA_BLOCK), values.split(DELTA_BLOCK), strict=True):
        at = at.long()
        bits.scatter_(0, at, entries_plus(flat.index_select(0, at), delta).view(bits.dtype))


def entries_plus(entries: Tensor, values: Tensor) -> Tensor:
    """What `add_delta_` makes of the entries of a weight, both of shape `(nnz,)`."""
    return (entries.to(sum_dtype(entries, values)) + values).to(entries.dtype)


def sum_dtype(weight: Tensor, values: Tensor) -> torch.dtype:
    """The dtype in which a delta is added to a weight: that of the wider one, at least float32."""
    return torch.promote_types(torch.promote_types(weight.dtype, torch.float32), values.dtype)


def in_autocast(x: Tensor) -> Tensor:
    """A tensor in the dtype in which autocast computes a product: as it is where that is off, or in float64."""
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(device)) if casts else x


def refuse_tangents(*tensors: Tensor | None) -> None:
    """Refuse forward-mode differentiation, of which an op without a rule for it loses the derivative without a word.

    Raises:
        NotImplementedError: a tensor has a tangent, as in `torch.func.jvp` and in `torch.autograd.forward_ad`.
    """
    if any(unpack_dual(tensor).tangent is not None for tensor in tensors if tensor is not None):
        raise NotImplementedError(
            "An adapted layer has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, forward_ad). Merge "
            "the adapter before, with merge_adapter() or merge_and_unload(), or differentiate backward."
        )


def dense_temporary(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialized memory of the size of a weight, valid until the next call in this thread.

    On CPU it is one buffer, kept: every fresh allocation of that size costs its page faults again (15 ms instead of
    6 ms for W + D of 2048 x 5632 in float32), and tears holes into the heap that nothing else fits. On a GPU the
    allocator of torch does the same.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    count = math.prod(shape)
    buffer: Tensor | None = getattr(_thread, "buffer", None)
    if buffer is None or buffer.numel() < count * like.element_size():
        buffer = _thread.buffer = torch.empty(count * like.element_size(), dtype=torch.uint8, device="cpu")
    return buffer[: count * like.element_size()].view(like.dtype).view(shape)


def sum_of(weight: Tensor, values: Sequence[Tensor], positions: Sequence[Tensor]) -> Tensor:
    """W + D_1 + D_2 + ..., each delta added in turn by `add_delta_`; a `dense_temporary`."""
    total = dense_temporary(weight.shape, weight).copy_(weight)
    for delta, at in zip(values, positions, strict=True):
        add_delta_(total, at, delta)
    return total


@torch.library.custom_op("dowser::linear", mutates_args=())
def sparse_linear(
    x: Tensor,
    weight: Tensor,
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
        weight: frozen base weight, shape `(out, in)`, or `(in, out)` if `transposed`; contiguous.
        bias: bias, shape `(out,)`, or None.
        values: one delta per active adapter, shape `(nnz_a,)` each, any float dtype.
        positions: their flat positions in `weight` as stored, strictly increasing, int32 or int64.
        transposed: whether the weight is stored as `(in, out)`, as in transformers' Conv1D.

    Returns:
        Output, shape `(..., out)`, dtype of `x`: the bits that the merged layer gives.
    """
    total = sum_of(weight, values, positions).to(x.dtype)
    if bias is not None:
        bias = bias.to(x.dtype)
    if transposed:
        flat = x.reshape(-1, x.shape[-1])
        product = flat @ total if bias is None else torch.addmm(bias, flat, total)
    else:
        product = F.linear(x, total, bias)
    # No view: of an op's output torch forbids that, where the model then changes it in place.
    return torch.ops.aten._unsafe_view(product, (*x.shape[:-1], product.shape[-1]))


@sparse_linear.register_fake
def _(x, weight, bias, values, positions, transposed):
    return x.new_empty(*x.shape[:-1], weight.shape[1 if transposed else 0])


@torch.library.custom_op("dowser::linear_input_grad", mutates_args=())
def _input_grad(
    grad: Tensor,
    weight: Tensor,
    values: list[Tensor],
    positions: list[Tensor],
    transposed: bool,
) -> Tensor:
    total = sum_of(weight, values, positions).to(grad.dtype)
    return grad @ (total.T if transposed else total)


@_input_grad.register_fake
def _(grad, weight, values, positions, transposed):
    return grad.new_empty(*grad.shape[:-1], weight.shape[0 if transposed else 1])


@torch.library.custom_op("dowser::linear_values_grad", mutates_args=())
def _values_grad(
    grad: Tensor, x: Tensor, values: list[Tensor], positions: list[Tensor], transposed: bool
) -> list[Tensor]:
    rows, columns = (x, grad) if transposed else (grad, x)
    rows, columns = rows.reshape(-1, rows.shape[-1]), columns.reshape(-1, columns.shape[-1])
    return [product_at(rows, columns, at).to(delta.dtype) for delta, at in zip(values, positions, strict=True)]


@_values_grad.register_fake
def _(grad, x, values, positions, transposed):
    return [torch.empty_like(delta) for delta in values]


def _setup_context(ctx, inputs, output):
    x, weight, bias, values, positions, transposed = inputs
    ctx.save_for_backward(x, weight, *values, *positions)
    ctx.adapters = len(values)
    ctx.transposed = transposed
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, weight, *rest = ctx.saved_tensors
    values, positions = rest[: ctx.adapters], rest[ctx.adapters :]
    wants_x, _, wants_bias, wants_values, *_ = ctx.needs_input_grad
    grad_x = grad_bias = None
    grad_values: list[Tensor | None] = [None] * ctx.adapters
    if wants_x:
        grad_x = _input_grad(grad, weight, values, positions, ctx.transposed)
    if wants_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    if any(wants_values):
        grad_values = _values_grad(grad, x, values, positions, ctx.transposed)
    return grad_x, None, grad_bias, grad_values, [None] * ctx.adapters, None


sparse_linear.register_autograd(_backward, setup_context=_setup_context)


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
    density = _SAMPLED_DENSITY.get(rows.dtype, 0) if rows.device.type == "cpu" else 0
    if positions.numel() < density * numel:
        return _sampled_product(rows, columns, positions)
    return _dense_product(rows, columns, positions)


@cache
def _expect_csr() -> None:
    """Let torch say once, unheard, that CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


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
    block = min(height, max(1, _PRODUCT_BLOCK // (width * rows.element_size())))
    firsts = torch.arange(0, height, block, device=positions.device, dtype=positions.dtype)
    ends = torch.searchsorted(positions, firsts[1:] * width).tolist() if block < height else []
    found = rows.new_empty(positions.numel())
    product = dense_temporary((block, width), rows)
    for number, (begin, end) in enumerate(zip([0, *ends], [*ends, positions.numel()], strict=True)):
        row_block = rows[:, number * block : (number + 1) * block]
        part = torch.mm(row_block.T, columns, out=product[: row_block.shape[1]])
        at = positions[begin:end] - number * block * width
        torch.index_select(part.view(-1), 0, at, out=found[begin:end])
    return found
