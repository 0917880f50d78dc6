"""What a step asks of the host of a GPU, counted without one: kernels to launch, and numbers to wait for.

Tensors without data stand for those of a GPU: they take its way through the code, and to wait for one of their entries
is an error.
"""

from functools import partial

import pytest
import torch
from models import CountedOps
from torch import Tensor

from peft_dowser.base.fused import Product
from peft_dowser.layers.experts_op import sparse_experts
from peft_dowser.layers.linear_op import Weight, sparse_linear

# The linears of a layer of Llama-7B, which has 32 such layers: shape, and how many there are.
LLAMA_7B = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16, trains: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trains)


def delta_of(numel: int) -> tuple[Tensor, Tensor]:
    """Values and positions of a tenth of the weights."""
    count = numel // 10
    return on_meta(count, dtype=torch.float32, trains=True), on_meta(count, dtype=torch.int32)


def launches_of_a_layer(dtype: torch.dtype, dequantized: bool = False) -> tuple[int, int]:
    """Kernels of forward and backward of the adapted linears of one layer of Llama-7B."""
    forward = backward = 0
    for (out, width), count in LLAMA_7B.items():
        compute = partial(on_meta, out, width, dtype=dtype)
        weight: Weight = compute if dequantized else compute()
        values, positions = delta_of(out * width)
        x = on_meta(1, 4096, width, dtype=dtype, trains=True)
        with CountedOps() as ops:
            output = sparse_linear(x, weight, None, [values], [positions], False)
        forward += count * ops.launches.total()
        with CountedOps() as ops:
            output.backward(torch.empty_like(output))
        backward += count * ops.launches.total()
        assert (x.grad.shape, values.grad.shape) == (x.shape, values.shape)
    return forward, backward


@pytest.mark.parametrize("dequantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_of_seven_billion_weights_launches_at_most_6000_kernels(dtype: torch.dtype, dequantized: bool) -> None:
    forward, backward = launches_of_a_layer(dtype, dequantized)
    assert 32 * (2 * forward + backward) <= 6000  # checkpointed


def test_what_one_linear_launches() -> None:
    """A copy, four kernels for the sum, the product; in the backward these again, and the gradient of the values."""
    values, positions = delta_of(64 * 64)
    x = on_meta(2, 8, 64, trains=True)
    forming = {"aten::copy_": 1, "aten::_to_copy": 1, "aten::index_select": 1, "aten::add": 1, "aten::scatter_": 1}
    with CountedOps() as ops:
        output = sparse_linear(x, on_meta(64, 64), None, [values], [positions], False)
    assert ops.launches == forming | {"aten::mm": 1}
    with CountedOps() as ops:
        output.backward(torch.empty_like(output))
    assert ops.launches == forming | {"aten::mm": 2, "aten::index_select": 2, "aten::_to_copy": 2}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts", [8, 128])
def test_grouped_experts_wait_for_nothing_and_launch_as_much_however_many_there_are(
    experts: int, transposed: bool
) -> None:
    weight = on_meta(experts, *((32, 64) if transposed else (64, 32)))
    values, positions = delta_of(weight.numel())
    x, ends = on_meta(512, 32, trains=True), on_meta(experts, dtype=torch.int32)
    product = Product(x, "grouped_mm", transposed, 64, ends=ends)
    with CountedOps() as ops:
        output = sparse_experts(product, weight, [values], [positions])
        output.backward(torch.empty_like(output))
    assert (x.grad.shape, values.grad.shape) == (x.shape, values.shape)
    assert ops.launches["aten::_grouped_mm"] == 3
    assert ops.launches.total() == 15
    assert not [name for name in ops.counts if name.startswith("dowser::")]
