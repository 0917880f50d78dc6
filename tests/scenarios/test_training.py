"""Training the sparse values: against a dense twin, under autocast, checkpointing and torch.compile."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import config, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from peft_dowser import DowserLayer
from peft_dowser.layers import state

BATCH = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(0))


def values_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in values_of(model).items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twenty_adamw_steps_equal_those_of_a_dense_twin_with_a_masked_gradient(dtype: torch.dtype) -> None:
    base = tiny_llama(dtype)
    twin = copy.deepcopy(base).requires_grad_(False)
    model = get_peft_model(base, config(update_ratio=0.2)).to(dtype)
    masks = {}
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            weight = twin.get_submodule(layer.module_name).weight.requires_grad_(True)
            mask = torch.zeros(weight.numel(), dtype=dtype)
            mask[layer.dowser_index["default"].positions.long()] = 1
            masks[layer.module_name] = mask.view_as(weight)
            weight.register_hook(lambda grad, mask=masks[layer.module_name]: grad * mask)
    start = copy.deepcopy(twin.state_dict())
    ours = torch.optim.AdamW(values_of(model).values(), lr=1e-2, weight_decay=0)
    dense = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for step in range(20):
        batch = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        for network, optimizer in ((model, ours), (twin, dense)):
            optimizer.zero_grad()
            network(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for name, tensor in model.merge_and_unload().state_dict().items():
        mask = masks.get(name.removesuffix(".weight"), torch.zeros(1)).bool().expand_as(tensor)
        assert torch.equal(tensor[~mask], start[name][~mask])
        assert torch.equal(twin.state_dict()[name][~mask], start[name][~mask])
        torch.testing.assert_close(tensor[mask], twin.state_dict()[name][mask], rtol=0, atol=tolerance)
        assert not mask.any() or not torch.equal(tensor[mask], start[name][mask])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_those_of_the_dense_weight(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_llama(dtype), config(update_ratio=0.3))
    set_values(model)
    found = gradients(model)
    positions = {
        layer.module_name: layer.dowser_index["default"].positions.long()
        for layer in model.modules()
        if isinstance(layer, DowserLayer)
    }
    dense = model.merge_and_unload().requires_grad_(True)
    dense(input_ids=BATCH, labels=BATCH).loss.backward()
    for name, at in positions.items():
        expected = dense.get_submodule(name).weight.grad.view(-1)[at].float()
        grad = found[f"base_model.model.{name}.dowser_values.default.weight"]
        assert grad.dtype == torch.float32
        if dtype == torch.bfloat16:
            assert torch.equal(grad, expected)
        else:  # the sampled product sums in another order, and in float32
            torch.testing.assert_close(grad, expected, rtol=1e-4 if dtype == torch.float32 else 1e-3, atol=1e-7)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_gradient(reentrant: bool, dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_llama(dtype), config())
    set_values(model)
    model.train()
    expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        found = gradients(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(grad.abs().sum() > 0 for grad in found.values())


def test_autocast_trains_float32_values() -> None:
    model = get_peft_model(tiny_llama(), config())
    set_values(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=BATCH, labels=BATCH).loss
    loss.backward()
    for parameter in values_of(model).values():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_a_float16_base_trains_with_a_gradient_scaler() -> None:
    model = get_peft_model(tiny_llama(torch.float16), config(score="random"))
    before = {name: parameter.detach().clone() for name, parameter in values_of(model).items()}
    optimizer, scaler = torch.optim.AdamW(values_of(model).values(), lr=1e-3), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(input_ids=BATCH, labels=BATCH).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # refuses gradients in float16
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in values_of(model).items():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name])


def test_two_active_adapters_both_get_their_gradient() -> None:
    model = get_peft_model(tiny_llama(torch.float64), config(update_ratio=0.3)).double()
    model.add_adapter("other", config(score="random", update_ratio=0.3))
    model.double()
    set_values(model)
    model.base_model.set_adapter(["default", "other"])
    found = gradients(model)
    dense = copy.deepcopy(model)
    for layer in dense.modules():
        if isinstance(layer, DowserLayer):
            layer.merge(adapter_names=["default", "other"])
            layer.base_layer.weight.requires_grad_(True)
    dense(input_ids=BATCH, labels=BATCH).loss.backward()
    for name, layer in dense.named_modules():
        if isinstance(layer, DowserLayer):
            for adapter in ("default", "other"):
                at = layer.dowser_index[adapter].positions.long()
                expected = layer.base_layer.weight.grad.view(-1)[at]
                torch.testing.assert_close(found[f"{name}.dowser_values.{adapter}.weight"], expected)


def test_bias_trains_when_asked_and_comes_out_of_the_op() -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    model = get_peft_model(
        base, config(score="magnitude", target_modules=["0", "2"], bias="dowser_only", task_type=None)
    )
    model.double()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    twin = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    with torch.no_grad():
        for index in (0, 2):
            twin[index].weight.copy_(base[index].base_layer.weight)
            twin[index].bias.copy_(base[index].base_layer.bias)
    twin(x).square().sum().backward()
    for index in (0, 2):
        torch.testing.assert_close(base[index].base_layer.bias.grad, twin[index].bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_without_graph_breaks(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_llama(dtype), config())
    set_values(model)
    loss = model(input_ids=BATCH, labels=BATCH).loss
    expected = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    found = compiled(input_ids=BATCH, labels=BATCH, use_cache=False).loss
    torch.testing.assert_close(found, loss)
    found.backward()
    for name, parameter in values_of(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=2e-2, atol=1e-4)


def test_new_values_and_positions_compile_nothing_again() -> None:
    model, other = (get_peft_model(tiny_llama(), config(score="random", seed=seed)) for seed in (0, 1))
    optimizer = torch.optim.AdamW(values_of(model).values(), lr=0.1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend=counter)

    def loss() -> torch.Tensor:
        return compiled(input_ids=BATCH, labels=BATCH, use_cache=False).loss

    losses = []
    for _ in range(3):
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    set_values(other)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(loss(), other(input_ids=BATCH, labels=BATCH).loss)
    assert counter.frame_count == 1
    assert losses[0] > losses[1] > losses[2]


def test_biases_of_what_is_compiled_are_saved_too(tmp_path: Path) -> None:
    options = {"target_modules": ["0.0"], "bias": "dowser_only", "score": "random", "task_type": None}
    model = get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 8)), nn.Linear(8, 3)), config(**options))
    inner = model.base_model.model
    inner[0][0].bias.data.fill_(2.0)
    inner[0] = torch.compile(inner[0], backend="eager")
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(found["base_model.model.0.0.base_layer.bias"], torch.full((8,), 2.0))


def test_exported_it_gives_the_same_bits() -> None:
    model = get_peft_model(tiny_llama(), config())
    set_values(model)
    inputs = {"input_ids": BATCH, "use_cache": False}
    with torch.no_grad():
        exported = torch.export.export(model.base_model.model, (), inputs)
        assert torch.equal(exported.module()(**inputs).logits, model(**inputs).logits)
    assert sum(node.target is torch.ops.dowser.linear.default for node in exported.graph.nodes) == 14


def test_weight_decay_pulls_to_the_base_and_leaves_frozen_weights() -> None:
    model = get_peft_model(tiny_llama(), config())
    set_values(model)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    norms = {name: p.norm().item() for name, p in values_of(model).items()}
    for parameter in values_of(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(p.norm() < norms[name] for name, p in values_of(model).items())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_gradient_and_optimizer_state_grow_with_nnz_only() -> None:
    model = get_peft_model(tiny_llama(hidden=64), config(update_ratio=0.05))
    optimizer = torch.optim.AdamW(values_of(model).values())
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    optimizer.step()
    nnz, _ = model.get_nb_trainable_parameters()
    state = sum(t.numel() for entry in optimizer.state.values() for t in entry.values() if t.dim())
    assert state == 2 * nnz
    assert sum(p.grad.numel() for p in model.parameters() if p.grad is not None) == nnz


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}])
def test_fused_and_foreach_optimizers_train_the_values(options: dict) -> None:
    plain, other = (get_peft_model(tiny_llama(), config()) for _ in range(2))
    for model, kind in ((plain, {}), (other, options)):
        optimizer = torch.optim.AdamW(values_of(model).values(), lr=1e-2, **kind)
        for _ in range(3):
            model(input_ids=BATCH, labels=BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, values in values_of(plain).items():
        torch.testing.assert_close(values_of(other)[name], values)


@pytest.mark.quantized
def test_the_8_bit_optimizer_trains_the_values() -> None:
    optim = pytest.importorskip("bitsandbytes").optim
    model = get_peft_model(tiny_llama(hidden=128), config())
    optimizer = optim.AdamW8bit(values_of(model).values(), lr=1e-2, min_8bit_size=1)
    losses = []
    for _ in range(5):
        loss = model(input_ids=BATCH, labels=BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert {state["state1"].dtype for state in optimizer.state.values()} == {torch.uint8}


def cast_to_bfloat16(model: nn.Module) -> None:
    model.to(torch.bfloat16)  # as DeepSpeed does


def under_autocast(model: nn.Module) -> None:
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # type: ignore[method-assign]


@pytest.mark.parametrize(("change", "said"), [(cast_to_bfloat16, 1), (under_autocast, 0)])
def test_values_that_something_rounds_are_announced_once(
    change: Callable[[nn.Module], None], said: int, caplog: pytest.LogCaptureFixture
) -> None:
    state._report_narrow.cache_clear()
    model = get_peft_model(tiny_llama(torch.bfloat16), config())
    change(model)
    with torch.no_grad():
        model(input_ids=BATCH)
    assert not caplog.records
    for _ in range(2):
        model(input_ids=BATCH, labels=BATCH).loss.backward()
    assert len(caplog.records) == said
    if said:
        assert "Adapter 'default' computes with values in bfloat16" in caplog.text
        assert "save_dtype='bfloat16'" in caplog.text


def test_bfloat16_values_are_announced(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny_llama(torch.bfloat16), config(), autocast_adapter_dtype=False)
    assert {values.dtype for values in values_of(model).values()} == {torch.bfloat16}
    assert "Adapter 'default' trains in torch.bfloat16" in caplog.text
    caplog.clear()
    state._report_narrow.cache_clear()
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    assert not caplog.records
    get_peft_model(tiny_llama(torch.bfloat16), config())
    get_peft_model(tiny_llama(), config(), autocast_adapter_dtype=False)
    assert "trains in" not in caplog.text


def test_an_average_of_models_is_the_model_with_averaged_values() -> None:
    model = get_peft_model(tiny_llama(), config(score="random"))
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.5))
    for seed in (1, 2):
        set_values(model, seed=seed)
        average.update_parameters(model)
    first, second = (get_peft_model(tiny_llama(), config(score="random")) for _ in range(2))
    set_values(first, seed=1)
    set_values(second, seed=2)
    for mine, other in zip(values_of(first).values(), values_of(second).values(), strict=True):
        mine.data.lerp_(other, 0.5)
    torch.testing.assert_close(average(input_ids=BATCH).logits, first(input_ids=BATCH).logits)


def test_positions_that_something_has_written_into_are_refused(tmp_path: Path) -> None:
    model, other = (get_peft_model(tiny_llama(), config(score="random", seed=seed)) for seed in (0, 1))
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)  # integers, rounded down each time
    same, loaded = copy.deepcopy(model), copy.deepcopy(model)
    for target, source in ((same, model), (loaded, other)):
        for key, tensor in target.state_dict().items():
            tensor.copy_(source.state_dict()[key])
    assert torch.equal(same(input_ids=BATCH).logits, model(input_ids=BATCH).logits)
    for wrong in (average.module, loaded):
        with pytest.raises(ValueError, match="positions of an adapter were written in place"):
            wrong(input_ids=BATCH)
        with pytest.raises(ValueError, match="positions of an adapter were written in place"):
            wrong.save_pretrained(tmp_path)
