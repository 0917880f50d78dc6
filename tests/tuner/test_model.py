"""The tuner as PEFT users know one: inject, save, load, merge, switch, delete; and the promises of exactness."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import get_args

import pytest
import torch
from models import IDS, adapted, assert_same_bits, base_bits, config, logits, set_values, tiny_llama
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import peft_dowser.tuner.injection
from peft_dowser import DeltaFormatError, DowserConfig, probe
from peft_dowser.config import Score
from peft_dowser.layers.layer import dowser_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


# A new adapter


def test_exactly_the_chosen_share_trains() -> None:
    model = get_peft_model(tiny_llama(), config(update_ratio=0.1))
    for layer in dowser_layers(model):
        numel = layer.weight.numel()
        assert layer.dowser_values["default"].weight.numel() == round(0.1 * numel)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == sum(round(0.1 * layer.weight.numel()) for layer in dowser_layers(model))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if ".dowser_values." in name
    }
    assert len(dowser_layers(model)) == 14


def test_the_lowest_scores_train() -> None:
    base = tiny_llama()
    statistics = probe(base, config())
    weights = {name: base.get_submodule(name).weight.detach().clone() for name in statistics.modules}
    model = get_peft_model(base, config())
    for layer in dowser_layers(model):
        found = statistics.modules[layer.module_name]
        score = weights[layer.module_name].abs().double() * (found.sensitivity.T.double() @ found.activity.double())
        positions = layer.dowser_index["default"].positions.long()
        trained = torch.zeros(score.numel(), dtype=torch.bool)
        trained[positions] = True
        assert score.view(-1)[trained].max() <= score.view(-1)[~trained].min() * (1 + 1e-6)


def test_a_new_adapter_changes_nothing() -> None:
    base = tiny_llama()
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, config())), before)


def test_init_weights_false_changes_something() -> None:
    base = tiny_llama()
    before = logits(base)
    assert not torch.equal(logits(get_peft_model(base, config(init_weights=False))), before)


@pytest.mark.filterwarnings("ignore:.*none of its weights is among those selected")
@pytest.mark.parametrize("score", get_args(Score))
@pytest.mark.parametrize("scope", ["matrix", "row", "layer", "model"])
@pytest.mark.parametrize("select", ["low", "high"])
def test_every_score_scope_and_side(score: str, scope: str, select: str) -> None:
    model = get_peft_model(tiny_llama(), config(score=score, scope=scope, select=select, update_ratio=0.25))
    nnz = 0
    numel = sum(p.numel() for name, p in tiny_llama().named_parameters() if "_proj" in name)
    for layer in dowser_layers(model):
        positions = layer.dowser_index["default"].positions
        rows = torch.bincount(positions.long() // layer.in_features, minlength=layer.out_features)
        if scope == "row":
            assert (rows == round(0.25 * layer.in_features)).all()
        if scope == "matrix":
            assert len(positions) == round(0.25 * layer.weight.numel())
        nnz += len(positions)
    assert nnz == round(0.25 * numel)


def test_low_and_high_are_opposite_ends() -> None:
    low = get_peft_model(tiny_llama(), config(score="magnitude", select="low", update_ratio=0.5))
    high = get_peft_model(tiny_llama(), config(score="magnitude", select="high", update_ratio=0.5))
    for one, other in zip(dowser_layers(low), dowser_layers(high), strict=True):
        both = torch.cat([one.dowser_index["default"].positions, other.dowser_index["default"].positions])
        assert torch.equal(both.sort().values.long(), torch.arange(one.weight.numel()))


def test_ratio_pattern_and_last_layers() -> None:
    model = get_peft_model(
        tiny_llama(layers=3), config(ratio_pattern={"q_proj": 0.5, "layers.2.mlp.up_proj": 0}, last_layers=2)
    )
    names = {layer.module_name: layer for layer in dowser_layers(model)}
    assert not any("layers.0." in name for name in names)
    assert "model.layers.2.mlp.up_proj" not in names
    query = names["model.layers.1.self_attn.q_proj"]
    assert query.dowser_values["default"].weight.numel() == query.weight.numel() // 2
    assert len(names) == 13


def test_an_unmatched_ratio_pattern_is_named() -> None:
    with pytest.warns(UserWarning, match=r"ratio_pattern keys did not match any targeted module.*\['nope'\]"):
        get_peft_model(tiny_llama(), config(ratio_pattern={"nope": 0.5}))


def test_modules_without_a_usable_score_stay_frozen_with_one_warning() -> None:
    base = tiny_llama()
    base.model.layers[0].mlp.down_proj.weight.data.zero_()
    base.model.layers[1].mlp.forward = lambda hidden: hidden
    with pytest.warns(UserWarning, match="6 of the target modules stay frozen") as caught:
        model = get_peft_model(base, config())
    message = next(str(w.message) for w in caught if "stay frozen" in str(w.message))
    assert "model.layers.0.mlp.down_proj (all scores are equal)" in message
    assert "model.layers.0.mlp.up_proj (all scores are equal)" in message  # nothing behind it hears it
    assert "model.layers.1.mlp.up_proj (no probe reached it)" in message
    assert len(dowser_layers(model)) == 8


def test_non_finite_scores_stay_frozen() -> None:
    base = tiny_llama()
    base.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("inf")
    with pytest.warns(UserWarning, match=r"layers.1.mlp.down_proj \(scores are not finite\)"):
        get_peft_model(base, config(score="magnitude"))


def test_statistics_are_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "stats.safetensors")
    probe(tiny_llama(), config()).save(path)
    expected = get_peft_model(tiny_llama(), config(update_ratio=0.3))
    monkeypatch.setattr(peft_dowser.tuner.injection, "probe_targets", lambda *args: pytest.fail("probed again"))
    found = get_peft_model(tiny_llama(), config(update_ratio=0.3, statistics=path))
    for one, other in zip(dowser_layers(expected), dowser_layers(found), strict=True):
        assert torch.equal(one.dowser_index["default"].code, other.dowser_index["default"].code)


@pytest.mark.parametrize("score", ["dowser", "random"])
def test_the_defaults_of_the_caller_play_no_part(score: str) -> None:
    expected = dowser_layers(get_peft_model(tiny_llama(), config(score=score)))
    base = tiny_llama()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = dowser_layers(get_peft_model(base, config(score=score)))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dowser_values["default"].weight.dtype == torch.float32
        assert torch.equal(one.dowser_index["default"].code, other.dowser_index["default"].code)


def test_targets_by_list_regex_and_all_linear() -> None:
    def names(**overrides) -> set[str]:
        model = get_peft_model(tiny_llama(), config(score="magnitude", **overrides))
        return {layer.module_name.rpartition(".")[2] for layer in dowser_layers(model)}

    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert names(target_modules=["q_proj", "up_proj"]) == {"q_proj", "up_proj"}
    assert names(target_modules=r".*self_attn\..*") == attention
    assert names(target_modules="all-linear") == attention | {"gate_proj", "up_proj", "down_proj"}
    assert names(target_modules=["q_proj", "up_proj"], exclude_modules=["up_proj"]) == {"q_proj"}


# Errors, before anything changes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target_modules": ["nope"]}, r"Target modules \['nope'\] not found in the base model.*'down_proj'"),
        ({"target_modules": ["norm"]}, "Target module 'model.norm' is a LlamaRMSNorm"),
        ({"last_layers": 3}, "last_layers=3, but 'model.layers' has only 2 layers"),
        ({"update_ratio": 1e-9}, "No weight would train.*selects none of its weights.*larger update_ratio"),
        ({"statistics": "/no/such/file"}, "No probe statistics at '/no/such/file'"),
        ({"probe_images": 0.5}, "probe_images needs the processor of LlamaForCausalLM"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_the_model_untouched(overrides: dict, message: str) -> None:
    base = tiny_llama()
    before, names = base_bits(base), [name for name, _ in base.named_modules()]
    trainable = [p.requires_grad for p in base.parameters()]
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        warnings.simplefilter("ignore")
        get_peft_model(base, config(**overrides))
    assert [name for name, _ in base.named_modules()] == names
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert_same_bits(base_bits(base), before)


def test_targets_that_match_nothing_are_named() -> None:
    with pytest.warns(UserWarning, match=r"target_modules matched nothing and are ignored: \['nope'\]"):
        get_peft_model(tiny_llama(), config(target_modules=["q_proj", "nope"]))


def test_a_base_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        base = tiny_llama()
    with pytest.raises(ValueError, match="meta device"):
        get_peft_model(base, config(score="magnitude"))
    assert not dowser_layers(base)


def test_layers_that_are_not_there_are_named() -> None:
    with pytest.raises(ValueError, match=r"layers_to_transform names layers \[7\], but the model has layers 0 to 1"):
        get_peft_model(tiny_llama(), config(target_modules=["q_proj"], layers_to_transform=[7]))


@pytest.mark.parametrize("target", [["out_proj"], "all-linear"])
@pytest.mark.parametrize("reader", [nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)])
def test_linears_that_torch_does_not_call_are_left_out_with_a_warning(target, reader: nn.Module) -> None:
    model = nn.Sequential()
    model.reader, model.out_proj = reader, nn.Linear(8, 8)
    with pytest.warns(UserWarning, match=r"out_proj'.*\] are left out: .*MultiheadAttention.* may read their weights"):
        adapted = get_peft_model(model, config(target_modules=target, score="random", task_type=None))
    assert [layer.module_name for layer in dowser_layers(adapted)] == ["out_proj"]


def test_a_weight_that_is_not_contiguous_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data = torch.randn(32, 64).T
    with pytest.raises(
        ValueError, match=r"'model.layers.1.mlp.up_proj' is not contiguous in memory.*weight.data = modul"
    ):
        get_peft_model(model, config(score="random"))


def test_a_plain_module_needs_target_modules() -> None:
    with pytest.raises(ValueError, match="Please specify `target_modules` in `peft_config`"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), DowserConfig(score="magnitude"))


def test_a_plain_module_works_with_target_modules() -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    model = get_peft_model(base, DowserConfig(score="magnitude", target_modules=["0", "2"]))
    set_values(model)
    x = torch.randn(3, 8)
    adapted_output = model(x)
    assert torch.equal(model.merge_and_unload()(x), adapted_output)


@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_of_a_base_layer_run(kind: str) -> None:
    model = adapted()
    expected = logits(model)
    layer = dowser_layers(model)[3]
    base, factor = layer.get_base_layer(), 2.0
    x = torch.randn(2, 5, layer.in_features)
    seen = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        seen.append(module)
        return (args[0] * factor,) if output is None else output * factor

    handle = getattr(base, f"register_{kind}_hook")(hook)
    found = layer(x)
    delta = layer.get_delta_weight("default")
    torch.testing.assert_close(found, factor * (x @ base.weight.T) + x @ delta.T)
    assert seen == [base]
    found.sum().backward()
    assert layer.dowser_values["default"].weight.grad.count_nonzero()
    assert not torch.equal(logits(model), expected)
    handle.remove()
    assert torch.equal(logits(model), expected)


# Exactness


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_equals_adapted_and_unmerge_restores_bit_for_bit(dtype: torch.dtype) -> None:
    model = adapted(tiny_llama(dtype))
    before, expected, base = base_bits(model), logits(model), logits(tiny_llama(dtype))
    assert not torch.equal(expected, base)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert not dowser_layers(merged)
    assert torch.equal(logits(merged), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_writes_the_masked_entries_and_nothing_else(dtype: torch.dtype) -> None:
    model = adapted(tiny_llama(dtype))
    before = base_bits(model)
    layers = {layer.module_name: layer for layer in dowser_layers(model)}
    merged = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    for name, tensor in merged.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(tensor, before[name])
            continue
        positions = layer.dowser_index["default"].positions.long()
        expected = before[name].clone().view(-1)
        delta = layer.dowser_values["default"].weight.detach()
        expected[positions] = (expected[positions].double() + delta.double()).to(torch.float32).to(dtype)
        assert torch.equal(tensor.view(-1), expected)


def test_unload_restores_the_base_also_while_merged() -> None:
    for merge_first in (False, True):
        model = adapted(tiny_llama(torch.bfloat16))
        if merge_first:
            model.merge_adapter()
        assert_same_bits(base_bits(model.unload()), base_bits(tiny_llama(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_autocast_gives_what_the_merged_model_gives(dtype: torch.dtype) -> None:
    model = adapted(tiny_llama(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model)
        model.merge_adapter()
        merged = logits(model)
    assert merged.dtype == expected.dtype
    assert torch.equal(merged, expected)


def test_conv1d_is_exact_in_its_own_layout() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64)).eval()
    before = base_bits(base)
    reference = copy.deepcopy(base)
    model = get_peft_model(base, config(scope="row", update_ratio=0.25, target_modules=["c_attn", "c_fc"]))
    layer = dowser_layers(model)[0]
    assert (layer.in_features, layer.out_features) == (32, 96)
    columns = torch.bincount(layer.dowser_index["default"].positions.long() % 96, minlength=96)
    assert (columns == 8).all()  # every output neuron trains a quarter of its inputs
    set_values(model)
    expected = logits(model)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(reference))


def test_safe_merge_refuses_overflow_and_leaves_the_weight() -> None:
    model = adapted(tiny_llama(torch.float16))
    layer = dowser_layers(model)[0]
    before = layer.weight.clone()
    layer.dowser_values["default"].weight.data[3] = 1e6
    message = r"merging would write 1 values that are not finite in torch.float16 into module 'model.layers.0"
    with pytest.raises(ValueError, match=message):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.weight, before)


def test_values_that_vanish_in_a_merge_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(tiny_llama(torch.bfloat16))
    set_values(model, std=1e-6)
    model.merge_adapter()
    (record,) = [r for r in caplog.records if "too small to change a weight" in r.message]
    nnz = sum(layer.dowser_values["default"].weight.numel() for layer in dowser_layers(model))
    assert f"of {nnz} merged values" in record.message


def test_generate_runs_merged_and_restores_the_base() -> None:
    model = adapted(tiny_llama(torch.bfloat16))
    before = base_bits(model)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    seen = []
    handle = dowser_layers(model)[0].register_forward_hook(lambda layer, args, output: seen.append(layer.merged))
    found = model.generate(input_ids=IDS, **options)
    handle.remove()
    assert seen
    assert all(seen)
    assert not any(layer.merged for layer in dowser_layers(model))
    assert_same_bits(base_bits(model), before)
    assert torch.equal(model.merge_and_unload().generate(input_ids=IDS, **options), found)


def test_generate_restores_the_base_after_an_error() -> None:
    model = adapted()
    before = base_bits(model)

    def fail(module, args, output):
        raise KeyboardInterrupt

    model.base_model.model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(input_ids=IDS, max_new_tokens=2)
    assert not any(layer.merged for layer in dowser_layers(model))
    assert_same_bits(base_bits(model), before)


def test_a_backward_after_a_merge_is_refused_by_torch() -> None:
    model = adapted()
    loss = model(input_ids=IDS, labels=IDS).loss
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_after_a_generate_is_right() -> None:
    model = adapted()
    model(input_ids=IDS, labels=IDS).loss.backward()
    expected = [layer.values("default").grad.clone() for layer in dowser_layers(model)]
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    model.generate(input_ids=IDS, max_new_tokens=2)
    loss.backward()
    for layer, grad in zip(dowser_layers(model), expected, strict=True):
        assert torch.equal(layer.values("default").grad, grad)


# Several adapters


def two_adapters(dtype: torch.dtype = torch.float32) -> PeftModel:
    model = get_peft_model(tiny_llama(dtype), config(update_ratio=0.3))
    model.add_adapter("other", config(score="random", update_ratio=0.4, seed=1))
    set_values(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_active_adapters_equal_their_merge_in_order(dtype: torch.dtype) -> None:
    model = two_adapters(dtype)
    before = base_bits(model)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    model.merge_adapter(["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter(["other"])
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)


def test_switch_disable_and_delete() -> None:
    model = two_adapters()
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    values = [name for name, p in model.named_parameters() if p.requires_grad]
    assert values
    assert all(".dowser_values.other." in name for name in values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    assert set(model.peft_config) == {"default"}


def test_a_second_adapter_is_probed_on_the_bare_base() -> None:
    alone = get_peft_model(tiny_llama(), config(seed=3))
    model = adapted()
    model.add_adapter("other", config(seed=3))
    for one, both in zip(dowser_layers(alone), dowser_layers(model), strict=True):
        assert torch.equal(one.dowser_index["default"].code, both.dowser_index["other"].code)


def test_an_adapter_cannot_be_added_while_another_is_merged() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapters \['default'\] are merged.*Call unmerge_adapter"):
        model.add_adapter("other", config())
    assert set(model.peft_config) == {"default"}


def test_the_same_config_object_makes_a_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL makes its reference model so, and then copies every parameter of the one into the other."""
    model = adapted()
    monkeypatch.setattr("peft_dowser.tuner.injection.probe_targets", lambda *args: pytest.fail("probed"))
    model.add_adapter("ref", model.peft_config["default"])
    for layer in dowser_layers(model):
        own, twin = layer.dowser_index["default"], layer.dowser_index["ref"]
        assert torch.equal(own.positions, twin.positions) and torch.equal(own.code, twin.code)
        assert own.positions.data_ptr() != twin.positions.data_ptr()
        assert not layer.dowser_values["ref"].weight.any()  # as LoRA's begins
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    expected = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


# Saving and loading


def reloaded(path: Path, how: str, dtype: torch.dtype) -> nn.Module:
    base = tiny_llama(dtype)
    if how == "low_cpu_mem_usage":
        return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)
    if how == "is_trainable":
        return PeftModel.from_pretrained(base, path, is_trainable=True).eval()
    if how == "transformers":
        base.load_adapter(str(path))
        return base
    if how == "inject":
        stored = DowserConfig.from_pretrained(path)
        state = {
            k.removeprefix("base_model.model."): v for k, v in load_file(path / "adapter_model.safetensors").items()
        }
        stored.nnz_pattern = None
        base = inject_adapter_in_model(stored, base, state_dict=state)
        set_peft_model_state_dict(base, state)
        return base
    if how == "second adapter":
        model = get_peft_model(base, config(score="random"))
        model.load_adapter(path, "loaded")
        model.set_adapter("loaded")
        return model.eval()
    return PeftModel.from_pretrained(base, path)


HOWS = ["from_pretrained", "low_cpu_mem_usage", "is_trainable", "transformers", "inject", "second adapter"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_way_of_loading_restores_the_logits_bit_for_bit(
    how: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(tiny_llama(dtype))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    if how != "second adapter":
        monkeypatch.setattr(peft_dowser.tuner.injection, "probe_targets", lambda *args: pytest.fail("probed on load"))
    assert torch.equal(logits(reloaded(tmp_path, how, dtype)), expected)


def test_auto_classes_load_base_and_adapter_from_folders(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config()).eval()
    set_values(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)


def test_the_saved_files(tmp_path: Path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = dowser_layers(model)[0]
    key = f"base_model.model.{layer.module_name}.dowser_"
    assert torch.equal(tensors[key + "values.weight"], layer.dowser_values["default"].weight)
    assert tensors[key + "index.code"].dtype == torch.uint8
    assert len(tensors) == 2 * len(dowser_layers(model))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["nnz_pattern"][layer.module_name] == layer.dowser_values["default"].weight.numel()
    assert stored["peft_type"] == "DOWSER"


def test_save_dtype_rounds_the_values_in_the_file_only(tmp_path: Path) -> None:
    model = adapted(save_dtype="bfloat16")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    layer = dowser_layers(model)[0]
    saved = tensors[f"base_model.model.{layer.module_name}.dowser_values.weight"]
    assert torch.equal(saved, layer.dowser_values["default"].weight.bfloat16())
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    values = dowser_layers(loaded)[0].dowser_values["default"].weight
    assert values.dtype == torch.float32
    assert torch.equal(values, saved.float())


def test_values_are_float32_unless_autocast_is_off() -> None:
    on = get_peft_model(tiny_llama(torch.bfloat16), config(score="random"))
    off = get_peft_model(tiny_llama(torch.bfloat16), config(score="random"), autocast_adapter_dtype=False)
    assert {p.dtype for p in on.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in off.parameters() if p.requires_grad} == {torch.bfloat16}


def test_modules_to_save_and_bias_come_back(tmp_path: Path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(1.5)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)


@pytest.mark.parametrize("how", ["from_pretrained", "low_cpu_mem_usage", "second adapter"])
@pytest.mark.parametrize("fault", ["other width", "truncated code", "nan", "missing", "extra", "no dowser tensors"])
def test_a_file_that_does_not_fit_is_refused_and_the_model_untouched(fault: str, how: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    values = next(key for key in tensors if key.endswith("dowser_values.weight"))
    code = values.replace("values.weight", "index.code")
    message = {
        "other width": "expected 205 floating-point values",
        "truncated code": r"module 'model\.layers\.0\.[a-z_.]*': the index code of 205 of 2048 positions takes",
        "nan": "values that are not finite",
        "missing": "should have 28 Dowser tensors and has 27",
        "extra": "has 1 Dowser tensors that this adapter does not have: 'base_model.model.nope.dowser_values.weight'",
        "no dowser tensors": "should have 28 Dowser tensors and has none",
    }[fault]
    if fault == "other width":
        tensors[values] = torch.zeros(50)
    elif fault == "truncated code":
        tensors[code] = tensors[code][:-1].clone()
    elif fault == "nan":
        tensors[values][0] = float("nan")
    elif fault == "missing":
        del tensors[values]
    elif fault == "extra":
        tensors["base_model.model.nope.dowser_values.weight"] = torch.zeros(3)
    else:
        tensors = {"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 2)}
    save_file(tensors, path)
    base = tiny_llama()
    trainable = [p.requires_grad for p in base.parameters()]
    names = [name for name, _ in base.named_modules()]
    if how == "second adapter":
        model = get_peft_model(base, config(score="random"))
        before, modules = base_bits(model), [name for name, _ in model.named_modules()]
        with pytest.raises(DeltaFormatError, match=message):
            model.load_adapter(tmp_path, "loaded")
        assert [name for name, _ in model.named_modules()] == modules
        assert set(model.peft_config) == {"default"}
        assert_same_bits(base_bits(model), before)
        return
    with pytest.raises(DeltaFormatError, match=message):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=how == "low_cpu_mem_usage")
    assert [name for name, _ in base.named_modules()] == names
    assert [p.requires_grad for p in base.parameters()] == trainable
    assert_same_bits(base_bits(base), base_bits(tiny_llama()))


@pytest.mark.filterwarnings("ignore:The following target_modules matched nothing")
def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    for other in (tiny_llama(hidden=64), tiny_llama(hidden=16), tiny_llama(layers=1)):
        names = [name for name, _ in other.named_modules()]
        with pytest.raises(DeltaFormatError, match=r"another base model|index code of"):
            PeftModel.from_pretrained(other, tmp_path)
        assert [name for name, _ in other.named_modules()] == names


def test_a_damaged_code_is_refused_by_the_transformers_loader_too(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    code = next(key for key in tensors if key.endswith("code"))
    tensors[code][-1] ^= 0x40
    save_file(tensors, path)
    base = tiny_llama()
    with pytest.raises((DeltaFormatError, RuntimeError), match=r"index code|dowser_index"):
        base.load_adapter(str(tmp_path))
        logits(base)


def test_a_saved_config_without_its_file_says_so(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = get_peft_model(tiny_llama(), DowserConfig.from_pretrained(tmp_path))
    with pytest.raises(DeltaFormatError, match=r"has no values yet.*Load the adapter with from_pretrained"):
        logits(model)


# The model as an object


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_equal_and_independent(copier) -> None:
    model = adapted(tiny_llama(torch.bfloat16))
    expected = logits(model)
    other = copier(model)
    assert torch.equal(logits(other), expected)
    set_values(other, seed=5)
    assert torch.equal(logits(model), expected)


def test_half_keeps_the_positions() -> None:
    model = adapted()
    positions = [layer.dowser_index["default"].positions.clone() for layer in dowser_layers(model)]
    model.half()
    for layer, before in zip(dowser_layers(model), positions, strict=True):
        assert torch.equal(layer.dowser_index["default"].positions, before)
    expected = logits(model)
    assert torch.equal(logits(model.merge_and_unload()), expected)


def test_conversion_while_merged_unmerges_to_the_converted_base() -> None:
    model = adapted()
    model.merge_adapter()
    model.half()
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), base_bits(tiny_llama().half()))


@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
def test_layers_of_another_method_are_refused_before_anything_changes() -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model = lora.base_model.model
    before, modules = logits(model), [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"2 of the target modules .*q_proj' by peft\.tuners\.lora.*Merge that"):
        get_peft_model(model, config(target_modules=["q_proj", "v_proj"], score="random"))
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(logits(model), before)


def test_trained_tokens_are_merged(tmp_path: Path) -> None:
    options = {"trainable_token_indices": [5, 9], "score": "random"}
    model = get_peft_model(tiny_llama(), config(**options)).eval()
    set_values(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(0.1)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected)
