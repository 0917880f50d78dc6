"""transformers' own `load_adapter` loads whatever a file names: what is not right is taken back before it returns."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_files import CONFIG, DAMAGES, FILE, Before, edit_file
from models import config, edit_config, logits, set_values, tiny_llama
from peft import get_peft_model, inject_adapter_in_model
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from peft_dowser import DeltaFormatError, DowserConfig, DowserLayer

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
LAYER = "base_model.model.model.layers.0."
VALUES, CODE = (f"{LAYER}self_attn.q_proj.dowser_{part}" for part in ("values.weight", "index.code"))
FOREIGN = {
    "weight of an adapted layer": "self_attn.q_proj.base_layer.weight",
    "weight of a bare layer": "mlp.up_proj.weight",
    "norm": "input_layernorm.weight",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of one layer, with values as if it had been trained."""
    model = get_peft_model(tiny_llama(layers=1), config(score="random", target_modules=["q_proj", "v_proj"]))
    set_values(model)
    model.save_pretrained(tmp_path)
    return tmp_path


def with_first(is_trainable: bool) -> PreTrainedModel:
    """A base with an adapter of its own, which has to stay."""
    base = tiny_llama(layers=1)
    first = config(score="random", target_modules=["q_proj"], inference_mode=not is_trainable)
    inject_adapter_in_model(first, base, "first")
    set_values(base)
    base._hf_peft_config_loaded = True
    return base


def refused(base: PreTrainedModel, folder: Path, is_trainable: bool, message: str) -> None:
    with pytest.raises(DeltaFormatError, match=message):
        base.load_adapter(str(folder), "loaded", is_trainable=is_trainable)


def large(tensors: dict[str, Tensor], name: str) -> None:
    like = dict(with_first(False).named_parameters())[name.removeprefix("base_model.model.")]
    tensors[name] = torch.full(like.shape, 7.0)


BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "values NaN": (lambda t: t[VALUES].fill_(float("nan")), "not finite"),
    "values missing": (
        lambda t: t.pop(VALUES),
        f"has 3; missing: '{re.escape(VALUES[17:])}'",
    ),
    "code missing": (lambda t: t.pop(CODE), "4 Dowser tensors and has 3; missing"),
    "both missing": (lambda t: (t.pop(VALUES), t.pop(CODE)), "4 Dowser tensors and has 2; missing"),
    "code with all bits": (lambda t: t[CODE].fill_(255), "index code"),
    "code with another bit": (lambda t: t[CODE].__setitem__(0, int(t[CODE][0]) ^ 1), "index code"),
    "code short": (lambda t: t.update({CODE: t[CODE][1:].clone()}), "of other shapes than its config"),
    "values short": (lambda t: t.update({VALUES: t[VALUES][1:].clone()}), "of other shapes than its config"),
    **{
        name: (lambda t, key=key: large(t, LAYER + key), "has 1 tensors that the adapter does not train: '.*layers.0")
        for name, key in FOREIGN.items()
    },
    "norm, and values NaN": (
        lambda t: (large(t, LAYER + FOREIGN["norm"]), t[VALUES].fill_(float("nan"))),
        "not finite",
    ),
    "only a norm": (
        lambda t: (t.clear(), large(t, LAYER + FOREIGN["norm"])),
        "4 Dowser tensors and has none",
    ),
    "nothing of ours": (
        lambda t: (t.clear(), large(t, "lm_head.weight")),
        "4 Dowser tensors and has none",
    ),
}


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize(("damage", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_leaves_nothing_behind(damage: Callable, message: str, is_trainable: bool, folder: Path) -> None:
    base = with_first(is_trainable)
    untouched, expected = Before(base), logits(base)
    edit_file(folder, lambda found: [damage(found)])
    refused(base, folder, is_trainable, message)
    assert untouched.holds()
    assert set(base.peft_config) == {"first"}
    for module in base.modules():
        if isinstance(module, DowserLayer):
            module.set_adapter("first")
    assert torch.equal(logits(base.eval()), expected)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_the_only_adapter_is_forgotten_and_a_good_one_loads_in_its_place(folder: Path, is_trainable: bool) -> None:
    base = tiny_llama(layers=1)
    untouched = Before(base)
    good = (folder / FILE).read_bytes()
    edit_file(folder, lambda found: large(found, LAYER + FOREIGN["norm"]))
    refused(base, folder, is_trainable, "does not train")
    assert untouched.holds()
    assert not hasattr(base, "peft_config")
    (folder / FILE).write_bytes(good)
    base.load_adapter(str(folder), is_trainable=is_trainable)
    expected = tiny_llama(layers=1)
    merged = get_peft_model(expected, config(score="random", target_modules=["q_proj", "v_proj"]))
    set_values(merged)
    assert torch.equal(logits(base.eval()), logits(merged.merge_and_unload()))


@pytest.mark.filterwarnings("ignore:Adapter .* was made for other weights")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_mutant_harms_a_model_of_transformers(damage: Callable, folder: Path) -> None:
    originals = {path: path.read_bytes() for path in (folder / FILE, folder / CONFIG)}
    generator = random.Random(damage.__name__)
    refused = 0
    for number in range(20):
        for path, content in originals.items():
            path.write_bytes(content)
        damage(folder, generator)
        base = tiny_llama(layers=1)
        untouched = Before(base)
        try:
            base.load_adapter(str(folder))
            logits(base)
        except (DeltaFormatError, SafetensorError, OSError):  # the latter of a file that cannot be read at all
            refused += 1
            assert untouched.holds(), number
    assert refused


def test_an_auto_class_refuses_too(tmp_path: Path) -> None:
    tiny_llama(layers=1).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(score="random", target_modules=["q_proj"]))
    set_values(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model.eval()))
    edit_file(tmp_path / "adapter", lambda found: large(found, LAYER + FOREIGN["norm"]))
    with pytest.raises(DeltaFormatError, match="has 1 tensors that the adapter does not train"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "dowser_only"}, {"modules_to_save": ["mlp.up_proj"]}])
def test_whole_tensors_of_the_adapter_are_loaded(settings: dict, tmp_path: Path) -> None:
    def base() -> PreTrainedModel:
        settings = tiny_llama(layers=1).config
        settings.attention_bias = True
        torch.manual_seed(0)
        return LlamaForCausalLM(settings).eval()

    model = get_peft_model(base(), config(score="random", target_modules=["q_proj"], **settings))
    set_values(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.25)
    model.save_pretrained(tmp_path)
    loaded = base()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_eval_before_the_file_is_loaded_is_allowed(folder: Path) -> None:
    base = inject_adapter_in_model(DowserConfig.from_pretrained(folder), tiny_llama(layers=1))
    base.eval()
    edit_config(folder, lambda found: found | {"manifest": None})
    with pytest.raises(DeltaFormatError, match="has no values yet"):
        logits(base)
