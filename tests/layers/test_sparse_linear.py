"""The sparse linear op: the bits of the merged layer, the gradients of a dense twin, and nothing kept or touched."""

import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from models import CountedOps
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_dowser.delta.apply import add_delta_
from peft_dowser.layers import linear_op as floor
from peft_dowser.layers.linear_op import sparse_linear

OUT, IN = 24, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# An integer of the width of each dtype: to compare bits, and to write a signalling NaN with a payload.
INTEGER = {
    torch.float64: (torch.int64, 0x7FF0000000000123),
    torch.float32: (torch.int32, 0x7F800123),
    torch.float16: (torch.int16, 0x7C23),
    torch.bfloat16: (torch.int16, 0x7F83),
}

over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
over_layouts = pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])


class Case(NamedTuple):
    """The arguments of the op, in order."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    values: list[Tensor]
    positions: list[Tensor]
    transposed: bool


def make(
    dtype: torch.dtype = torch.float32,
    tokens: Sequence[int] = (13,),
    nnz: Sequence[int] = (30,),
    transposed: bool = False,
    shape: tuple[int, int] = (OUT, IN),
    position_dtype: torch.dtype = torch.int32,
    seed: int = 0,
) -> Case:
    """A random layer; x, bias and values require a gradient, and 30 of 960 values take the sampled product."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    out, width = shape
    return Case(
        normal(*tokens, width).to(dtype).requires_grad_(),
        normal(*((width, out) if transposed else (out, width))).to(dtype),
        normal(out).to(dtype).requires_grad_(),
        [normal(count).to(torch.promote_types(dtype, torch.float32)).requires_grad_() for count in nnz],
        [torch.randperm(out * width, generator=generator)[:n].sort().values.to(position_dtype) for n in nnz],
        transposed,
    )


def dense_sum(case: Case) -> Tensor:
    """W + D_1 + D_2 + ..., each dense, added in float32 (float64) and rounded once."""
    total = case.weight
    wide = torch.promote_types(total.dtype, torch.float32)
    for values, positions in zip(case.values, case.positions, strict=True):
        delta = torch.zeros(total.numel(), dtype=wide)
        delta[positions.long()] = values.detach().to(wide)
        total = (total.to(wide) + delta.view(total.shape)).to(total.dtype)
    return total


def merged_output(case: Case) -> Tensor:
    """What nn.Linear, or transformers' Conv1D, gives with W + D as its weight."""
    total, bias = dense_sum(case).to(case.x.dtype), None if case.bias is None else case.bias.detach().to(case.x.dtype)
    if not case.transposed:
        return F.linear(case.x.detach(), total, bias)
    if bias is None:
        return case.x.detach() @ total
    layer = Conv1D(total.shape[1], total.shape[0]).requires_grad_(False)
    layer.weight.data, layer.bias.data = total, bias
    return layer(case.x.detach().contiguous())


def upstream(case: Case) -> Tensor:
    """A random gradient of the output."""
    out = case.weight.shape[1 if case.transposed else 0]
    size = (*case.x.shape[:-1], out)
    return torch.randn(size, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(case.x.dtype)


def inputs(case: Case) -> list[Tensor]:
    return [case.x, *([] if case.bias is None else [case.bias]), *case.values]


def gradients(case: Case, grad: Tensor) -> list[Tensor]:
    """Gradients of x, bias and each adapter's values."""
    return list(torch.autograd.grad(sparse_linear(*case), inputs(case), grad))


def twin_gradients(case: Case, grad: Tensor) -> list[Tensor]:
    """The same from a dense float64 layer that trains all of W + D."""
    x = case.x.detach().double().requires_grad_()
    weight = dense_sum(case).to(case.x.dtype).double().requires_grad_()
    bias = torch.zeros(grad.shape[-1], dtype=torch.float64, requires_grad=True)
    output = F.linear(x, weight.T if case.transposed else weight, bias)
    of_x, of_bias, of_weight = torch.autograd.grad(output, [x, bias, weight], grad.double())
    of_values = [of_weight.flatten()[positions.long()] for positions in case.positions]
    return [of_x, *([] if case.bias is None else [of_bias]), *of_values]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(INTEGER[tensor.dtype][0])


def assert_all_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    assert [t.dtype for t in left] == [t.dtype for t in right]
    assert [torch.equal(bits(a), bits(b)) for a, b in zip(left, right, strict=True)] == [True] * len(left)


def assert_gradients_of_the_twin(case: Case, grad: Tensor) -> None:
    found, expected = gradients(case, grad), twin_gradients(case, grad)
    tolerance = TOLERANCE[case.x.dtype]
    assert [t.dtype for t in found] == [t.dtype for t in inputs(case)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def fresh_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "_thread", threading.local())


def poison_buffer() -> None:
    """Fill the kept buffer with NaN, in every dtype."""
    floor._thread.buffer.fill_(0xFF)


# The sum


@over_dtypes
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("nnz", [0, 1, 12])
@pytest.mark.parametrize("block", [5, 6, 100])
def test_a_delta_is_written_at_its_positions_and_nowhere_else(
    dtype: torch.dtype, position_dtype: torch.dtype, nnz: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dowser.delta.apply._DELTA_BLOCK", block)
    case = make(dtype, nnz=(nnz,), shape=(6, 8), position_dtype=position_dtype)
    (values,), (positions,) = case.values, case.positions
    integer, signalling_nan = INTEGER[dtype]
    memory = torch.full((80,), -0.0, dtype=dtype)
    memory.view(integer)[::2] = signalling_nan
    weight = memory[16:64].view(6, 8)
    weight.view(-1)[positions.long()] = case.weight.view(-1)[positions.long()]
    expected = bits(memory).clone()
    expected[16 + positions.long()] = bits(dense_sum(case)).view(-1)[positions.long()]
    add_delta_(weight, positions, values.detach())
    assert torch.equal(bits(memory), expected)


@over_dtypes
@pytest.mark.parametrize("value_dtype", DTYPES)
@pytest.mark.parametrize("size", ["any", "subnormal", "close"])
def test_the_sum_has_the_bits_of_one_addition(dtype: torch.dtype, value_dtype: torch.dtype, size: str) -> None:
    """Over random bits, which hold subnormal numbers, infinities and NaN, and over sums near half a unit."""
    generator = torch.Generator().manual_seed(0)

    def random(of: torch.dtype) -> Tensor:
        integer = INTEGER[of][0]
        limits = torch.iinfo(integer)
        return torch.randint(limits.min, limits.max, (100_000,), generator=generator, dtype=integer).view(of)

    entries, values = random(dtype), random(value_dtype)
    if size == "subnormal":
        tiny = torch.finfo(dtype).tiny
        entries = (torch.rand(entries.shape, generator=generator, dtype=torch.float64) * tiny).to(dtype)
        values = (torch.rand(entries.shape, generator=generator, dtype=torch.float64) * tiny).to(value_dtype)
    elif size == "close":
        values = (entries.double() * 0.01 * torch.rand(entries.shape, generator=generator)).to(value_dtype)
    wide = torch.promote_types(torch.promote_types(dtype, torch.float32), value_dtype)
    expected = (entries.to(wide) + values.to(wide)).to(dtype)
    found = entries.clone()
    add_delta_(found, torch.arange(100_000, dtype=torch.int32), values)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(bits(found)[~found.isnan()], bits(expected)[~found.isnan()])


@over_dtypes
def test_no_sum_is_an_atomic_addition_off_the_cpu(dtype: torch.dtype) -> None:
    """On a GPU that takes subnormal numbers for 0, so that sums would not be those of a merge."""
    weight, positions = torch.zeros(6, 8, dtype=dtype, device="meta"), torch.arange(12, device="meta")
    with CountedOps() as ops:
        add_delta_(weight, positions, torch.zeros(12, device="meta"))
    assert ops.counts["aten::scatter_"] == 1
    assert not {"aten::index_add_", "aten::scatter_add_", "aten::index_put_"} & set(ops.counts)


@pytest.mark.parametrize(("device", "blocks"), [("cpu", 20), ("meta", 2)])
def test_a_gpu_adds_larger_blocks_than_a_cpu(device: str, blocks: int) -> None:
    weight = torch.zeros(5_000_000, dtype=torch.bfloat16, device=device)
    with CountedOps() as ops:
        add_delta_(weight, torch.arange(len(weight), device=device), torch.zeros(len(weight), device=device))
    assert ops.counts["aten::scatter_"] == ops.counts["aten::add"] == blocks


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_the_sum_is_rounded_and_not_the_delta(dtype: torch.dtype, ulp: float) -> None:
    """Just above half a unit goes up; a delta rounded to `dtype` first is the half itself, a tie that goes down."""
    delta = torch.tensor([ulp / 2 * (1 + 2**-12)])
    assert delta.to(dtype).item() == ulp / 2
    weight = torch.ones(1, 2, dtype=dtype)
    add_delta_(weight, torch.tensor([1]), delta)
    assert weight.tolist() == [[1, 1 + ulp]]


@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_each_delta_is_rounded_in_turn_as_merges_are(dtype: torch.dtype, ulp: float) -> None:
    half, third = torch.tensor([ulp / 2]), torch.tensor([ulp * 3 / 4])
    x, weight, at = torch.ones(1, 1, dtype=dtype), torch.ones(1, 1, dtype=dtype), torch.tensor([0])
    assert sparse_linear(x, weight, None, [half, half], [at, at], False).item() == 1  # together a whole unit
    assert sparse_linear(x, weight, None, [third, half], [at, at], False).item() == 1 + 2 * ulp  # a tie, from odd
    assert sparse_linear(x, weight, None, [half, third], [at, at], False).item() == 1 + ulp


# Forward


@over_dtypes
@over_layouts
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nnz", [(), (30,), (30, 500)])
@pytest.mark.parametrize("tokens", [(13,), (3, 5)])
def test_the_output_is_bit_for_bit_that_of_the_merged_layer(
    dtype: torch.dtype, transposed: bool, bias: bool, nnz: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    case = make(dtype, tokens, nnz, transposed)
    case = case._replace(bias=case.bias if bias else None)
    output = sparse_linear(*case)
    assert output.shape == (*tokens, OUT)
    assert_all_same_bits([output], [merged_output(case)])


@pytest.mark.parametrize("tokens", [(), (1,), (2, 1, 3, 4)])
@over_layouts
def test_any_number_of_leading_dimensions(tokens: tuple[int, ...], transposed: bool) -> None:
    case = make(torch.float64, tokens, transposed=transposed)
    torch.testing.assert_close(sparse_linear(*case), merged_output(case), rtol=1e-12, atol=1e-12)
    assert_gradients_of_the_twin(case, upstream(case))


@pytest.mark.parametrize("tokens", [(), (3,), (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
@over_layouts
def test_a_model_may_change_the_output_in_place(tokens: tuple[int, ...], bias: bool, transposed: bool) -> None:
    case = make(torch.float64, tokens, transposed=transposed)
    case = case._replace(bias=case.bias if bias else None)
    output = sparse_linear(*case)
    output.mul_(2).add_(1)
    assert torch.equal(output, merged_output(case) * 2 + 1)
    found = torch.autograd.grad(output, inputs(case), upstream(case))
    assert_all_same_bits(found, gradients(case, 2 * upstream(case)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over_layouts
def test_under_autocast_the_rounded_sum_is_cast(dtype: torch.dtype, transposed: bool) -> None:
    case = make(tokens=(3, 5), nnz=(30, 500), transposed=transposed)
    weight = dense_sum(case)
    with torch.autocast("cpu", dtype=dtype):
        expected = F.linear(case.x, weight.T if transposed else weight, case.bias)
        cast = case._replace(x=case.x.detach().to(dtype).requires_grad_())
        inside = sparse_linear(*cast)
    assert inside.dtype == dtype
    assert_all_same_bits([inside, sparse_linear(*cast)], [merged_output(cast)] * 2)
    torch.testing.assert_close(inside, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_gradients_of_the_twin(cast, upstream(cast))


@over_dtypes
@pytest.mark.parametrize("value_dtype", DTYPES[:3])
def test_values_of_another_dtype_are_added_exactly_and_keep_their_dtype(
    dtype: torch.dtype, value_dtype: torch.dtype
) -> None:
    case = make(dtype, nnz=(30, 500))
    case = case._replace(values=[values.detach().to(value_dtype).requires_grad_() for values in case.values])
    assert_all_same_bits([sparse_linear(*case)], [merged_output(case)])
    found, expected = gradients(case, upstream(case)), twin_gradients(case, upstream(case))
    tolerance = max(TOLERANCE[dtype], TOLERANCE[value_dtype])
    assert [t.dtype for t in found[2:]] == [value_dtype] * 2
    torch.testing.assert_close([t.double() for t in found], expected, rtol=tolerance, atol=tolerance)


# Backward


@over_dtypes
@over_layouts
@pytest.mark.parametrize("nnz", [(), (30,), (500,), (30, 500, 960)])
@pytest.mark.parametrize("tokens", [(13,), (3, 5)])
def test_gradients_are_those_of_a_dense_twin(
    dtype: torch.dtype, transposed: bool, nnz: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    case = make(dtype, tokens, nnz, transposed)
    assert_gradients_of_the_twin(case, upstream(case))
    assert_gradients_of_the_twin(case._replace(bias=None), upstream(case))


@over_layouts
def test_gradients_pass_gradcheck(transposed: bool) -> None:
    case = make(torch.float64, (2, 3), (4, 9), transposed, shape=(4, 5))

    def output(x: Tensor, bias: Tensor, *values: Tensor) -> Tensor:
        return sparse_linear(x, case.weight, bias, list(values), case.positions, transposed)

    assert torch.autograd.gradcheck(output, (case.x, case.bias, *case.values))


@pytest.mark.parametrize("wanted", [mask for mask in product([False, True], repeat=4) if any(mask)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whatever_subset_of_gradients_is_asked_for_comes_out(wanted: tuple[bool, ...], dtype: torch.dtype) -> None:
    case = make(dtype, nnz=(30, 30))
    expected = gradients(case, upstream(case))
    for tensor, wants in zip(inputs(case), wanted, strict=True):
        tensor.requires_grad_(wants)
    sparse_linear(*case).backward(upstream(case))
    assert [tensor.grad is not None for tensor in inputs(case)] == list(wanted)
    pairs = [(tensor.grad, full) for tensor, full in zip(inputs(case), expected, strict=True) if tensor.requires_grad]
    assert_all_same_bits(*zip(*pairs, strict=True))


@pytest.mark.parametrize(
    ("wanted", "unused"),
    [(0, ["values_grad"]), (1, ["values_grad", "sum_of"]), (2, ["sum_of"])],
    ids=["x", "bias", "values"],
)
def test_what_is_not_asked_for_is_not_computed(wanted: int, unused: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    for tensor in inputs(case):
        tensor.requires_grad_(False)
    asked = inputs(case)[wanted].requires_grad_()
    output = sparse_linear(*case)
    for name in unused:
        monkeypatch.setattr(floor, name, lambda *args: pytest.fail("computed"))
    output.backward(upstream(case))
    expected = twin_gradients(case, upstream(case))[wanted]
    torch.testing.assert_close(asked.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_layouts
@pytest.mark.parametrize("tokens", [(0,), (2, 0)])
def test_no_tokens_give_gradients_of_zero(dtype: torch.dtype, transposed: bool, tokens: tuple[int, ...]) -> None:
    case = make(dtype, tokens, (30, 500), transposed)
    output = sparse_linear(*case)
    assert output.shape == (*tokens, OUT)
    poison_buffer()
    of_x, *rest = torch.autograd.grad(output, inputs(case), upstream(case))
    assert of_x.shape == case.x.shape
    assert_all_same_bits(rest, [torch.zeros_like(tensor) for tensor in inputs(case)[1:]])


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("density", [0, 2])
def test_an_adapter_without_values_has_an_empty_gradient(
    position_dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "_SAMPLED_DENSITY", {torch.float32: density})
    case = make(nnz=(0, 30, 0), position_dtype=position_dtype)
    assert [len(t) for t in gradients(case, upstream(case))[2:]] == [0, 30, 0]
    assert_gradients_of_the_twin(case, upstream(case))


@over_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("nnz", [1, 30, 960])
@pytest.mark.parametrize("token_block", [1, 4, 13, 64])
def test_the_sampled_product_by_any_blocks_of_tokens(
    dtype: torch.dtype,
    transposed: bool,
    position_dtype: torch.dtype,
    nnz: int,
    token_block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(floor, "_SAMPLED_DENSITY", {dtype: 2})
    monkeypatch.setattr(floor, "_TOKEN_BLOCK", token_block)
    monkeypatch.setattr(floor, "_dense_product", lambda *args: pytest.fail("dense"))
    case = make(dtype, nnz=(nnz,), transposed=transposed, position_dtype=position_dtype)
    assert_gradients_of_the_twin(case, upstream(case))


@over_layouts
@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("nnz", [1, 30, 960])
@pytest.mark.parametrize("rows", [0, 5, 8, 23, 100])
def test_the_dense_product_by_any_blocks_of_rows(
    transposed: bool, position_dtype: torch.dtype, nnz: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(nnz=(nnz,), transposed=transposed, position_dtype=position_dtype)
    monkeypatch.setattr(floor, "_SAMPLED_DENSITY", {})
    monkeypatch.setattr(floor, "_PRODUCT_BLOCK", rows * case.weight.shape[1] * 4)
    monkeypatch.setattr(floor, "_sampled_product", lambda *args: pytest.fail("sampled"))
    assert_gradients_of_the_twin(case, upstream(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sampled_product_of_16_bits_is_computed_in_float32(dtype: torch.dtype) -> None:
    rows, columns = (
        torch.randn(100, size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (9, 40)
    )
    positions = torch.tensor([0, 3, 39, 40, 200, 359])
    found = floor._sampled_product(rows, columns, positions)
    expected = (rows.double().T @ columns.double()).view(-1)[positions]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_dense_product_stays_within_its_block(monkeypatch: pytest.MonkeyPatch, fresh_buffer: None) -> None:
    case = make(torch.float64, nnz=(500,))
    output = sparse_linear(case.x.detach(), *case[1:])
    block = 5 * IN * 8
    monkeypatch.setattr(floor, "_PRODUCT_BLOCK", block)
    monkeypatch.setattr(floor, "_thread", threading.local())
    torch.autograd.grad(output, case.values, upstream(case))
    assert floor._thread.buffer.numel() == block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_layouts
@pytest.mark.parametrize("strides", ["swapped", "expanded", "strided"])
def test_inputs_and_gradients_need_not_be_contiguous(dtype: torch.dtype, transposed: bool, strides: str) -> None:
    change = {
        "swapped": lambda t: t.transpose(0, 1),
        "expanded": lambda t: t[:1].expand(t.shape),
        "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    }[strides]
    case = make(dtype, (3, 5), (30, 500), transposed)
    grad = change(upstream(case))
    case = case._replace(x=change(case.x.detach()).requires_grad_())
    assert not case.x.is_contiguous()
    assert not grad.is_contiguous()
    assert_all_same_bits([sparse_linear(*case)], [merged_output(case)])
    assert_gradients_of_the_twin(case, grad)


def test_a_weight_used_twice_collects_both_gradients() -> None:
    case = make(torch.float64, nnz=(100, 300), shape=(IN, IN))
    grad = upstream(case)
    inner = sparse_linear(*case)
    found = torch.autograd.grad(sparse_linear(inner, *case[1:]), inputs(case), grad)
    outer = case._replace(x=inner.detach().requires_grad_())
    of_inner, *later = twin_gradients(outer, grad)
    of_x, *earlier = twin_gradients(case, of_inner)
    expected = [of_x, *(one + other for one, other in zip(earlier, later, strict=True))]
    torch.testing.assert_close(list(found), expected, rtol=1e-11, atol=1e-11)


# What stays and what is left alone


@over_layouts
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_only_the_inputs_are_kept_for_backward(transposed: bool, x_dtype: torch.dtype) -> None:
    case = make(nnz=(30, 500), transposed=transposed)
    case = case._replace(x=case.x.detach().to(x_dtype).requires_grad_())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = sparse_linear(*case)
    assert output.requires_grad
    expected = [case.x, case.weight, *case.values, *case.positions]
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in expected)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_the_sum_dies_in_the_forward_that_formed_it(x_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, sums = F.linear, []

    def spy(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        sums.append(weakref.ref(weight))
        assert sums[-1]().dtype == x_dtype
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    case = make()
    output = sparse_linear(case.x.to(x_dtype), *case[1:])
    assert output.requires_grad
    assert [reference() for reference in sums] == [None]


@over_dtypes
@over_layouts
def test_no_input_is_written(dtype: torch.dtype, transposed: bool) -> None:
    case = make(dtype, nnz=(30, 500), transposed=transposed)
    tensors = [*inputs(case), case.weight]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    positions = [at.clone() for at in case.positions]
    grad = upstream(case)
    gradients(case, grad)
    assert_all_same_bits([*tensors, grad], [*before, upstream(case)])
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(at, other) for at, other in zip(case.positions, positions, strict=True))


@over_dtypes
@over_layouts
def test_later_calls_do_not_alter_earlier_results(dtype: torch.dtype, transposed: bool, fresh_buffer: None) -> None:
    case = make(dtype, nnz=(30, 500), transposed=transposed)
    output = sparse_linear(*case)
    results = [output.detach(), *torch.autograd.grad(output, inputs(case), upstream(case))]
    before = [tensor.clone() for tensor in results]
    for other in [*DTYPES, dtype]:
        later = make(other, nnz=(30, 500), transposed=transposed, seed=1)
        gradients(later, upstream(later))
    poison_buffer()
    assert_all_same_bits(results, before)


def test_calls_of_other_dtypes_and_sizes_between_are_harmless(fresh_buffer: None) -> None:
    for dtype, shape in product(DTYPES, [(3, 5), (OUT, IN), (1, 7), (64, 33), (2, 2)]):
        case = make(dtype, nnz=(3, 4), shape=shape)
        assert_all_same_bits([sparse_linear(*case)], [merged_output(case)])
        assert_gradients_of_the_twin(case, upstream(case))


def test_what_the_buffer_held_does_not_matter(fresh_buffer: None) -> None:
    case = make(torch.bfloat16, nnz=(30, 500))
    sparse_linear(*case)
    poison_buffer()
    output = sparse_linear(*case)
    assert_all_same_bits([output], [merged_output(case)])
    poison_buffer()
    found = torch.autograd.grad(output, inputs(case), upstream(case))
    assert_all_same_bits(found, gradients(case, upstream(case)))
    assert all(tensor.isfinite().all() for tensor in found)


def test_one_buffer_of_the_largest_size_is_kept(fresh_buffer: None) -> None:
    sizes, places = [], []
    for dtype, shape in [(torch.bfloat16, (4, 4)), (torch.float64, (8, 8)), (torch.float32, (8, 8))]:
        sparse_linear(*make(dtype, nnz=(3,), shape=shape))
        sizes.append(floor._thread.buffer.numel())
        places.append(floor._thread.buffer.data_ptr())
    assert sizes == [32, 512, 512]
    assert places[1] == places[2]


@pytest.mark.parametrize(
    ("module", "function"), [(F, "linear"), (torch, "index_select")], ids=["sum", "product"]
)  # called while the buffer is in use
def test_a_call_in_another_thread_leaves_the_buffer_in_use_alone(
    module: ModuleType, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, other = make(nnz=(500,)), make(nnz=(500,), seed=1)
    original = getattr(module, function)
    found_there: list[Tensor] = []

    def interrupted(*args, **kwargs) -> Tensor:
        monkeypatch.setattr(module, function, original)
        with ThreadPoolExecutor(1) as pool:
            found_there.extend(pool.submit(gradients, other, upstream(other)).result(timeout=20))
        return original(*args, **kwargs)

    expected = [sparse_linear(*case).detach(), *gradients(case, upstream(case))]
    expected_there = gradients(other, upstream(other))
    monkeypatch.setattr(module, function, interrupted)
    output = sparse_linear(*case)
    found = [output.detach(), *torch.autograd.grad(output, inputs(case), upstream(case))]
    assert_all_same_bits(found, expected)
    assert_all_same_bits(found_there, expected_there)


@over_dtypes
def test_training_works_after_inference_mode_made_the_buffer(dtype: torch.dtype, fresh_buffer: None) -> None:
    case = make(dtype, nnz=(30, 500))
    with torch.inference_mode():
        assert torch.equal(sparse_linear(*case), merged_output(case))
    assert_all_same_bits([sparse_linear(*case)], [merged_output(case)])
    assert_gradients_of_the_twin(case, upstream(case))


# Inside torch


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the checks of torch 2.14
@over_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_passes_torchs_own_checks(transposed: bool, dtype: torch.dtype) -> None:
    torch.library.opcheck(floor.linear_op, make(dtype, (2, 3), (4, 30), transposed, shape=(6, 7)))


@over_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ops_of_the_backward_pass_torchs_own_checks(transposed: bool, dtype: torch.dtype) -> None:
    case = make(dtype, (2, 3), (4, 30), transposed, shape=(6, 7))
    values, grad = [v.detach() for v in case.values], upstream(case)
    torch.library.opcheck(floor.input_grad_op, (grad, case.weight, values, case.positions, transposed))
    torch.library.opcheck(floor.values_grad_op, (grad, case.x.detach(), values, case.positions, transposed))


@over_layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_is_asked_for_no_number(transposed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data stand for those of a GPU: to wait for one of their entries is an error."""
    monkeypatch.setattr(floor, "_PRODUCT_BLOCK", 1)
    case = make(dtype, (3, 5), (30, 500), transposed)
    x, weight, bias = (tensor.detach().to("meta") for tensor in case[:3])
    values = [tensor.detach().to("meta").requires_grad_() for tensor in case.values]
    positions = [tensor.to("meta") for tensor in case.positions]
    output = sparse_linear(x.requires_grad_(), weight, bias, values, positions, transposed)
    output.backward(upstream(case).to("meta"))
    assert [tensor.grad.shape for tensor in (x, *values)] == [x.shape, (30,), (500,)]


def test_eager_mode_runs_no_op_of_the_library() -> None:
    case = make()
    with CountedOps() as ops:
        sparse_linear(*case).backward(upstream(case))
    assert ops.counts["aten::mm"]
    assert not [name for name in ops.counts if name.startswith("dowser::")]


@over_layouts
@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.float32, True), (torch.bfloat16, False)])
def test_compiled_it_gives_the_same_bits(transposed: bool, dtype: torch.dtype, dynamic: bool) -> None:
    case = make(dtype, (3, 5), (30, 500), transposed)

    def step(x: Tensor, bias: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return sparse_linear(x * 2, case.weight, bias, [first, second], case.positions, transposed) * 3

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (step, compiled):
        output = function(*inputs(case))
        results.append([output.detach(), *torch.autograd.grad(output, inputs(case), upstream(case))])
    assert_all_same_bits(*results)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over_layouts
def test_checkpointed_it_gives_the_same_bits(reentrant: bool, dtype: torch.dtype, transposed: bool) -> None:
    case = make(dtype, nnz=(100, 500), transposed=transposed, shape=(IN, IN))

    def block(x: Tensor) -> Tensor:
        return sparse_linear(sparse_linear(x, *case[1:]).tanh(), *case[1:])

    results = []
    for output in (block(case.x), checkpoint(block, case.x, use_reentrant=reentrant)):
        for tensor in inputs(case):
            tensor.grad = None
        output.backward(upstream(case))
        results.append([output.detach(), *(tensor.grad for tensor in inputs(case))])
    assert_all_same_bits(*results)


@pytest.mark.slow
def test_the_first_use_warns_of_nothing() -> None:
    script = """
import sys, types, warnings
import torch

warnings.simplefilter("error")
for name in ("peft_dowser", "peft_dowser.layers"):  # alone: the package takes seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1] + name.removeprefix("peft_dowser").replace(".", "/")]
from peft_dowser.layers.linear_op import sparse_linear

for dtype in (torch.float32, torch.bfloat16):
    x, weight = torch.ones(3, 8, dtype=dtype, requires_grad=True), torch.ones(8, 8, dtype=dtype)
    values = [torch.ones(nnz, requires_grad=True) for nnz in (2, 60)]
    positions = [torch.arange(nnz, dtype=torch.int32) for nnz in (2, 60)]
    sparse_linear(x, weight, None, values, positions, False).sum().backward()
    print(values[0].grad.tolist())
"""
    package = str(Path(floor.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script, package], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[3.0, 3.0]\n" * 2), done.stderr
    assert "Warning" not in done.stderr
