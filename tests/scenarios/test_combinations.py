"""Operations on adapters that meet in one model: what one does holds for all others."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import IDS, assert_same_bits, base_bits, config, logits, set_values, tied_llama, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_dowser import hotswap
from peft_dowser.layers.layer import dowser_layers

pytestmark = pytest.mark.filterwarnings("ignore:Already", "ignore:All adapters", "ignore:Adapter")


def two(dtype: torch.dtype = torch.float32, a: dict | None = None, b: dict | None = None) -> PeftModel:
    """Adapters "a", which is active, and "b"."""
    model = get_peft_model(tiny_llama(dtype), config(score="random", **(a or {})), adapter_name="a").eval()
    model.add_adapter("b", config(score="random", seed=1, **(b or {})))
    set_values(model)
    return model


def alone(model: PeftModel, name: str) -> Tensor:
    """What an adapter gives when it is merged for good."""
    return logits(copy.deepcopy(model).merge_and_unload(adapter_names=[name]))


# Names that come twice


def test_an_adapter_that_is_named_twice_counts_once() -> None:
    model = two()
    before, expected = base_bits(model), alone(model, "a")
    model.merge_adapter(["a", "a"])
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    model.base_model.set_adapter(["a", "a"])
    assert torch.equal(logits(model), expected)
    model.generate(input_ids=IDS, max_new_tokens=2)
    assert_same_bits(base_bits(model), before)


# Adapters of different modules


def test_what_is_merged_is_what_runs_also_in_layers_without_it() -> None:
    model = two(a={"target_modules": ["q_proj", "up_proj"]}, b={"target_modules": ["q_proj", "down_proj"]})
    before, expected = base_bits(model), alone(model, "a")
    for active in (["a", "b"], ["b"]):
        model.base_model.set_adapter(active)
        unmerged = logits(model)
        model.merge_adapter(["a"])
        assert torch.equal(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), unmerged)
        assert_same_bits(base_bits(model), before)


@pytest.mark.parametrize("modules", [["q_proj", "up_proj"], ["q_proj"]])
def test_every_layer_has_the_same_adapter_after_the_active_one_is_deleted(modules: list[str]) -> None:
    model = two(a={"target_modules": modules}, b={"target_modules": ["down_proj"]})
    model.add_adapter("c", config(score="random", target_modules=["up_proj"]))
    set_values(model)
    expected = alone(model, "b")
    model.delete_adapter("a")
    assert model.active_adapters == ["b"] and model.active_adapter == "b"
    assert all(layer.active_adapters == ["b"] for layer in dowser_layers(model))
    assert torch.equal(logits(model), expected)
    assert all(".b." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))


# Merges that are refused


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_safe_merge_that_fails_leaves_what_was_merged_before(merge: str) -> None:
    model = two(torch.float16)
    dowser_layers(model)[5].values("b").data[3] = 1e30
    model.merge_adapter(["a"])
    before, modules = base_bits(model), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="Adapter 'b': merging would write 1 values that are not finite"):
        getattr(model, merge)(adapter_names=["b"], safe_merge=True)
    assert_same_bits(base_bits(model), before)
    assert [type(module) for module in model.modules()] == modules
    assert all(layer.merged_adapters == ["a"] for layer in dowser_layers(model))
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), base_bits(tiny_llama(torch.float16)))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_unknown_adapters_are_not_merged(merge: str) -> None:
    model = two()
    with pytest.raises(ValueError, match=r"Cannot merge unknown adapters \['c'\]; the model has \['a', 'b'\]"):
        getattr(model, merge)(adapter_names=["a", "c"])
    assert len(dowser_layers(model)) == 14 and not any(layer.merged for layer in dowser_layers(model))
    with pytest.raises(TypeError, match="should be a list of strings"):
        getattr(model, merge)(adapter_names="a")


# Loading and saving while merged


@pytest.mark.parametrize("load", [lambda model, folder: model.load_adapter(folder, "a"), lambda *o: hotswap(*o, "a")])
def test_a_merged_adapter_is_not_replaced(tmp_path: Path, load: Callable[[PeftModel, Path], None]) -> None:
    model = two()
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    before = base_bits(model)
    model.merge_adapter()
    merged = logits(model)
    with pytest.raises(ValueError, match=r"Adapters \['a'\] are merged .* unmerge_adapter\(\) before replacing 'a'"):
        load(model, tmp_path / "b")
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)
    load(model, tmp_path / "b")
    assert torch.equal(logits(model), alone(model, "b"))


def test_no_adapter_is_loaded_beside_merged_tokens(tmp_path: Path) -> None:
    """PEFT would take rows that an adapter has changed for those of the base."""
    model = two(a={"trainable_token_indices": [5, 9]})
    model.save_pretrained(tmp_path, selected_adapters=["a"])
    model.merge_adapter()
    before = base_bits(model)
    with pytest.raises(ValueError, match=r"Adapters \['a'\] are merged into the base model.*Call unmerge_adapter"):
        model.load_adapter(tmp_path / "a", "c")
    assert_same_bits(base_bits(model), before)
    assert set(model.peft_config) == {"a", "b"} and all("a" in layer.merged_adapters for layer in dowser_layers(model))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_merged_embeddings_are_not_saved_as_those_of_the_base(tmp_path: Path) -> None:
    model = two(a={"target_modules": ["embed_tokens", "q_proj"]})
    expected = logits(model)
    model.merge_adapter(["b"])
    model.save_pretrained(tmp_path)
    model.set_adapter("a")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"Adapters \['a'\] are merged into the embeddings.*unmerge_adapter\(\)"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")), expected)


# Adapters that train more than sparse deltas


def trained_tokens(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.add_(0.3)


def test_merged_tokens_are_unmerged_with_the_rest() -> None:
    model = two(a={"trainable_token_indices": [5, 9]}, b={"trainable_token_indices": [5, 8]})
    trained_tokens(model)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    model.merge_adapter()
    model.set_adapter("b")
    assert torch.equal(logits(model), expected)
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), logits(tiny_llama()))


def saved_head(model: PeftModel) -> None:
    model.base_model.model.lm_head.modules_to_save["a"].weight.data.mul_(2)


def test_a_probe_does_not_see_what_another_adapter_trains_as_a_whole() -> None:
    model = get_peft_model(tiny_llama(), config(modules_to_save=["lm_head"]), adapter_name="a")
    model.base_model.model.lm_head.modules_to_save["a"].weight.data.normal_()
    model.add_adapter("b", config())
    bare = get_peft_model(tiny_llama(), config(), adapter_name="b")
    for layer, other in zip(dowser_layers(model), dowser_layers(bare), strict=True):
        assert torch.equal(layer.index("b").decoded(), other.index("b").decoded())
    assert not model.base_model.model.lm_head.disable_adapters


@pytest.mark.parametrize("targets", ["all-linear", None])
def test_modules_that_another_adapter_trains_as_a_whole_are_no_targets(targets: str | None, tmp_path: Path) -> None:
    whole = {"modules_to_save": ["lm_head", "o_proj"], "target_modules": ["up_proj"]}
    model = two(a=whole, b={"target_modules": targets})
    names = {layer.module_name for layer in dowser_layers(model)}
    assert len(names) == 12 and not any("o_proj" in name or "head" in name for name in names)
    model.set_adapter("b")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "b")), expected)


@pytest.mark.parametrize("whole", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}])
@pytest.mark.parametrize("active", ["a", "b"])
def test_a_batch_mixes_adapters_with_and_without_whole_modules(whole: dict, active: str) -> None:
    model = two(torch.float64, a=whole)
    trained_tokens(model)
    if "modules_to_save" in whole:
        saved_head(model)
    expected = []
    for row, name in enumerate("ab"):
        model.set_adapter(name)
        expected.append(logits(model)[row])
    model.set_adapter(active)
    mixed = model(input_ids=IDS, adapter_names=["a", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", [["plain", "tied"], ["tied", "plain"]])
def test_an_adapter_of_a_tied_weight_is_combined_in_any_order(order: list[str]) -> None:
    model = get_peft_model(tied_llama(), config(score="random", target_modules=["up_proj"]), adapter_name="plain")
    tied = config(score="random", target_modules=["embed_tokens"], ensure_weight_tying=True)
    model.add_adapter("tied", tied)
    set_values(model.eval())
    model.base_model.set_adapter(order)
    expected = logits(model)
    model.add_weighted_adapter(order, [1.0, 1.0], "both")
    model.set_adapter("both")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("bias", ["all", "dowser_only"])
def test_biases_are_those_of_the_adapter_whatever_else_is_in_the_model(bias: str, tmp_path: Path) -> None:
    options = {"task_type": None, "score": "random"}
    model = get_peft_model(mlp(), config(target_modules=["0"], bias=bias, **options), adapter_name="a")
    model.add_adapter("b", config(target_modules=["2"], **options))
    set_values(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    expected = model(torch.ones(1, 4))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path / "a", adapter_name="a")
    assert torch.equal(loaded(torch.ones(1, 4)), expected)
    beside = PeftModel.from_pretrained(mlp(), tmp_path / "b", adapter_name="b")
    beside.load_adapter(tmp_path / "a", "a")
    beside.set_adapter("a")
    assert torch.equal(beside(torch.ones(1, 4)), expected)


def mlp() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
