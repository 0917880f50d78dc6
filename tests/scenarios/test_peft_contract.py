"""PEFT's contract for a tuner, on every kind of model that PEFT tests its own methods on."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import IDS, TOKENS, assert_as_merged, gpt2, set_values, t5
from peft import (
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5ForConditionalGeneration,
)

from peft_dowser import DowserConfig, DowserLayer
from peft_dowser.delta.layout import Granularity

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


class Custom(nn.Module):
    """Embedding, normalization, linear layers and a nested module; no model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 16)
        self.inner = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 16, bias=False))
        self.head = nn.Linear(16, 5)

    def forward(self, input_ids: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(self.inner(self.embed(input_ids))) * scale


def bert_classifier() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**TEXT, max_position_embeddings=64, num_labels=3))


def llama_classifier() -> nn.Module:
    return LlamaForSequenceClassification(LlamaConfig(**TEXT, **TOKENS, num_labels=3))


def decoder() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**TEXT, **TOKENS))


def encoder_decoder() -> nn.Module:
    return t5(tied=False)


# By kind: the base, its targets, and the task.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], str | None]] = {
    "custom": (Custom, ["embed", "inner.0", "inner.2"], None),
    "decoder": (decoder, ["q_proj", "down_proj"], "CAUSAL_LM"),
    "conv1d": (gpt2, ["c_attn", "c_fc"], "CAUSAL_LM"),
    "encoder-decoder": (encoder_decoder, ["q", "wi"], "SEQ_2_SEQ_LM"),
    "features": (lambda: BertModel(BertConfig(**TEXT, max_position_embeddings=64)), ["query"], "FEATURE_EXTRACTION"),
    "classifier": (bert_classifier, ["query", "value"], "SEQ_CLS"),
    "decoder classifier": (llama_classifier, ["q_proj", "v_proj"], "SEQ_CLS"),
    "custom, channels": (Custom, ["inner.0", "inner.2"], None),
    "decoder, channels": (decoder, ["q_proj", "down_proj"], "CAUSAL_LM"),
    "conv1d, channels": (gpt2, ["c_attn", "c_fc"], "CAUSAL_LM"),
    "encoder-decoder, channels": (encoder_decoder, ["q", "wi"], "SEQ_2_SEQ_LM"),
    "classifier, channels": (bert_classifier, ["query", "value"], "SEQ_CLS"),
}
every_model = pytest.mark.parametrize("kind", MODELS)


def built(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind][0]().to(dtype).eval()


def family(kind: str) -> str:
    return kind.removesuffix(", channels")


def granularity(kind: str) -> Granularity:
    return "weight" if kind == family(kind) else "input_channel"


def choice(kind: str, **overrides) -> DowserConfig:
    _, targets, task = MODELS[kind]
    given = {"target_modules": targets, "score": "random", "granularity": granularity(kind), "task_type": task}
    return DowserConfig(**(given | overrides))


def made(kind: str, dtype: torch.dtype = torch.float32, **overrides) -> PeftModel:
    model = get_peft_model(built(kind, dtype), choice(kind, **overrides))
    set_values(model)
    return model.eval()


def run(model: nn.Module, **options) -> Tensor:
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(bare, T5ForConditionalGeneration):
        options["decoder_input_ids"] = IDS
    found = model(input_ids=IDS, **options)
    return found if isinstance(found, Tensor) else found[0]


@torch.no_grad()
def output(model: nn.Module, **options) -> Tensor:
    return run(model, **options)


def loss_of(model: nn.Module) -> Tensor:
    found = run(model)
    return (found * torch.linspace(-1, 1, found.numel()).view_as(found)).sum()


def layers(model: nn.Module) -> list[DowserLayer]:
    return [module for module in model.modules() if isinstance(module, DowserLayer)]


@every_model
def test_keys_of_the_saved_state(kind: str) -> None:
    model = made(kind)
    keys = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    expected = {
        f"base_model.model.{layer.module_name}.dowser_{part}"
        for layer in layers(model)
        for part in ("values.weight", "index.code")
    }
    saved = {key for key in keys if ".dowser_" in key}
    assert saved == expected
    assert all("score" in key or "classifier" in key for key in keys - saved)


@every_model
def test_only_the_values_and_a_new_head_require_grad(kind: str) -> None:
    model = made(kind)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".dowser_values.default." in name or ".modules_to_save.default." in name for name in trained)
    assert {name for name, _ in model.named_parameters() if ".dowser_values." in name} <= trained


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_float32_or_those_of_the_base(kind: str, dtype: torch.dtype) -> None:
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(built(kind, dtype), choice(kind), autocast_adapter_dtype=autocast)
        assert {layer.values("default").dtype for layer in layers(model)} == {expected}
        assert output(model).dtype == dtype


@every_model
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    expected = output(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = PeftModel.from_pretrained(built(kind), tmp_path).eval()
    assert torch.equal(output(loaded), expected)
    assert loaded.peft_config["default"].inference_mode
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trained = PeftModel.from_pretrained(built(kind), tmp_path, is_trainable=True)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@every_model
def test_save_several_and_one_of_them(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    model.add_adapter("second", choice(kind, seed=4))
    set_values(model, seed=4)
    model.save_pretrained(tmp_path, save_embedding_layers=False, selected_adapters=["second"])
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter_model.safetensors").exists()
    model.set_adapter("second")
    loaded = PeftModel.from_pretrained(built(kind), tmp_path / "second").eval()
    assert torch.equal(output(loaded), output(model.eval()))


@every_model
def test_a_given_config_is_the_one_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path, save_embedding_layers=False)
    given = PeftConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(built(kind), tmp_path, is_trainable=False, config=given)
    assert model.peft_config["default"] is given and given.inference_mode


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_unmerge_and_unload(kind: str, dtype: torch.dtype) -> None:
    base = output(built(kind, dtype)) if "classifier" not in kind else None
    model = made(kind, dtype)
    expected = output(model)
    with model.disable_adapter():
        disabled = output(model)
    assert base is None or torch.equal(disabled, base)
    model.merge_adapter()
    assert_as_merged(expected, output(model), granularity(kind))
    model.unmerge_adapter()
    assert torch.equal(output(model), expected)
    for safe in (False, True):
        merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
        assert_as_merged(expected, output(merged), granularity(kind))
        assert not layers(merged)
    unloaded = model.unload()
    assert not layers(unloaded)
    assert base is None or torch.equal(output(unloaded), base)


@every_model
def test_disabled_adapters_do_not_train(kind: str) -> None:
    model = made(kind)
    before = output(model)
    with model.disable_adapter():
        off = output(model)
        assert not torch.equal(off, before)
    assert torch.equal(output(model), before)


@every_model
def test_delete_an_adapter(kind: str) -> None:
    model = made(kind)
    expected = output(model)
    model.add_adapter("second", choice(kind, seed=4))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert list(model.peft_config) == ["default"]
    assert all(set(layer.dowser_values) == {"default"} for layer in layers(model))
    assert torch.equal(output(model), expected)
    with pytest.raises(ValueError, match="second does not exist"):
        model.delete_adapter("second")


@every_model
def test_weighted_adapters(kind: str) -> None:
    if "classifier" in kind:
        pytest.skip("a classifier's head trains as a whole, which no weighted adapter holds")
    model = made(kind)
    expected = output(model)
    model.add_weighted_adapter(["default"], [1.0], "same")
    model.set_adapter("same")
    assert torch.equal(output(model), expected)


@every_model
def test_training_changes_the_trained_and_nothing_else(kind: str) -> None:
    model = made(kind).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss_of(model).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".dowser_values." in name for name in changed)
    assert all(".dowser_values." in name or ".modules_to_save." in name for name in changed)


@every_model
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    if family(kind) == "custom":
        pytest.skip("only models of transformers know gradient checkpointing")
    gradients = []
    for checkpointing in (False, True):
        model = made(kind)
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(0)
        loss_of(model).backward()
        gradients.append([layer.values("default").grad for layer in layers(model)])
    for one, other in zip(*gradients, strict=True):
        if family(kind) == "encoder-decoder":  # the gradients of the encoder's output are summed in another order
            torch.testing.assert_close(one, other)
        else:
            assert one is not None and torch.equal(one, other)


@every_model
def test_arguments_of_the_forward_are_passed_on(kind: str) -> None:
    model = made(kind)
    if family(kind) == "custom":
        assert torch.equal(output(model, scale=2.0), 2 * output(model))
    else:
        mask = torch.ones_like(IDS)
        found, merged = (output(each, attention_mask=mask) for each in (model, copy.deepcopy(model).merge_and_unload()))
        assert_as_merged(found, merged, granularity(kind))


@every_model
def test_low_memory_loading(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    expected = output(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(built(kind), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    assert torch.equal(output(loaded), expected)
    loaded.load_adapter(tmp_path, "again", low_cpu_mem_usage=True)
    loaded.set_adapter("again")
    assert torch.equal(output(loaded.eval()), expected)


@every_model
@pytest.mark.parametrize("how", ["state dict", "counts"])
def test_placeholders_of_low_memory_have_a_state_dict_on_meta(kind: str, how: str) -> None:
    """As LoRA's, before a file fills them in."""
    model = made(kind)
    prefix = "base_model.model."
    deltas = {key.removeprefix(prefix): t for key, t in get_peft_model_state_dict(model).items() if ".dowser_" in key}
    given = choice(kind)
    if how == "counts":
        given.nnz_pattern = dict(model.peft_config["default"].saved_nnz)
    options = {"state_dict": deltas} if how == "state dict" else {}
    lora = LoraConfig(target_modules=MODELS[kind][1], fan_in_fan_out=family(kind) == "conv1d")
    bare = inject_adapter_in_model(lora, built(kind), low_cpu_mem_usage=True)
    assert {tensor.device.type for tensor in get_peft_model_state_dict(bare).values()} == {"meta"}
    bare = inject_adapter_in_model(given, built(kind), low_cpu_mem_usage=True, **options)
    found = get_peft_model_state_dict(bare)
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    assert {key: tensor.shape for key, tensor in found.items()} == {key: t.shape for key, t in deltas.items()}
    set_peft_model_state_dict(bare, deltas, low_cpu_mem_usage=True)
    found = get_peft_model_state_dict(bare)
    assert all(torch.equal(found[key], tensor) for key, tensor in deltas.items())


@every_model
@pytest.mark.parametrize("name", ["dowser_", "dowser_x", "dowser_code", "dowser_value", "dowser_valuesx", "dowser"])
@pytest.mark.filterwarnings("ignore:Adapter name '.*' should not be contained in the prefix")
def test_adapter_names_that_look_like_ours(kind: str, name: str, tmp_path: Path) -> None:
    """Together with modules and tokens that train as a whole, whose tensors have the name of the adapter in theirs."""
    whole = {"custom": ["head"], "decoder": ["lm_head"], "conv1d": ["ln_f"], "encoder-decoder": ["final_layer_norm"]}
    also = whole.get(family(kind), ["pooler"] if kind == "features" else ["classifier", "score"])
    model = get_peft_model(built(kind), choice(kind, modules_to_save=also), adapter_name=name)
    model.add_adapter("other", choice(kind, modules_to_save=also, seed=1))
    set_values(model)
    for key, parameter in model.named_parameters():
        if f".modules_to_save.{name}." in key:
            parameter.data.add_(0.1)
    expected = output(model.eval())
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(built(kind), tmp_path / name, adapter_name=name).eval()
    assert torch.equal(output(loaded), expected)
    loaded = PeftModel.from_pretrained(built(kind), tmp_path / name).eval()
    loaded.load_adapter(tmp_path / name, name)
    loaded.set_adapter(name)
    assert torch.equal(output(loaded), expected)
    loaded.delete_adapter("default")
    assert torch.equal(output(loaded.eval()), expected)
    assert_as_merged(expected, output(loaded.merge_and_unload()), granularity(kind))


@pytest.mark.parametrize("name", ["dowser_values", "dowser_index"])
def test_adapter_names_that_are_ours_are_refused(name: str) -> None:
    base = built("decoder")
    with pytest.raises(ValueError, match=f"'{name}' cannot be the name of an adapter.* Choose another name"):
        get_peft_model(base, choice("decoder", modules_to_save=["lm_head"]), adapter_name=name)
    assert not layers(base)


@every_model
def test_injection_without_a_peft_model(kind: str) -> None:
    model = made(kind)
    if any(".modules_to_save." in name for name, _ in model.named_parameters()):
        pytest.skip("a new head needs a PeftModel")
    config, expected = model.peft_config["default"], output(model)
    prefix = "base_model.model."
    state = {key.removeprefix(prefix): tensor for key, tensor in get_peft_model_state_dict(model).items()}
    for options in ({}, {"state_dict": state}):
        bare = inject_adapter_in_model(copy.deepcopy(config), built(kind), **options)
        set_peft_model_state_dict(bare, state)
        assert torch.equal(output(bare.eval()), expected)


@every_model
def test_copies_and_pickles(kind: str) -> None:
    model = made(kind)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied), output(model))


@every_model
def test_status_and_counts(kind: str) -> None:
    model = made(kind)
    status = get_model_status(model)
    assert status.adapter_model_type == "DowserModel" and status.active_adapters == ["default"]
    assert status.num_adapter_layers == len(get_layer_status(model)) >= len(layers(model))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.trainable_params == trained == model.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("kind", [kind for kind in MODELS if family(kind) != "decoder"])
@pytest.mark.parametrize("bias", ["all", "dowser_only"])
def test_biases_train_and_come_back(kind: str, bias: str, tmp_path: Path) -> None:
    model = made(kind, bias=bias)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    outside = [name for name in trained if ".base_layer." not in name and ".modules_to_save." not in name]
    assert bool(outside) == (bias == "all" and family(kind) not in ("encoder-decoder", "decoder classifier"))
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.data.add_(0.1)
    expected = output(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    # Of a new head PEFT writes the bias under three names.
    twice = ("original_module", "modules_to_save")
    assert sum(key.endswith("bias") and not any(part in key for part in twice) for key in saved) == len(trained)
    assert torch.equal(output(PeftModel.from_pretrained(built(kind), tmp_path).eval()), expected)


def test_a_mixed_model_refuses_the_method() -> None:
    """PEFT's list of methods that one model can mix is closed; with LoRA, merge one adapter before adding the other."""
    model = get_peft_model(built("decoder"), LoraConfig(target_modules=["q_proj"]), mixed=True)
    assert isinstance(model, PeftMixedModel)
    with pytest.raises(ValueError, match=r"DOWSER.*not supported|not.*compatible"):
        model.add_adapter("other", choice("decoder"))
