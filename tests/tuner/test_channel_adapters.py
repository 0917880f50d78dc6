"""Adapters that train input channels in a whole model: next to others, combined, switched, loaded and refused."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_files import FILE, Before
from models import (
    IDS,
    adapted,
    assert_same_bits,
    base_bits,
    config,
    edit_config,
    edit_tensors,
    gpt2,
    logits,
    saved,
    set_values,
    tiny_llama,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_dowser import DeltaFormatError, DowserConfig, Patch, diff, hotswap, inspect, verify
from peft_dowser.layers.layer import DowserLayer, dowser_layers

pytestmark = pytest.mark.filterwarnings("ignore:Already", "ignore:All adapters", "ignore:Adapter")

CHANNELS = {"granularity": "input_channel", "channels": 4}
P = "base_model.model."
BASES: list[Callable[..., PreTrainedModel]] = [tiny_llama, gpt2]
over_bases = pytest.mark.parametrize("base", BASES, ids=["llama", "gpt2"])


def dense(layer: DowserLayer, name: str) -> Tensor:
    """The delta of an adapter in float64 and the shape of the stored weight, from its values and positions alone."""
    total = torch.zeros(layer.target.shape, dtype=torch.float64)
    if name not in layer.dowser_values:
        return total
    values, positions = layer.values(name).detach().double(), layer.index(name).decoded().tolist()
    if values.dim() == 1:
        total.view(-1)[positions] = values
        return total
    is_transposed = type(layer.get_base_layer()).__name__ == "Conv1D"
    for place, channel in enumerate(positions):
        (total.T if is_transposed else total)[:, channel] = values[:, place]
    return total


def by_hand(base: PreTrainedModel, deltas: dict[str, Tensor], ids: Tensor = IDS) -> Tensor:
    """What the base gives with these deltas added to its weights, in float64."""
    base = base.double()
    for name, delta in deltas.items():
        base.get_submodule(name).weight.data += delta
    return logits(base, ids)


def deltas_of(model: nn.Module, *names: str, factors: tuple[float, ...] = ()) -> dict[str, Tensor]:
    factors = factors or (1.0,) * len(names)
    terms = list(zip(names, factors, strict=True))
    return {
        layer.module_name: sum((factor * dense(layer, name) for name, factor in terms), torch.zeros(()))
        for layer in dowser_layers(model)
    }


def three(base: PreTrainedModel) -> PeftModel:
    """Adapters "default" and "wide" of channels, and "single" of single weights."""
    targets = ["c_attn", "c_proj"] if type(base).__name__.startswith("GPT2") else ["q_proj", "down_proj"]
    model = get_peft_model(base, config(score="random", target_modules=targets, **CHANNELS)).eval()
    model.add_adapter("single", config(score="random", update_ratio=0.3, target_modules=targets))
    wide = {"granularity": "input_channel", "update_ratio": 0.5, "seed": 3}
    model.add_adapter("wide", config(score="random", **wide))
    set_values(model, std=0.1)
    return model


# Several adapters


@over_bases
@pytest.mark.parametrize("active", [["default"], ["single"], ["default", "single", "wide"], ["wide", "default"]])
def test_active_adapters_add_up(base, active: list[str]) -> None:
    model = three(base().double())
    model.base_model.set_adapter(active)
    expected = by_hand(base(), deltas_of(model, *active))
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    before = base_bits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-6, atol=1e-6)


@over_bases
def test_a_batch_may_mix_them(base) -> None:
    model = three(base().double())
    names = ["wide", "__base__", "single", "default", "wide"]
    ids = torch.randint(3, 64, (5, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        deltas = {} if name == "__base__" else deltas_of(model, name)
        expected = by_hand(base(), deltas, ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-6, atol=1e-6)


@over_bases
@pytest.mark.parametrize(
    ("sources", "granularity"), [(["default", "wide"], "input_channel"), (["default", "single"], "weight"),
                                 (["single", "wide"], "weight"), (["default"], "input_channel")],
)  # fmt: skip
def test_a_weighted_combination_is_the_sum_and_survives_a_file(
    base, sources: list[str], granularity: str, tmp_path: Path
) -> None:
    model = three(base().double())
    weights = (0.5, -2.0)[: len(sources)]
    expected = by_hand(base(), deltas_of(model, *sources, factors=weights))
    model.add_weighted_adapter(sources, weights, "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    made = model.peft_config["sum"]
    assert (made.granularity, made.channels) == (granularity, None)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base().double(), tmp_path / "sum").eval()
    assert torch.equal(logits(again), logits(model))
    if granularity == "input_channel":
        for layer in dowser_layers(model):
            if not any(name in layer.dowser_values for name in sources):
                continue
            union = {c for name in sources if name in layer.dowser_values for c in layer.index(name).decoded().tolist()}
            assert layer.index("sum").decoded().tolist() == sorted(union)


@pytest.mark.parametrize("how", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_pruned_combinations_of_channels_are_those_of_the_dense_deltas(how: str) -> None:
    """What is pruned inside a channel that stays becomes a zero."""
    model = three(tiny_llama().double())
    model.add_weighted_adapter(["default", "wide"], [1.0, 0.7], "mix", combination_type=how, density=0.3)
    sources, mixed = deltas_of(model, "default", "wide"), deltas_of(model, "mix")
    assert any(bool(delta.any()) for delta in mixed.values())
    for module, delta in mixed.items():
        assert not bool(delta[sources[module] == 0].any())
    found = logits_with(model, "mix")
    torch.testing.assert_close(found, by_hand(tiny_llama(), mixed), rtol=1e-6, atol=1e-6)
    if how == "magnitude_prune":
        for layer in dowser_layers(model):
            expected = torch.zeros(layer.target.shape, dtype=torch.float64)
            for name, weight in (("default", 1.0), ("wide", 0.7)):
                delta = dense(layer, name)
                kept = round(0.3 * int(layer.values(name).numel())) if name in layer.dowser_values else 0
                largest = delta.abs().view(-1).topk(kept).indices
                expected.view(-1)[largest] += weight * delta.view(-1)[largest]
            torch.testing.assert_close(mixed[layer.module_name], expected, rtol=1e-6, atol=1e-7)


def logits_with(model: PeftModel, name: str) -> Tensor:
    model.set_adapter(name)
    return logits(model)


def test_one_config_makes_twins() -> None:
    given = config(score="random", **CHANNELS)
    model = get_peft_model(tiny_llama(), given)
    model.add_adapter("ref", given)
    for layer in dowser_layers(model):
        assert torch.equal(layer.index("ref").decoded(), layer.index("default").decoded())
        assert layer.values("ref").shape == layer.values("default").shape
    given.channels = 6
    model.add_adapter("other", given)
    assert all(layer.index("other").count == 6 for layer in dowser_layers(model))


@over_bases
def test_generate_is_that_of_the_merged_model_and_restores_the_base(base) -> None:
    model = adapted(base().double(), score="random", **CHANNELS)
    before = base_bits(model)
    found = model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False)
    assert_same_bits(base_bits(model), before)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.equal(found, merged.generate(input_ids=IDS, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize(
    "whole", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 7]}, {"bias": "all"}]
)
def test_whole_tensors_travel_with_channels(whole: dict, tmp_path: Path) -> None:
    model = adapted(tiny_llama(), score="random", **CHANNELS, **whole)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".dowser_" not in name:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    torch.testing.assert_close(logits(again.merge_and_unload()), logits(model), rtol=1e-5, atol=1e-6)


# Switching


@pytest.mark.parametrize("given", [{}, {"channels": 9}])
def test_hotswap_takes_another_file_of_channels(given: dict, tmp_path: Path) -> None:
    saved(tmp_path / "a", seed=1, **CHANNELS)
    saved(tmp_path / "b", seed=2, **CHANNELS | given)
    model, expected = (PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval() for name in "ab")
    kept = [layer.values("default").data_ptr() for layer in dowser_layers(model)]
    hotswap(model, tmp_path / "b")
    assert torch.equal(logits(model), logits(expected))
    assert model.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    if not given:
        assert [layer.values("default").data_ptr() for layer in dowser_layers(model)] == kept
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    assert torch.equal(logits(model.merge_and_unload()), logits(expected.merge_and_unload()))


@pytest.mark.parametrize("first", ["weight", "input_channel"])
def test_hotswap_refuses_the_other_granularity(first: str, tmp_path: Path) -> None:
    second = "weight" if first == "input_channel" else "input_channel"
    saved(tmp_path / "a", granularity=first, update_ratio=0.25)
    saved(tmp_path / "b", granularity=second, update_ratio=0.25)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    before = logits(model)
    message = rf"granularity='{second}', adapter 'default' '{first}', so their tensors differ\. Use load_adapter"
    with pytest.raises(ValueError, match=message):
        hotswap(model, tmp_path / "b")
    assert torch.equal(logits(model), before)


@over_bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_patch_gives_the_bits_of_the_merged_model_and_goes_out_again(base, dtype, tmp_path: Path) -> None:
    saved(tmp_path, base(), **CHANNELS)
    merged = PeftModel.from_pretrained(base(dtype), tmp_path).merge_and_unload()
    model = base(dtype)
    before = base_bits(model)
    with Patch(model, tmp_path):
        assert torch.equal(logits(model), logits(merged))
        assert_same_bits(base_bits(model), base_bits(merged))
    assert_same_bits(base_bits(model), before)


# Loading


def by_peft(model: PreTrainedModel, folder: Path) -> object:
    return PeftModel.from_pretrained(model, folder)


def by_peft_without_memory(model: PreTrainedModel, folder: Path) -> object:
    return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)


def by_transformers(model: PreTrainedModel, folder: Path) -> object:
    return model.load_adapter(str(folder))


def by_transformers_to_train(model: PreTrainedModel, folder: Path) -> object:
    return model.load_adapter(str(folder), is_trainable=True)


def by_patch(model: PreTrainedModel, folder: Path) -> object:
    return Patch(model, folder).apply()


LOADERS = [by_peft, by_peft_without_memory, by_transformers, by_transformers_to_train, by_patch]


@over_bases
@pytest.mark.parametrize("load", LOADERS)
def test_every_loader_gives_the_model_that_was_saved(base, load: Callable, tmp_path: Path) -> None:
    expected = logits(saved(tmp_path, base(), **CHANNELS).eval())
    model = base()
    loaded = load(model, tmp_path)
    found = logits(model.eval() if loaded is None or not isinstance(loaded, nn.Module) else loaded.eval())
    if load is by_patch:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_second_file_next_to_a_first_of_the_other_granularity(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    saved(tmp_path / "a", update_ratio=0.2)
    expected = logits(saved(tmp_path / "b", **CHANNELS).eval())
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a").eval()
    model.load_adapter(tmp_path / "b", "b", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("b")
    assert torch.equal(logits(model), expected)


def test_a_training_resumes_into_the_same_adapter(tmp_path: Path) -> None:
    expected = saved(tmp_path, **CHANNELS).eval()
    model = get_peft_model(tiny_llama(), config(score="random", seed=9, **CHANNELS)).eval()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(model), logits(expected))
    again = get_peft_model(tiny_llama(), config(score="random", seed=9, **CHANNELS)).eval()
    set_peft_model_state_dict(again, get_peft_model_state_dict(expected))
    assert torch.equal(logits(again), logits(expected))


# Refusals: the model is what it was


def small() -> PreTrainedModel:
    return tiny_llama(layers=1)


def as_weights(folder: Path) -> None:
    edit_config(folder, lambda found: found | {"granularity": "weight", "channels": None})


def as_weights_without_manifest(folder: Path) -> None:
    as_weights(folder)
    edit_config(folder, lambda found: {key: value for key, value in found.items() if key != "manifest"})


def as_channels(folder: Path) -> None:
    edit_config(folder, lambda found: found | {"granularity": "input_channel"})


def as_channels_without_manifest(folder: Path) -> None:
    as_channels(folder)
    edit_config(folder, lambda found: {key: value for key, value in found.items() if key != "manifest"})


def with_entry(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit_config(folder, lambda found: found["manifest"]["modules"][MODULE].__setitem__(key, value))

    return change


def with_counts(nnz: object, with_manifest: bool = False) -> Callable[[Path], None]:
    def change(found: dict) -> None:
        found["nnz_pattern"][MODULE] = nnz
        if with_manifest:
            found["manifest"]["modules"][MODULE]["nnz"] = nnz
        else:
            del found["manifest"]

    return lambda folder: edit_config(folder, change)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder / FILE, change)


def without_digest(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_config(folder, lambda found: {key: value for key, value in found.items() if key != "manifest"})
        edit_tensors(folder / FILE, change)

    return damage


MODULE = "model.layers.0.self_attn.q_proj"
VALUES, CODE = f"{P}{MODULE}.dowser_values.weight", f"{P}{MODULE}.dowser_index.code"


def code_of(channels: list[int]) -> Tensor:
    """4 of 32 channels as a mask of 4 bytes: the other form would take (4 bits x 8 / 8) + ... = 5 bytes."""
    mask = 0
    for channel in channels:
        mask |= 1 << channel
    return torch.tensor(list(mask.to_bytes(8, "little")[:4]), dtype=torch.uint8)


CHANNEL_ROWS = {
    "config of weights": (as_weights, r"trains single weights by its config, and input channels along dimension 1 by"),
    "config of weights, no manifest": (
        as_weights_without_manifest,
        r"expected 128 floating-point values of shape \(128,\)",
    ),
    "no whole channel": (with_counts(127), r"127 values, which are not whole input channels of 32 weights each"),
    "no channel": (with_counts(0), r"has 0 trained weights for module"),
    "more channels than there are": (
        with_counts(33 * 32),
        r"there are 1056 values, but the weight has only 1024 entries",
    ),
    "a channel too many": (with_counts(5 * 32), r"expected 160 floating-point values of shape"),
    "counts and manifest agree on too many": (with_counts(33 * 32, True), r"1056 values, but the weight has only 1024"),
    "another dimension": (
        with_entry("channel_dim", 0),
        r"input channels along dimension 1 by its config, and input channels",
    ),
    "no dimension": (with_entry("channel_dim", None), r"dimension 1 by its config, and single weights by its manifest"),
    "a dimension of text": (
        with_entry("channel_dim", "1" * 500),
        r"1 by its config, and input channels along dimension 1{20} by",
    ),
    "values in a row": (
        tensors(lambda t: t | {VALUES: t[VALUES].view(-1)}),
        r"of shape \(32, 4\), the file has .* \(128,\)",
    ),
    "values transposed": (
        tensors(lambda t: t | {VALUES: t[VALUES].T.contiguous()}),
        r"\(32, 4\), the file has .*\(4, 32\)",
    ),
    "values of int": (tensors(lambda t: t | {VALUES: t[VALUES].int()}), r"the file has torch\.int32"),
    "a NaN": (tensors(lambda t: t[VALUES][3].fill_(float("nan"))), r"has values that are not finite"),
    "numbers of int32": (
        tensors(lambda t: t | {CODE: torch.tensor([1, 2, 3, 4], dtype=torch.int32)}),
        r"one row of uint8, got torch\.int32",
    ),
    "numbers of int64": (
        tensors(lambda t: t | {CODE: torch.tensor([1, 2, 3, 4])}),
        r"one row of uint8, got torch\.int64",
    ),
    "too few channels": (without_digest(lambda t: t | {CODE: code_of([1, 2, 3])}), r"selects 3 positions, expected 4"),
    "too many channels": (
        without_digest(lambda t: t | {CODE: code_of([1, 2, 3, 4, 5])}),
        r"selects 5 positions, expected 4",
    ),
    "a code too long": (
        without_digest(lambda t: t | {CODE: torch.cat([t[CODE], t[CODE][:1]])}),
        r"index code of 4 of 32 positions takes 4 bytes",
    ),
    "another code": (tensors(lambda t: t | {CODE: code_of([1, 2, 3, 4])}), r"index code"),
}
WEIGHT_ROWS = {
    "config of channels": (
        as_channels,
        r"trains input channels along dimension 1 by its config, and single weights by",
    ),
    "config of channels, no manifest": (
        as_channels_without_manifest,
        r"expected \d+ floating-point values of shape \(\d+, \d+\)",
    ),
}


def refused(folder: Path, message: str) -> None:
    """By every way to load, and in a model with an adapter of either granularity."""
    for load in LOADERS:
        model = small()
        before = Before(model)
        # transformers compares shapes, casts and loads before anybody else sees the file.
        by_others = "|other shapes than its config says|index code selects" if "transformers" in load.__name__ else ""
        with pytest.raises(DeltaFormatError, match=message + by_others):
            load(model, folder)
        assert before.holds(), load
        assert not hasattr(model, "peft_config")
    for granularity in ("weight", "input_channel"):
        model = adapted(small(), score="random", update_ratio=0.25, granularity=granularity)
        before, expected = Before(model), logits(model)
        for low_cpu_mem_usage in (False, True):
            with pytest.raises(DeltaFormatError, match=message):
                model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        with pytest.raises(ValueError):
            hotswap(model, folder)
        assert before.holds()
        assert set(model.peft_config) == {"default"}
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("damage", CHANNEL_ROWS)
def test_a_file_of_channels_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    saved(tmp_path, small(), **CHANNELS)
    change, message = CHANNEL_ROWS[damage]
    change(tmp_path)
    refused(tmp_path, message)


@pytest.mark.parametrize("damage", WEIGHT_ROWS)
def test_a_file_of_single_weights_that_does_not_fit_is_refused(damage: str, tmp_path: Path) -> None:
    saved(tmp_path, small(), update_ratio=0.25)
    change, message = WEIGHT_ROWS[damage]
    change(tmp_path)
    refused(tmp_path, message)


@pytest.mark.parametrize("granularity", ["weight", "input_channel"])
def test_a_caller_with_a_config_of_the_other_granularity_is_refused(granularity: str, tmp_path: Path) -> None:
    saved(
        tmp_path,
        small(),
        update_ratio=0.25,
        granularity="weight" if granularity == "input_channel" else "input_channel",
    )
    for given in ({}, {"nnz_pattern": DowserConfig.from_pretrained(tmp_path).nnz_pattern}):
        model = small()
        before = Before(model)
        with pytest.raises(DeltaFormatError, match="expected 256 floating-point values of shape"):
            PeftModel.from_pretrained(
                model, tmp_path, config=config(granularity=granularity, update_ratio=0.25, **given)
            )
        assert before.holds()


def test_a_saved_config_whose_targets_have_no_channels_is_refused(tmp_path: Path) -> None:
    """Its file is of single weights, and its config was edited."""
    model = adapted(small(), score="random", target_modules=["embed_tokens"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    as_channels(tmp_path)
    for load in LOADERS:
        model = small()
        before = Before(model)
        with pytest.raises(ValueError, match=r"'model\.embed_tokens' is an embedding, whose inputs are tokens"):
            load(model, tmp_path)
        assert before.holds()


def test_one_of_each_is_compared_and_described(tmp_path: Path) -> None:
    saved(tmp_path / "a", small(), update_ratio=0.25)
    saved(tmp_path / "b", small(), **CHANNELS)
    assert sum(one.shared for one in diff(tmp_path / "a", tmp_path / "b").values()) > 0
    assert inspect(tmp_path / "b")["granularity"] == "input_channel"
    base = tmp_path / "base"
    small().save_pretrained(base)
    assert verify(tmp_path / "b", base) == []
