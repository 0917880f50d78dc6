"""The config: its defaults, what it refuses and with which words, and its way through JSON."""

import copy
import json
import pickle
import re
from dataclasses import MISSING, fields, replace
from pathlib import Path

import pytest
import torch
from models import config, set_values, tiny_llama
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_dowser import DowserConfig, DowserLayer
from peft_dowser.layers.layer import dowser_layers

IDS = torch.arange(1, 13).view(1, 12)

DEFAULTS = {
    "update_ratio": 0.1,
    "granularity": "weight",
    "channels": None,
    "ratio_pattern": {},
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "last_layers": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "ensure_weight_tying": False,
    "bias": "none",
    "target_parameters": None,
    "score": "dowser",
    "select": "low",
    "scope": "matrix",
    "num_probes": 64,
    "num_rademacher": 8,
    "probe_length": 64,
    "probe_batch_size": None,
    "probe_images": 0.0,
    "statistics": None,
    "seed": 0,
    "init_weights": True,
    "save_dtype": None,
    "nnz_pattern": None,
    "manifest": None,
}
NAN, INF = float("nan"), float("inf")
WRONG = {
    "update_ratio": ("a number in (0, 1]", [0, 1.5, -0.1, "0.1", True, NAN, INF, None]),
    "probe_images": ("a number in [0, 1]", [-0.1, 2, "0", True, NAN, None]),
    "num_probes": ("an integer of at least 1", [0, 4.0, "4", True, NAN, None]),
    "num_rademacher": ("an integer of at least 1", [0, 4.0, "4", True, NAN, None]),
    "probe_length": ("an integer of at least 2", [1, 4.0, "4", True, NAN, None]),
    "seed": ("an integer of at least 0", [-1, 4.0, "4", False, NAN, None]),
    "probe_batch_size": ("an integer of at least 1", [0, 4.0, "4", True, NAN]),
    "last_layers": ("an integer of at least 1", [0, 4.0, "4", True, NAN]),
    "channels": ("an integer of at least 1", [0, -3, 4.0, "4", True, NAN]),
    "granularity": ("one of weight, input_channel", ["row", 1, None]),
    "score": ("one of dowser, shift, activity, random, magnitude, wanda, gradient", ["hessian", ["dowser"], None]),
    "select": ("one of low, high", ["lowest", True, None]),
    "scope": ("one of matrix, row, layer, model", ["rows", 1, None]),
    "bias": ("one of none, all, dowser_only", ["lora_only", False, None]),
    "save_dtype": ("one of float32, bfloat16, float16", ["float64", 16, torch.float16]),
    "init_weights": ("True or False", [1, "True", None]),
    "ensure_weight_tying": ("True or False", [1, "yes", None]),
    "statistics": ("the path of a file", [3, True, Path("s")]),
}
WRONG_TYPES = {
    "target_modules": [5, [5]],
    "exclude_modules": [5, [5]],
    "layers_to_transform": ["1", [1.5], True],
    "layers_pattern": [3, [3]],
    "modules_to_save": ["lm_head", 3],
    "trainable_token_indices": ["a", [1.5]],
    "ratio_pattern": [None, ["q_proj"], {1: 0.5}],
    "nnz_pattern": [3, ["q_proj"]],
    "manifest": [3, {}, {"format": "1"}, {"format": 0}, {"format": 1}, {"format": 1, "modules": {"q_proj": 3}}],
}
LAYERS = {"target_modules": ["q_proj"], "layers_to_transform": [0]}
WRONG_TOGETHER = [
    (
        {"channels": 4},
        "channels=4 needs granularity='input_channel'; for single weights there is update_ratio.",
    ),
    (
        {"granularity": "input_channel", "channels": 4, "update_ratio": 0.2},
        "channels=4 and update_ratio=0.2 both say how much of a module trains; give one of them, or a ratio_pattern",
    ),
    (
        {"granularity": "input_channel", "scope": "row"},
        "scope='row' ranks the weights of each row, and granularity='input_channel' has none to rank: take 'matrix'.",
    ),
    ({"ratio_pattern": {"q_proj": NAN}}, "ratio_pattern['q_proj'] must be a number in [0, 1], got nan"),
    ({"ratio_pattern": {"q_proj": True}}, "ratio_pattern['q_proj'] must be a number in [0, 1], got True"),
    ({"target_parameters": "w"}, "target_parameters must be a list of parameter names, got 'w'"),
    ({"ratio_pattern": {"(": 0.5}}, "the key '(' of ratio_pattern must be a regular expression, got '(' (missing )"),
    ({"target_modules": "*q"}, "target_modules must be a regular expression, got '*q' (nothing to repeat"),
    ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform."),
    (LAYERS | {"last_layers": 1}, "last_layers and layers_to_transform exclude each other."),
    (LAYERS | {"target_modules": "q"}, "layers_to_transform needs target_modules as a list, got the string 'q'."),
    (LAYERS | {"target_modules": None, "layers_pattern": "h"}, "layers_pattern needs target_modules as a list."),
]
LIKE_LORA = ["exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices"]
FULL = {
    "update_ratio": 0.25,
    "ratio_pattern": {"q_proj": 0.5, "v_proj": 0},
    "target_modules": ["v_proj", "q_proj", "up_proj"],
    "exclude_modules": ["layers.1.mlp.up_proj", "layers.0.mlp.up_proj"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [3, 1]},
    "bias": "all",
    "scope": "row",
    "probe_images": 0.5,
    "statistics": "probe.safetensors",
    "seed": 2**40,
    "init_weights": False,
    "save_dtype": "bfloat16",
    "task_type": "CAUSAL_LM",
}
SAVED = {"target_modules": r".*_proj", "last_layers": 2, "nnz_pattern": {"model.layers.0.mlp.up_proj": 7}}


def test_the_defaults() -> None:
    own = [field for field in fields(DowserConfig) if field.name in DowserConfig.__annotations__]
    found = {f.name: f.default_factory() if f.default is MISSING else f.default for f in own}
    assert found == DEFAULTS
    assert {name: DEFAULTS[name] for name in LIKE_LORA} == {name: getattr(LoraConfig(), name) for name in LIKE_LORA}
    assert DowserConfig().ratio_pattern is not DowserConfig().ratio_pattern


def test_every_field_has_help_that_a_parser_can_show() -> None:
    for option in fields(DowserConfig):
        if option.name in DEFAULTS:
            text = option.metadata["help"]
            assert text and text % () == text  # argparse formats it


@pytest.mark.parametrize(
    ("name", "bad", "clause"), [(name, bad, clause) for name, (clause, values) in WRONG.items() for bad in values]
)
def test_a_wrong_value_is_refused_by_name(name: str, bad, clause: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"DowserConfig: {name} must be {clause}, got {bad!r}.")):
        DowserConfig(**{name: bad})


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, values in WRONG_TYPES.items() for bad in values])
def test_a_value_of_another_type_is_refused_by_name(name: str, bad) -> None:
    with pytest.raises(ValueError, match=f"^DowserConfig: (.*; )?{name} must "):
        DowserConfig(**(LAYERS | {name: bad}))


@pytest.mark.parametrize(("kwargs", "clause"), WRONG_TOGETHER)
def test_values_that_exclude_each_other_are_refused(kwargs: dict, clause: str) -> None:
    with pytest.raises(ValueError, match="^DowserConfig: " + re.escape(clause)):
        DowserConfig(**kwargs)


def test_every_field_has_a_wrong_value_in_a_table() -> None:
    assert {*WRONG, *WRONG_TYPES, *(name for kwargs, _ in WRONG_TOGETHER for name in kwargs)} == set(DEFAULTS)


def test_several_wrong_values_make_one_error() -> None:
    with pytest.raises(ValueError) as caught:
        DowserConfig(update_ratio=2, ratio_pattern={"a": -1}, scope="rows", seed=True, layers_pattern="h")
    assert str(caught.value) == (
        "DowserConfig: update_ratio must be a number in (0, 1], got 2; ratio_pattern['a'] must be a number in [0, 1], "
        "got -1; scope must be one of matrix, row, layer, model, got 'rows'; seed must be an integer of at least 0, "
        "got True; layers_pattern needs layers_to_transform."
    )


# JSON


@pytest.mark.parametrize("kwargs", [{}, FULL, SAVED], ids=["defaults", "full", "saved"])
@pytest.mark.parametrize("loader", [DowserConfig, PeftConfig])
def test_a_config_comes_back_from_json(loader: type[PeftConfig], kwargs: dict, tmp_path: Path) -> None:
    given = DowserConfig(**kwargs)
    given.save_pretrained(tmp_path)
    found = loader.from_pretrained(tmp_path)
    assert type(found) is DowserConfig
    assert found == given
    assert found.saved_nnz == given.saved_nnz == kwargs.get("nnz_pattern")


def test_sets_become_sorted_lists(tmp_path: Path) -> None:
    DowserConfig(**FULL).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["q_proj", "up_proj", "v_proj"]
    assert stored["exclude_modules"] == ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]
    assert stored["layers_to_transform"] == [0, 1]
    assert stored["peft_type"] == "DOWSER"


def test_a_key_of_a_later_release_is_ignored_with_a_warning(tmp_path: Path) -> None:
    given = DowserConfig(**FULL)
    given.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"not_yet_known": 1}))
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['not_yet_known'\] for class DowserConfig"):
        found = PeftConfig.from_pretrained(tmp_path)
    assert found == given


# The config of a model


def test_the_counts_are_in_the_file_and_never_in_a_field(tmp_path: Path) -> None:
    live = config(score="random", statistics="/never/read")
    model = get_peft_model(tiny_llama(), live)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    counts = live.to_dict()["nnz_pattern"]
    assert stored["nnz_pattern"] == counts
    assert sum(counts.values()) == model.get_nb_trainable_parameters()[0]
    counts.clear()
    assert live.to_dict()["nnz_pattern"] == live.saved_nnz == stored["nnz_pattern"]
    assert live.nnz_pattern is None
    assert stored["statistics"] is None
    assert live.statistics == "/never/read"


def test_one_config_object_changed_in_between_makes_two_masks(tmp_path: Path) -> None:
    given = config(score="random")
    model = get_peft_model(tiny_llama(), given)
    given.seed, given.update_ratio = 1, 0.2
    model.add_adapter("other", given)
    set_values(model)
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            first, second = (layer.dowser_index[name].positions for name in ("default", "other"))
            assert len(second) == round(0.2 * layer.weight.numel())
            assert not torch.isin(first, second).all()
    model.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):  # each with its own counts
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_llama(), folder)
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_one_config_object_makes_adapters_of_several_models(tmp_path: Path) -> None:
    given = config(score="magnitude", last_layers=1)
    models = [get_peft_model(tiny_llama(seed=seed), given) for seed in (1, 2)]
    codes = [[layer.dowser_index["default"].code for layer in dowser_layers(model)] for model in models]
    assert not all(torch.equal(one, other) for one, other in zip(*codes, strict=True))
    for seed, model in zip((1, 2), models, strict=True):
        set_values(model)
        model.save_pretrained(tmp_path / str(seed))
        loaded = PeftModel.from_pretrained(tiny_llama(seed=seed), tmp_path / str(seed))
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_the_record_is_new_for_a_second_adapter_and_stays_where_that_fails(tmp_path: Path) -> None:
    given = config(score="random")
    get_peft_model(tiny_llama(), given).save_pretrained(tmp_path)
    given.record = first = replace(given.record, measured={"forgetting": 0.5})
    assert first.manifest is not None
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        get_peft_model(tiny_llama(), given, adapter_name="a.b")
    assert given.record is first
    get_peft_model(tiny_llama(), given)
    assert given.record == replace(first, manifest=None, measured=None)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))])
def test_copies_are_equal_and_independent(copier) -> None:
    live = get_peft_model(tiny_llama(), config(score="random", ratio_pattern={"q_proj": 0.5})).peft_config["default"]
    before = live.to_dict()
    other = copier(live)
    assert other == live
    assert other.to_dict() == before
    other.ratio_pattern["q_proj"] = 0
    other.saved_nnz.clear()
    other.target_modules.clear()
    assert live.to_dict() == before


@pytest.mark.parametrize(("layers", "expected"), [(1, {1}), ([0], {0}), ([0, 1], {0, 1})])
def test_layers_of_the_default_targets_can_be_chosen(layers, expected: set[int]) -> None:
    model = get_peft_model(tiny_llama(), config(layers_to_transform=layers))
    names = [module.module_name for module in model.modules() if isinstance(module, DowserLayer)]
    assert len(names) == 7 * len(expected)
    assert {int(name.split(".")[2]) for name in names} == expected


def test_layers_that_the_model_has_not_are_named() -> None:
    with pytest.raises(ValueError, match=r"layers_to_transform names layers \[2, 7\], but the model has layers 0 to 1"):
        get_peft_model(tiny_llama(), config(layers_to_transform=[0, 2, 7]))


def test_a_value_that_was_spoilt_later_is_refused_before_the_model_changes() -> None:
    base, spoilt = tiny_llama(), config()
    spoilt.scope = "rows"
    with pytest.raises(ValueError, match="scope must be one of"):
        get_peft_model(base, spoilt)
    assert not any(isinstance(module, DowserLayer) for module in base.modules())
