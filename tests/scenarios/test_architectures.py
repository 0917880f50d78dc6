"""Model families: what is targeted, that every target is probed, and the whole life cycle, bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from cases import every_granularity
from models import assert_as_merged, config, set_values
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_dowser import DowserLayer, probe
from peft_dowser.delta.layout import Granularity
from peft_dowser.probing.prompts import special_ids, synthetic_prompts
from peft_dowser.probing.settings import ProbeSettings

TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny_llava"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PATCHES = {"image_size": 16, "patch_size": 8}


def llava() -> nn.Module:
    vision = CLIPVisionConfig(**VISION, **PATCHES)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=5)
    )


def qwen2_5_vl() -> nn.Module:
    text = TEXT | {"bos_token_id": None, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens))


def gemma3() -> nn.Module:
    tokens = {"image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7, "mm_tokens_per_image": 4}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=TEXT | {"head_dim": 8}, vision_config=VISION | PATCHES, **tokens)
    )


def gemma4() -> nn.Module:
    """Its layers differ: in their attention, in the size of its heads, and so in the shapes of their weights."""
    heads = {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 8, "global_head_dim": 16}
    inputs = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
    return Gemma4ForCausalLM(Gemma4TextConfig(**TEXT, **heads, **inputs))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=128))


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**BERT | {"ffn_dim": 64, "word_embed_proj_dim": 32}))


def bart() -> nn.Module:
    sizes = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in HALF.items()}
    return BartForConditionalGeneration(
        BartConfig(d_model=32, vocab_size=96, max_position_embeddings=128, forced_eos_token_id=None, **sizes)
    )


HALF = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
# Builder, kinds of linears targeted by default, and how many of them there are.
FAMILIES = {
    "llava": (llava, LLAMA, 14),
    "qwen2_5_vl": (qwen2_5_vl, LLAMA, 14),
    "gemma3": (gemma3, LLAMA, 14),
    "gemma4": (gemma4, LLAMA | {"per_layer_input_gate", "per_layer_projection"}, 18),
    "gpt2": (gpt2, {"c_attn", "c_proj", "c_fc"}, 8),
    "opt": (opt, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 12),
    "qwen3_moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**TEXT, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        ),
        ATTENTION,
        8,
    ),
    "bert": (lambda: BertModel(BertConfig(**BERT)), {"query", "key", "value", "dense"}, 12),
    "bert_mlm": (lambda: BertForMaskedLM(BertConfig(**BERT)), {"query", "key", "value", "dense"}, 12),
    "bert_classifier": (
        lambda: BertForSequenceClassification(BertConfig(**BERT)),
        {"query", "key", "value", "dense"},
        12,
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=96, decoder_start_token_id=0)
        ),
        {"q", "k", "v", "o", "wi", "wo"},
        32,
    ),
    "bart": (bart, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}, 32),
}


def built(family: str) -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = FAMILIES[family][0]().eval()
    torch.set_rng_state(state)
    return model


def output(model: nn.Module, family: str) -> Tensor:
    ids = torch.randint(10, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if family in ("t5", "bart"):
        inputs["decoder_input_ids"] = ids[:, :5]
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_default_targets_are_probed_in_batches_and_nothing_stays_frozen(
    family: str, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(built(family), config(task_type=None))
    layers = [module for module in model.modules() if isinstance(module, DowserLayer)]
    _, kinds, count = FAMILIES[family]
    assert {layer.module_name.rpartition(".")[2] for layer in layers} == kinds
    assert len(layers) == count
    assert not any("vision" in layer.module_name or "visual" in layer.module_name for layer in layers)
    assert not [w for w in recwarn if "stay frozen" in str(w.message)]
    assert "one prompt at a time" not in caplog.text


@every_granularity
@pytest.mark.parametrize("family", FAMILIES)
def test_life_cycle(family: str, granularity: Granularity, tmp_path: Path) -> None:
    base = built(family)
    reference = copy.deepcopy(base)
    model = get_peft_model(base, config(task_type=None, granularity=granularity))
    assert torch.equal(output(model, family), output(reference, family))
    set_values(model)
    expected = output(model.eval(), family)
    assert not torch.equal(expected, output(reference, family))
    model.save_pretrained(tmp_path)
    assert torch.equal(output(PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path), family), expected)
    other = copy.deepcopy(reference)
    other.load_adapter(str(tmp_path))
    assert torch.equal(output(other, family), expected)
    model.merge_adapter()
    assert_as_merged(expected, output(model, family), granularity)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(output(model, family), output(reference, family))
    assert_as_merged(expected, output(model.merge_and_unload(), family), granularity)


@pytest.mark.parametrize("family", ["llava", "gpt2", "t5", "bert"])
def test_synthetic_prompts(family: str) -> None:
    model = built(family)
    prompts = [prompt["input_ids"][0] for prompt in synthetic_prompts(model, ProbeSettings.of(config(num_probes=70)))]
    assert len(prompts) == 70
    assert {len(ids) for ids in prompts} == {12}
    start = 1 if family in ("llava", "bert") else None  # the others name a BOS outside of the vocabulary, or none
    specials = {0, 1, 2} if start else {0, 1} if family == "t5" else set()
    for ids in prompts:
        text = ids if start is None else ids[1:]
        assert start is None or ids[0] == start
        assert not specials & set(text.tolist())
    assert len({tuple(ids.tolist()) for ids in prompts}) == 70


# Configs with the tokens that they have by default, those of Pythia, and the special ones of each.
SIZES = {key: value for key, value in BERT.items() if not key.endswith("_token_id")}
SPECIALS = {
    "roberta": (lambda: RobertaModel(RobertaConfig(**SIZES)), [0, 1, 2]),
    "pythia": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, bos_token_id=0, eos_token_id=0)), [0]),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), [1, 2]),
    "bert": (lambda: BertModel(BertConfig(**SIZES)), [0]),
}


@pytest.mark.parametrize("family", SPECIALS)
def test_token_0_is_special_where_a_config_says_so(family: str) -> None:
    build, special = SPECIALS[family]
    model = build().eval()
    assert special_ids(model) == special
    prompts = synthetic_prompts(model, ProbeSettings.of(config(num_probes=32, probe_length=64)))
    text = torch.cat([prompt["input_ids"][0, 0 if family == "bert" else 1 :] for prompt in prompts])
    assert not set(special) & set(text.tolist())
    assert (0 in text) == (family == "llama")


def test_an_image_token_is_never_written() -> None:
    for prompt in synthetic_prompts(built("llava"), ProbeSettings.of(config(num_probes=64, probe_length=64))):
        assert 5 not in prompt["input_ids"]


def test_the_image_pathway_is_probed_with_noise() -> None:
    model = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA)
    given = config(num_probes=6, probe_images=0.5)
    prompts = synthetic_prompts(model.eval(), ProbeSettings.of(given))
    assert [("pixel_values" in prompt) for prompt in prompts] == [True] * 3 + [False] * 3
    image = model.config.image_token_id
    for prompt in prompts[:3]:
        assert (prompt["input_ids"] == image).sum() == 4
        assert prompt["input_ids"].shape == prompt["attention_mask"].shape
    assert not torch.equal(prompts[0]["pixel_values"], prompts[1]["pixel_values"])
    statistics = probe(model, given)
    text_only = probe(model, config(num_probes=6))
    assert statistics.info.probe_images == 0.5
    for name, module in statistics.modules.items():
        assert not torch.equal(module.activity[:3], text_only.modules[name].activity[:3])
        assert "vision" not in name


def test_a_text_model_has_no_image_probes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"probe_images needs the processor of GPT2LMHeadModel.*pass probe\(model"):
        probe(built("gpt2"), config(probe_images=0.5))


def test_prompts_of_a_processor_are_accepted() -> None:
    model = built("llava")
    ids = torch.tensor([[1, 5, 5, 5, 5, 20, 21, 22]])
    prompts = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16)}]
    assert len(probe(model, config(), prompts=prompts).modules) == 14
