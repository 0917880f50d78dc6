"""A load of a saved adapter: any that fails leaves the model as it was, and none chooses a mask."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_files import Before, Small, edit_file
from models import config, edit_config, logits, set_values, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

import peft_dowser
from peft_dowser import DeltaFormatError, DowserConfig, hotswap

P = "base_model.model."
HEAD, EMBEDDINGS, NORM = f"{P}lm_head.weight", f"{P}model.embed_tokens.weight", f"{P}model.norm.weight"
SETTINGS = {
    "deltas only": {},
    "biases": {"bias": "all"},
    "biases of its layers": {"bias": "dowser_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [3, 7]},
}


def base() -> PreTrainedModel:
    settings = tiny_llama(layers=1).config
    settings.attention_bias = True
    torch.manual_seed(0)
    return LlamaForCausalLM(settings).eval()


def made(**settings: Any) -> PeftModel:
    model = get_peft_model(base(), config(score="random", target_modules=["q_proj"], **settings))
    set_values(model)
    return model


def by_peft(model: PreTrainedModel, folder: Path) -> object:
    return PeftModel.from_pretrained(model, folder)


def by_peft_without_memory(model: PreTrainedModel, folder: Path) -> object:
    return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)


def by_transformers(model: PreTrainedModel, folder: Path) -> object:
    return model.load_adapter(str(folder))


def by_transformers_to_train(model: PreTrainedModel, folder: Path) -> object:
    return model.load_adapter(str(folder), is_trainable=True)


LOADERS = [by_peft, by_peft_without_memory, by_transformers, by_transformers_to_train]
loaders = pytest.mark.parametrize("load", LOADERS)


def refused(load: Callable, folder: Path, message: str) -> None:
    """Neither a bare model nor one with an adapter is changed by the load, nor by a state to resume from."""
    model = base()
    before = Before(model)
    with pytest.raises(ValueError, match=message):
        load(model, folder)
    assert before.holds()
    assert not hasattr(model, "peft_config")
    model = made()
    before, expected = Before(model), logits(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(folder, "second", low_cpu_mem_usage=load is by_peft_without_memory)
    assert before.holds()
    assert set(model.peft_config) == {"default"}
    assert torch.equal(logits(model), expected)


BAD_TENSORS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "of another shape": (lambda t: torch.zeros(3, 3), r"of other shapes|has shape \(3, 3\), the model's has"),
    "NaN": (lambda t: t.index_fill(0, torch.tensor([0]), float("nan")), "entries that are not finite"),
    "infinite": (lambda t: t.index_fill(0, torch.tensor([1]), -float("inf")), "entries that are not finite"),
    "float64 that becomes infinite": (lambda t: t.double() + 1e300, "not finite in torch.float32"),
    "complex": (lambda t: t.to(torch.complex64), r"is torch\.complex64, the model's is torch\.float32"),
    "bool": (lambda t: t.bool(), r"is torch\.bool, the model's"),
    "int32": (lambda t: t.int(), r"is torch\.int32, the model's"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), r"is torch\.float8_e4m3fn, the model's"),
}
# By what the adapter trains, the tensor of the file that is bad.
WHOLE = {
    "deltas only": HEAD,
    "biases": f"{P}model.layers.0.self_attn.k_proj.bias",
    "biases of its layers": f"{P}model.layers.0.self_attn.q_proj.base_layer.bias",
    "modules_to_save": HEAD,
    "tokens": f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta",
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@loaders
@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
@pytest.mark.parametrize("trains", WHOLE)
def test_a_bad_whole_tensor_is_refused_beside_good_ones(
    trains: str, change: Callable, message: str, load: Callable, tmp_path: Path
) -> None:
    made(**SETTINGS[trains]).save_pretrained(tmp_path)
    key = WHOLE[trains]

    def damage(found: dict[str, Tensor]) -> None:
        good = found.get(key, torch.ones(64, 32))
        found |= {EMBEDDINGS: torch.full((64, 32), 7.0)} if trains != "tokens" else {}
        found[key] = change(good)

    edit_file(tmp_path, damage)
    refused(load, tmp_path, message)


@loaders
@pytest.mark.parametrize("key", [NORM, f"{P}nowhere.bias", f"{P}lm_head.bias", "x"])
def test_a_tensor_that_the_adapter_does_not_train_is_refused(key: str, load: Callable, tmp_path: Path) -> None:
    made(bias="all").save_pretrained(tmp_path)
    edit_file(tmp_path, lambda found: found | {key: torch.ones(32)})
    refused(load, tmp_path, "has 1 tensors that the adapter does not train")


@loaders
def test_a_name_with_that_of_an_adapter_is_refused(load: Callable, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    names = [".default.weight", ".second.weight"] if load in LOADERS[:2] else [".default.weight"]
    found = load_file(tmp_path / "adapter_model.safetensors")
    key = next(key for key in found if "values" in key)
    for name in names:
        edit_file(tmp_path, lambda _, name=name: found | {key.replace(".weight", name): found[key].clone()})
        model = base()
        before = Before(model)
        with pytest.raises(DeltaFormatError, match=r"that no file of an adapter has|that this adapter does not have"):
            load(model, tmp_path)
        assert before.holds()


@loaders
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_must_be_finite_in_the_dtype_that_they_become(
    dtype: torch.dtype, load: Callable, tmp_path: Path
) -> None:
    large = {torch.float32: 1e300, torch.float16: 1e5}[dtype]
    made().save_pretrained(tmp_path)
    edit_file(
        tmp_path,
        lambda found: {
            k: torch.full_like(v, large, dtype=torch.float64) if "values" in k else v for k, v in found.items()
        },
    )
    edit_config(tmp_path, lambda found: found | {"manifest": None})
    if dtype == torch.float32:
        refused(load, tmp_path, "values that are not finite")
        return
    model = base().to(dtype)
    before = Before(model)
    with pytest.raises(DeltaFormatError, match="values that are not finite"):
        PeftModel.from_pretrained(model, tmp_path, autocast_adapter_dtype=False)
    assert before.holds()


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a module without its tensor": ({"modules_to_save": ["lm_head"]}, "the file lacks 1 tensors of modules"),
    "tokens without their tensor": ({"trainable_token_indices": [3]}, "the file lacks 1 tensors of modules"),
    "the model itself": ({"modules_to_save": [""]}, r"modules_to_save must be a list of module names, got \[''\]"),
    "a list of modules": ({"modules_to_save": ["layers"]}, "names module 'model.layers', a ModuleList"),
    "a module in a module": ({"modules_to_save": ["mlp", "up_proj"]}, r"the file lacks \d tensors of modules"),
    "a module around a target": ({"modules_to_save": ["self_attn"]}, "not found in the base model, or all of them are"),
    "a negative token": ({"trainable_token_indices": [-1]}, r"\[-1\] are not tokens in module 'model.embed_tokens'"),
    "a token too many": ({"trainable_token_indices": [64]}, r"\[64\] are not tokens .* whose weight has 64 rows"),
    "a token of the head": (
        {"trainable_token_indices": {"lm_head": [64]}},
        r"\[64\] are not tokens in module 'lm_head'",
    ),
    "a token twice": ({"trainable_token_indices": [3, 3]}, "tokens are listed twice in module 'model.embed_tokens'"),
    "tokens of a norm": (
        {"trainable_token_indices": {"norm": [1]}},
        "names module '.*norm', a LlamaRMSNorm, which",
    ),
    "no counts": ({"nnz_pattern": None, "num_probes": 10**7, "score": "dowser"}, "has no nnz_pattern"),
    "no counts, no manifest": ({"nnz_pattern": None, "manifest": None, "score": "wanda"}, "has no nnz_pattern"),
}


@loaders
@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_refused(change: dict, message: str, load: Callable, tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda found: found | change)
    refused(load, tmp_path, message)


@loaders
def test_a_load_opens_no_path_of_the_config(load: Callable, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # whoever opens it waits for ever
    made().save_pretrained(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", lambda found: found | {"statistics": str(tmp_path / "pipe"), "score": "dowser"})
    load(base(), tmp_path / "adapter")
    edit_config(tmp_path / "adapter", lambda found: found | {"nnz_pattern": None})
    refused(load, tmp_path / "adapter", "has no nnz_pattern")


def test_a_config_from_a_file_without_counts_makes_no_new_adapter(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    edit_config(tmp_path, lambda found: found | {"nnz_pattern": None})
    with pytest.raises(DeltaFormatError, match="To make a new adapter, make a new DowserConfig"):
        get_peft_model(base(), DowserConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("ratio", [0.1, 0.3])
def test_a_config_that_the_caller_gives_is_not_probed_with(
    ratio: float, is_trainable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(base(), config())
    set_values(model)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(peft_dowser.tuner.injection, "probe_targets", lambda *args: pytest.fail("probed"))
    loaded = PeftModel.from_pretrained(base(), tmp_path, is_trainable=is_trainable, config=config(update_ratio=ratio))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].saved_nnz == model.peft_config["default"].saved_nnz


class Stopped(BaseException):
    """As Ctrl-C: not an Exception."""


@loaders
@pytest.mark.parametrize("trains", SETTINGS)
@pytest.mark.parametrize("place", ["read", "decode", "load_state_dict", "end"])
def test_whatever_stops_a_load_the_model_is_what_it_was(
    place: str, trains: str, load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(**SETTINGS[trains]).save_pretrained(tmp_path)
    if trains != "tokens":
        edit_file(tmp_path, lambda found: found | {EMBEDDINGS: torch.full((64, 32), 7.0)})

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    model = base()
    before = Before(model)
    if place == "read":
        monkeypatch.setattr("peft.peft_model.load_peft_weights", stop)
        monkeypatch.setattr(PreTrainedModel, "_load_pretrained_model", stop)
    elif place == "decode":
        monkeypatch.setattr("peft_dowser.delta.format.decode", stop)
    elif place == "load_state_dict":
        whole = nn.Module.load_state_dict
        monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: (whole(*args, **kwargs), stop()))
        monkeypatch.setattr("transformers.integrations.peft.log_state_dict_report", stop)
    else:
        monkeypatch.setattr(PeftModel, "eval", stop)
        monkeypatch.setattr(LlamaForCausalLM, "eval", stop)
        monkeypatch.setattr("peft_dowser.tuner.loading.check_loaded", stop)
    with pytest.raises(Stopped):
        load(model, tmp_path)
    monkeypatch.undo()
    assert before.holds()
    assert not hasattr(model, "peft_config")
    assert peft_dowser.tuner.loading.current_load() is None
    load(model, tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_load_that_is_stopped_leaves_the_adapter_that_it_replaces(
    low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(seed=1).save_pretrained(tmp_path)
    model = made()
    before, expected = Before(model), logits(model)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Stopped

    whole = nn.Module.load_state_dict
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: (whole(*args, **kwargs), stop()))
    with pytest.raises(Stopped):
        model.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    monkeypatch.undo()
    assert torch.equal(logits(model), expected)
    assert low_cpu_mem_usage or before.holds()
    model.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not torch.equal(logits(model), expected)


def test_a_load_that_fails_leaves_the_tensors_that_an_adapter_in_use_shares(tmp_path: Path) -> None:
    model = made(bias="all")
    before, expected = Before(model), logits(model)
    bias = f"{P}model.layers.0.self_attn.q_proj.base_layer.bias"
    model.save_pretrained(tmp_path)
    edit_file(tmp_path, lambda found: found | {bias: torch.ones(3), EMBEDDINGS: torch.full((64, 32), 7.0)})
    for load in (
        lambda: model.load_adapter(tmp_path, "default", is_trainable=True),
        lambda: set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors")),
    ):
        with pytest.raises(DeltaFormatError, match=r"has shape \(3,\), the model's has \(32,\)"):
            load()
        assert before.holds()
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tensors_of_another_float_dtype_become_those_of_the_model(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    made(bias="all").save_pretrained(tmp_path)
    edit_file(tmp_path, lambda found: {k: v.double() if v.is_floating_point() else v for k, v in found.items()})
    edit_config(tmp_path, lambda found: found | {"manifest": None})
    loaded = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(logits(loaded), logits(made(bias="all")))


def test_hotswap_takes_no_whole_tensors(tmp_path: Path) -> None:
    made(seed=1).save_pretrained(tmp_path)
    for key, shape in ((NORM, (32,)), (HEAD, (64, 32))):
        model = made()
        before, expected = Before(model), logits(model)
        edit_file(tmp_path, lambda found, key=key, shape=shape: found | {key: torch.ones(shape)})
        with pytest.raises(ValueError, match="also changes 1 whole tensors, such as"):
            hotswap(model, tmp_path)
        assert before.holds()
        assert torch.equal(logits(model), expected)
        edit_file(tmp_path, lambda found, key=key: found.pop(key))


class Plain(nn.Module):
    """No model of transformers, but it tells its embeddings, which PEFT then saves."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens, self.lin0 = nn.Embedding(100, 5), nn.Linear(5, 2)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.embed_tokens(x))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
@pytest.mark.filterwarnings("ignore:Could not identify embedding")
@pytest.mark.parametrize("save_embeddings", ["auto", True, False])
@pytest.mark.parametrize("target", ["lin0", "embed_tokens"])
def test_embeddings_of_a_plain_module(target: str, save_embeddings: bool | str, tmp_path: Path) -> None:
    model = get_peft_model(Plain(), DowserConfig(score="random", target_modules=[target], update_ratio=0.5))
    set_values(model)
    model.save_pretrained(tmp_path, save_embedding_layers=save_embeddings)
    ids = torch.arange(100)
    loaded = PeftModel.from_pretrained(Plain(), tmp_path)
    assert torch.equal(loaded(ids), model.eval()(ids))
    edit_file(tmp_path, lambda found: found | {f"{P}lin0.weight": torch.ones(2, 5)})
    before = Before(untouched := Plain())
    with pytest.raises(DeltaFormatError, match="does not train"):
        PeftModel.from_pretrained(untouched, tmp_path)
    assert before.holds()


def test_other_methods_load_as_before(tmp_path: Path) -> None:
    model = get_peft_model(
        base(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    model.save_pretrained(tmp_path)
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), expected)
    plain = base()
    plain.load_adapter(str(tmp_path))
    assert torch.equal(logits(plain), expected)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(base(), tmp_path / "nothing")


def test_auto_classes_are_watched_too(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config(score="random", target_modules=["q_proj"])
    )
    model.save_pretrained(tmp_path / "adapter")
    edit_file(tmp_path / "adapter", lambda found: found | {HEAD: torch.ones(64, 32).bool()})
    with pytest.raises(DeltaFormatError, match=r"is torch\.bool"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("saves", [1, 2])
def test_what_diffusers_writes_loads(saves: int, tmp_path: Path) -> None:
    """`save_lora_adapter` of diffusers puts the config, written before the tensors, into the header of their file."""
    model = inject_adapter_in_model(DowserConfig(score="random", target_modules=["up", "down"]), Small())
    for seed in range(saves):
        set_values(model, seed=seed)
        config_of_file = model.peft_config["default"].to_dict()
        header = {"lora_adapter_metadata": json.dumps(config_of_file, indent=2, sort_keys=True)}
        save_file(get_peft_model_state_dict(model), tmp_path / "pytorch_lora_weights.safetensors", header)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        written = json.loads(file.metadata()["lora_adapter_metadata"])
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    injected = inject_adapter_in_model(DowserConfig.from_peft_type(**written), Small())
    set_peft_model_state_dict(injected, tensors)
    assert torch.equal(injected(x), model(x))
    wrapped = get_peft_model(Small(), DowserConfig.from_peft_type(**written))
    set_peft_model_state_dict(wrapped, tensors)
    assert torch.equal(wrapped(x), model(x))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert torch.equal(PeftModel.from_pretrained(Small(), tmp_path)(x), model(x))
