"""`ensure_weight_tying`: a weight that several modules share, and one delta for all of them."""

import copy
from pathlib import Path

import pytest
import torch
from models import IDS, adapted, config, logits, set_values, tied_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from peft_dowser import DeltaFormatError, DowserLayer, Patch, merge, probe, verify
from peft_dowser.layers.tied import Tied

EMBEDDING = "model.embed_tokens"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def with_tied(base: nn.Module | None = None, **overrides) -> PeftModel:
    choice = {"target_modules": ["embed_tokens", "up_proj"], "score": "random", "ensure_weight_tying": True}
    return adapted(tied_llama() if base is None else base, **(choice | overrides))


def shared_layer(model: nn.Module) -> DowserLayer:
    return next(m for m in model.modules() if isinstance(m, DowserLayer) and m.module_name == EMBEDDING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapted_merged_and_reloaded_model_give_the_same_bits(tmp_path: Path, dtype: torch.dtype, target: str) -> None:
    base = tied_llama(dtype)
    before = logits(base)
    model = with_tied(base, target_modules=[target, "up_proj"])
    found = logits(model)
    assert not torch.equal(found, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(tied_llama(dtype), tmp_path)), found)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), found)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert not any(isinstance(module, Tied) for module in merged.modules())


def test_the_file_has_the_delta_once(tmp_path: Path) -> None:
    model = with_tied()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    keys = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "up_proj" not in key}
    assert keys == {f"base_model.model.{EMBEDDING}.dowser_{part}" for part in ("index.code", "values.weight")}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == round(0.1 * 64 * 32) * 3


def test_the_gradient_is_that_of_the_shared_weight() -> None:
    model = with_tied()
    dense = copy.deepcopy(model).merge_and_unload()
    dense.model.embed_tokens.weight.requires_grad_(True)
    dense(input_ids=IDS, labels=IDS).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    layer = shared_layer(model)
    expected = dense.model.embed_tokens.weight.grad.view(-1)[layer.index("default").positions.long()]
    torch.testing.assert_close(layer.values("default").grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dowser", "shift", "activity"])
def test_the_score_adds_both_uses(name: str) -> None:
    base = tied_llama()
    choice = config(score="dowser", target_modules=["embed_tokens"], ensure_weight_tying=True, num_probes=8)
    modules = probe(base, choice).modules
    assert modules.keys() == {EMBEDDING, "lm_head"}
    weight = base.lm_head.weight.detach().double()
    lookup, head = modules[EMBEDDING], modules["lm_head"]
    score = lookup.activity.double().T @ lookup.sensitivity.double()
    score += head.sensitivity.double().T @ head.activity.double()
    if name == "dowser":
        score *= weight.abs()
    if name == "activity":  # of a token in the embedding, of a hidden feature in the head
        score = lookup.activity.double().mean(0)[:, None] + head.activity.double().mean(0)[None]
    choice.score = name
    model = get_peft_model(base, choice)
    trained = torch.zeros(score.numel(), dtype=torch.bool)
    trained[shared_layer(model).index("default").positions.long()] = True
    assert int(trained.sum()) == round(0.1 * score.numel())
    assert score.view(-1)[trained].max() <= score.view(-1)[~trained].min() * (1 + 1e-6)


def test_the_head_is_probed_at_every_token_and_in_any_batch() -> None:
    base = tied_llama()
    prompts = [[1, 5, 9, 13], [1, 8, 3, 20, 44, 9, 7]]
    choice = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    together = probe(base, config(**choice), prompts).modules["lm_head"]
    alone = probe(base, config(**choice, probe_batch_size=1), prompts).modules["lm_head"]
    with torch.no_grad():
        hidden = base.model(input_ids=torch.tensor([prompts[1]])).last_hidden_state
    torch.testing.assert_close(together.activity[1], hidden[0].abs().mean(0))
    torch.testing.assert_close(together.activity, alone.activity)
    torch.testing.assert_close(together.sensitivity, alone.sensitivity)


def test_disable_unmerge_unload_and_delete_restore_the_base() -> None:
    base = tied_llama()
    before = logits(base)
    model = with_tied(base)
    found = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.merge_adapter()
    assert torch.equal(logits(model), found)
    model.unmerge_adapter()
    assert torch.equal(logits(model), found)
    assert torch.equal(logits(copy.deepcopy(model)), found)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), before)
    assert type(unloaded.lm_head) is nn.Linear


def test_two_adapters_and_a_mixed_batch() -> None:
    model = with_tied()
    model.add_adapter("other", config(target_modules=["lm_head"], score="random", seed=3, ensure_weight_tying=True))
    set_values(model, seed=5)
    model.set_adapter("default")
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=["default", "other"]).logits
    # Only close: the product of one row may round otherwise than the same row within a batch.
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
    assert not torch.equal(first, second)


def test_generation_is_that_of_the_merged_model() -> None:
    model = with_tied()
    options = {"input_ids": IDS[:1], "max_new_tokens": 12, "do_sample": False}
    found = model.generate(**options)
    assert torch.equal(found, copy.deepcopy(model).merge_and_unload().generate(**options))


def test_streaming_merge_verify_and_patch(tmp_path: Path) -> None:
    tied_llama(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = with_tied(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert verify(tmp_path / "adapter", merged=tmp_path / "merged") == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert torch.equal(logits(merged), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    before = logits(plain)
    with Patch(plain, tmp_path / "adapter"):
        assert torch.equal(logits(plain), logits(model))
    assert torch.equal(logits(plain), before)


def test_a_seq2seq_model_whose_encoder_decoder_and_head_share_a_weight() -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=True)).eval()
    model = with_tied(base, target_modules=["shared"], task_type="SEQ_2_SEQ_LM")
    assert sum(isinstance(module, Tied) for module in model.modules()) >= 1
    with torch.no_grad():
        found = model(input_ids=IDS, labels=IDS).logits
        merged = model.merge_and_unload()
        assert torch.equal(merged(input_ids=IDS, labels=IDS).logits, found)


def test_modules_to_save_are_tied_too(tmp_path: Path) -> None:
    model = with_tied(target_modules=["up_proj"], modules_to_save=["embed_tokens"])
    copied = model.get_input_embeddings().modules_to_save["default"]
    assert model.get_output_embeddings().modules_to_save["default"].weight is copied.weight
    copied.weight.data.add_(0.1)
    found = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tied_llama(), tmp_path)), found)
    assert torch.equal(logits(model.merge_and_unload()), found)


def test_a_base_that_ties_nothing_says_so() -> None:
    base = LlamaForCausalLM(LlamaConfig(**(tied_llama().config.to_dict() | {"tie_word_embeddings": False})))
    with pytest.warns(UserWarning, match="no target shares its weight with another module"):
        model = with_tied(base, target_modules=["embed_tokens"])
    assert not any(isinstance(module, Tied) for module in model.modules())


def test_a_damaged_file_leaves_the_plain_base(tmp_path: Path) -> None:
    with_tied().save_pretrained(tmp_path, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for key, tensor in tensors.items() if key.endswith("values.weight"))[2] = float("nan")
    save_file(tensors, file)
    base = tied_llama()
    before = logits(base)
    with pytest.raises(DeltaFormatError, match="not finite"):
        PeftModel.from_pretrained(base, tmp_path)
    assert type(base.lm_head) is nn.Linear and torch.equal(logits(base), before)


def zamba2() -> Zamba2ForCausalLM:
    """Its layers 1 and 3 share a transformer."""
    torch.manual_seed(0)
    mamba = {"mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 8, "num_mem_blocks": 1}
    layers = {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "num_hidden_layers": 4}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "adapter_rank": 4, "vocab_size": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return Zamba2ForCausalLM(Zamba2Config(**mamba, **layers, **sizes, **tokens)).eval()


def test_layers_that_share_weights_are_default_targets_with_one_delta(tmp_path: Path) -> None:
    model = get_peft_model(zamba2(), config())
    set_values(model)
    layers = model.model.model.layers
    shared, other = (layers[number].shared_transformer.self_attn.q_proj for number in (1, 3))
    assert isinstance(shared, DowserLayer) and isinstance(other, Tied) and other.layer is shared
    found = logits(model.eval())
    assert not torch.equal(found, logits(zamba2()))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(zamba2(), tmp_path)), found)
    assert torch.equal(logits(model.merge_and_unload()), found)
