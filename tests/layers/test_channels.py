"""Layers that train input channels: against a dense twin whose gradient is masked to the chosen columns."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import assert_same_bits, base_bits, bits, config, set_values
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import Conv1D

from peft_dowser import DowserLayer

OUT, IN, K = 24, 40, 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

over_dtypes = pytest.mark.parametrize("dtype", DTYPES)
over_kinds = pytest.mark.parametrize("kind", ["linear", "conv1d"])


class Net(nn.Module):
    """One layer that is adapted, between what keeps shapes and gradients alive."""

    def __init__(self, kind: str, dtype: torch.dtype, bias: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(IN, OUT, bias=bias) if kind == "linear" else Conv1D(OUT, IN)
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def made(kind: str = "linear", dtype: torch.dtype = torch.float32, bias: bool = True, **given) -> PeftModel:
    settings = {"granularity": "input_channel", "channels": K, "score": "random", "target_modules": ["layer"]}
    model = get_peft_model(Net(kind, dtype, bias), config(**settings | {"task_type": None} | given))
    set_values(model, std=0.1)
    return model


def layer_of(model: nn.Module) -> DowserLayer:
    return next(module for module in model.modules() if isinstance(module, DowserLayer))


def values_of(model: nn.Module, name: str = "default") -> nn.Parameter:
    return layer_of(model).values(name)


def channels_of(model: nn.Module, name: str = "default") -> list[int]:
    return layer_of(model).index(name).decoded().tolist()


def x_of(dtype: torch.dtype, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*(size or (3, 7)), IN, generator=generator, dtype=torch.float64).to(dtype)


def dense_delta(model: nn.Module, kind: str, names: tuple[str, ...] = ("default",)) -> Tensor:
    """D in the shape of the stored weight and in float64, column by column."""
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    for name in names:
        for place, channel in enumerate(channels_of(model, name)):
            total[:, channel] += values_of(model, name).detach()[:, place].double()
    return total.T if kind == "conv1d" else total


def twin(model: nn.Module, kind: str, dtype: torch.dtype) -> tuple[Net, Tensor]:
    """A dense layer whose weight is a leaf, its gradient masked to the columns that train; and the mask."""
    net = Net(kind, dtype).double()
    net.layer.weight.data += dense_delta(model, kind)
    mask = torch.zeros(OUT, IN, dtype=torch.float64)
    mask[:, channels_of(model)] = 1
    mask = mask.T if kind == "conv1d" else mask
    net.layer.weight.register_hook(lambda gradient: gradient * mask)
    return net, mask


# Output and gradients


@over_dtypes
@over_kinds
@pytest.mark.parametrize("size", [(3, 7), (5,), ()])
def test_outputs_and_gradients_are_those_of_the_twin(kind: str, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    model, tolerance = made(kind, dtype), TOLERANCE[dtype]
    net, mask = twin(model, kind, dtype)
    x = x_of(dtype)[0, 0] if size == () else x_of(dtype, *size)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    output, expected = model(ours), net(theirs)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=10 * tolerance)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    output.backward(upstream.to(dtype))
    expected.backward(upstream.to(dtype).double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=30 * tolerance)
    gradient = values_of(model).grad
    whole = net.layer.weight.grad.T if kind == "conv1d" else net.layer.weight.grad
    assert gradient.dtype == torch.float32 and gradient.shape == (OUT, K)
    tolerance = max(tolerance, 1e-6)  # the gradient is in float32
    torch.testing.assert_close(gradient.double(), whole[:, channels_of(model)], rtol=tolerance, atol=30 * tolerance)
    assert not bool((net.layer.weight.grad * (1 - mask)).any())
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert trained == ["base_model.model.layer.dowser_values.default.weight"]


@over_kinds
def test_the_output_is_that_of_lora_with_a_one_hot_a(kind: str) -> None:
    """y + (x A^T) B^T, in the order and with the products of a LoRA layer: bit for bit."""
    for dtype in (torch.float32, torch.float64):
        model, x = made(kind, dtype), x_of(dtype)
        first = torch.zeros(K, IN, dtype=dtype)
        first[range(K), channels_of(model)] = 1
        expected = Net(kind, dtype)(x) + (x @ first.T) @ values_of(model).detach().to(dtype).T
        assert torch.equal(bits(model(x)), bits(expected))


def test_gradients_pass_gradcheck() -> None:
    model = made(dtype=torch.float64)
    values_of(model).data = values_of(model).data.double()
    x = x_of(torch.float64, 2).requires_grad_()

    def run(x: Tensor, values: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"base_model.model.layer.dowser_values.default.weight": values}, (x,))

    given = (x, values_of(model).detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(run, given)


@over_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_twin_and_frozen_columns_keep_their_bits(kind: str, dtype: torch.dtype) -> None:
    """With momentum, which would move a frozen column whose gradient is not exactly 0."""
    model = made(kind, dtype)
    values_of(model).data.zero_()
    net, _ = twin(model, kind, dtype)
    before = base_bits(model)
    ours = torch.optim.SGD([values_of(model)], lr=0.1, momentum=0.9)
    theirs = torch.optim.SGD([net.layer.weight], lr=0.1, momentum=0.9)
    for step in range(4):
        x = x_of(dtype, 4) + step / 8
        for network, optimizer, given in ((model, ours, x), (net, theirs, x.double())):
            optimizer.zero_grad()
            network(given).square().mean().backward()
            optimizer.step()
    assert_same_bits(base_bits(model), before)
    moved = (net.layer.weight - Net(kind, dtype).layer.weight.double()).detach()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(dense_delta(model, kind), moved, rtol=10 * tolerance, atol=tolerance)
    assert float(moved.abs().max()) > 1e-2
    merged = model.merge_and_unload().layer.weight
    changed = (bits(merged).view(*merged.shape, -1) != bits(before["layer.weight"]).view(*merged.shape, -1)).any(-1)
    columns = changed.any(1 if kind == "conv1d" else 0)
    assert columns.nonzero().view(-1).tolist() == channels_of(made(kind, dtype))


# Merge


@over_dtypes
@over_kinds
def test_a_merge_writes_the_rounded_sum_into_the_columns_and_takes_it_back(kind: str, dtype: torch.dtype) -> None:
    model = made(kind, dtype)
    before = base_bits(model)
    x, unmerged = x_of(dtype), model(x_of(dtype))
    model.merge_adapter()
    wide = torch.promote_types(dtype, torch.float32)
    base = Net(kind, dtype).layer.weight.detach()
    expected = (base.to(wide) + dense_delta(model, kind).to(wide)).to(dtype)
    untouched = dense_delta(model, kind) == 0
    assert torch.equal(bits(layer_of(model).weight[untouched]), bits(base[untouched]))
    assert torch.equal(layer_of(model).weight, expected)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(model(x), unmerged, rtol=tolerance, atol=10 * tolerance)
    originals = layer_of(model).index("default").originals
    assert torch.equal(originals.reshape(-1), base.view(-1)[layer_of(model).delta("default")[0]])
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    assert torch.equal(bits(model(x)), bits(unmerged))


@over_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlapping_adapters_merge_in_turn_and_unmerge_to_the_bits_of_the_base(kind: str, dtype: torch.dtype) -> None:
    """Channels over single weights over channels, on one layer."""
    model = made(kind, dtype)
    model.add_adapter("single", config(score="random", update_ratio=0.4, target_modules=["layer"], task_type=None))
    other = {"granularity": "input_channel", "channels": 20, "seed": 4, "score": "random", "target_modules": ["layer"]}
    model.add_adapter("wide", config(**other, task_type=None))
    set_values(model, std=0.3)
    assert set(channels_of(model, "wide")) & set(channels_of(model))
    before, x = base_bits(model), x_of(dtype)
    model.base_model.set_adapter(["default", "single", "wide"])
    unmerged, total = model(x), Net(kind, dtype).layer.weight.detach()
    wide = torch.promote_types(dtype, torch.float32)
    for name in ("default", "single", "wide"):
        delta = torch.zeros(total.numel(), dtype=wide)
        if name == "single":
            delta[layer_of(model).index(name).decoded().long()] = values_of(model, name).detach()
            delta = delta.view(total.shape)
        else:
            delta = dense_delta(model, kind, (name,)).to(wide)
        total = (total.to(wide) + delta).to(dtype)
    model.merge_adapter()
    assert torch.equal(layer_of(model).weight, total)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(model(x), unmerged, rtol=tolerance, atol=10 * tolerance)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    assert torch.equal(bits(model(x)), bits(unmerged))


@over_kinds
def test_a_safe_merge_refuses_sums_that_are_not_finite(kind: str) -> None:
    model = made(kind, torch.float16)
    before = base_bits(model)
    values_of(model).data[3, 2] = 1e5
    with pytest.raises(
        ValueError, match="Adapter 'default': merging would write 1 values that are not finite in torch"
    ):
        model.merge_adapter(safe_merge=True)
    assert_same_bits(base_bits(model), before)


@over_kinds
def test_disabled_deleted_and_unloaded_adapters_leave_the_base(kind: str) -> None:
    model, x = made(kind), x_of(torch.float32)
    expected = Net(kind, torch.float32)(x)
    with model.disable_adapter():
        assert torch.equal(bits(model(x)), bits(expected))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(bits(model(x)), bits(expected))
    model.merge_adapter()
    base = model.unload()
    assert torch.equal(bits(base(x)), bits(expected)) and type(base.layer) is type(Net(kind, torch.float32).layer)


@over_kinds
def test_the_scale_multiplies_the_delta_in_forward_and_merge(kind: str) -> None:
    model, x = made(kind, torch.float64), x_of(torch.float64)
    model.base_model.set_scale("default", -2.5)
    weight = Net(kind, torch.float64).layer.weight.detach() - 2.5 * dense_delta(model, kind)
    expected = x @ (weight if kind == "conv1d" else weight.T) + Net(kind, torch.float64).layer.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer_of(model).get_delta_weight("default").double(), -2.5 * dense_delta(model, kind))
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_a_scale_of_one_half_is_differentiated_too() -> None:
    model, x = made(dtype=torch.float64), x_of(torch.float64)
    model(x).sum().backward()
    whole = values_of(model).grad.clone()
    values_of(model).grad = None
    model.base_model.set_scale("default", 0.5)
    model(x).sum().backward()
    torch.testing.assert_close(values_of(model).grad, whole / 2)


# What a step keeps, and how it is run


def kept_by(run: Callable[[], object], model: nn.Module) -> list[Tensor]:
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in owned:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return list(kept.values())


@over_kinds
@pytest.mark.parametrize("needs_grad", [False, True])
def test_only_the_chosen_channels_of_the_input_are_kept(kind: str, needs_grad: bool) -> None:
    model, x = made(kind), x_of(torch.float32).requires_grad_(needs_grad)
    kept = kept_by(lambda: model(x), model)
    assert [tuple(tensor.shape) for tensor in kept] in ([(3, 7, K)], [(21, K)])


def test_hooks_of_the_base_layer_run() -> None:
    model, x, calls = made(), x_of(torch.float32), []
    base = layer_of(model).get_base_layer()
    base.register_forward_pre_hook(lambda module, args: calls.append("before"))
    base.register_forward_hook(lambda module, args, output: output + 1)
    expected = made()(x) + 1
    torch.testing.assert_close(model(x), expected)
    assert calls == ["before"]


@over_kinds
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_have_the_same_bits(kind: str, use_reentrant: bool) -> None:
    model, x = made(kind), x_of(torch.float32).requires_grad_()
    model(x).square().sum().backward()
    expected = values_of(model).grad.clone()
    values_of(model).grad = None
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    assert torch.equal(bits(values_of(model).grad), bits(expected))


@over_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_both_products_are_in_its_dtype(kind: str, dtype: torch.dtype) -> None:
    model, x = made(kind), x_of(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        output = model(x)
        base = Net(kind, torch.float32)(x)
        expected = base + nn.functional.linear(x[..., channels_of(model)], values_of(model))
    assert output.dtype == base.dtype
    assert torch.equal(bits(output), bits(expected.to(base.dtype)))
    output.float().sum().backward()
    assert values_of(model).grad.dtype == torch.float32 and bool(values_of(model).grad.any())


@over_kinds
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiled_without_graph_breaks(kind: str, backend: str) -> None:
    model, x = made(kind), x_of(torch.float32)
    model(x).square().sum().backward()
    output, expected = model(x), values_of(model).grad.clone()
    values_of(model).grad = None
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found = compiled(x)
    torch.testing.assert_close(found, output)
    found.square().sum().backward()
    torch.testing.assert_close(values_of(model).grad, expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it loads its compiler
def test_compiled_by_inductor() -> None:
    model, x = made(), x_of(torch.float32)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_values_are_cast_with_the_model_and_random_ones_have_the_size_of_the_weights() -> None:
    model = made("linear", torch.bfloat16, init_weights=False)
    model = get_peft_model(
        Net("linear", torch.float32),
        config(granularity="input_channel", channels=20, score="random", target_modules=["layer"], task_type=None,
               init_weights=False),
    )  # fmt: skip
    assert values_of(model).std().item() == pytest.approx(
        Net("linear", torch.float32).layer.weight.std().item(), rel=0.1
    )
    model.to(torch.float64)
    assert values_of(model).dtype == torch.float64
    assert model(x_of(torch.float64)).dtype == torch.float64


def test_a_copy_is_of_its_own() -> None:
    model, x = made(), x_of(torch.float32)
    copied, expected = copy.deepcopy(model), model(x)
    values_of(copied).data.add_(1)
    assert torch.equal(bits(model(x)), bits(expected))
    assert not torch.equal(copied(x), expected)


# Files


@over_dtypes
@over_kinds
@pytest.mark.parametrize("save_dtype", [None, "bfloat16"])
def test_a_reload_has_the_same_bits(kind: str, dtype: torch.dtype, save_dtype: str | None, tmp_path: Path) -> None:
    model, x = made(kind, dtype, save_dtype=save_dtype), x_of(dtype)
    if save_dtype is not None:
        values_of(model).data = values_of(model).data.bfloat16().float()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(Net(kind, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert channels_of(again) == channels_of(model)
        assert torch.equal(bits(values_of(again)), bits(values_of(model)))
        assert torch.equal(bits(again(x)), bits(model(x)))
        again.save_pretrained(tmp_path / "again")
        files = [folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "again")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_state_dict_goes_into_a_model_with_other_channels() -> None:
    model, other, x = made(), made(seed=7), x_of(torch.float32)
    assert channels_of(model) != channels_of(other)
    other.load_state_dict(model.state_dict())
    assert channels_of(other) == channels_of(model)
    assert torch.equal(bits(other(x)), bits(model(x)))


def test_positions_that_were_written_in_place_are_refused() -> None:
    model = made()
    layer_of(model).index("default").positions.add_(1)
    with pytest.raises(ValueError, match="positions of an adapter were written in place"):
        model(x_of(torch.float32))


def test_linears_that_share_a_weight_train_the_same_channels() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).double()
    base[2].weight = base[0].weight
    plain = copy.deepcopy(base)
    settings = {"granularity": "input_channel", "channels": 3, "score": "random", "target_modules": ["0"]}
    model = get_peft_model(base, config(**settings, ensure_weight_tying=True, task_type=None))
    set_values(model)
    weight = plain[0].weight.detach().clone()
    for place, channel in enumerate(channels_of(model)):
        weight[:, channel] += values_of(model).detach()[:, place].double()
    plain[0].weight.data.copy_(weight)
    assert plain[2].weight is plain[0].weight
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    expected = plain[0].weight.grad[:, channels_of(model)]
    torch.testing.assert_close(values_of(model).grad.double(), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(model(x), plain(x))
