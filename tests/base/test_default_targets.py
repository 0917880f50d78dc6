"""The default targets of every architecture: all linears of the text's layers, no tower, no router, no head."""

import re
from typing import Any

import pytest
import torch
import transformers
from models import config
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from peft_dowser.base.search import resolve_targets
from peft_dowser.base.weight_readers import reader_of

HEADS = ["CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_TEXT_TO_TEXT", "IMAGE_CLASSIFICATION"]


def named(head: str) -> list[str]:
    """Names of the classes with a head; they are imported when they are built."""
    listed = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").values()
    return sorted({name for names in listed for name in ([names] if isinstance(names, str) else names)})


# Classes without a tower: those of images alone, and Evolla, whose encoder of proteins reads ids as one of texts does.
TOWERLESS = {*named("IMAGE_CLASSIFICATION"), "EvollaForProteinText2Text"} - {"ShieldGemma2ForImageClassification"}
CLASSES = sorted({name for head in HEADS for name in named(head)})

ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
# Options of the classes whose config by itself builds no model.
OPTIONS: dict[str, dict[str, Any]] = {
    "AyaVisionForConditionalGeneration": {"vision_config": {"hidden_size": 64, "num_attention_heads": 4}},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 5}},
    "CohereCompassForCausalLM": {"rope_parameters": ROPE},
    "CohereCompassForConditionalGeneration": {"text_config": {"rope_parameters": ROPE}},
    "DbrxForCausalLM": {"attn_config": {"rope_theta": 1e4}},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}
    },
    "DiffusionGemmaForBlockDiffusion": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    },
    "Dots1ForCausalLM": {"n_shared_experts": 1, "n_routed_experts": 4},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 5}},
    "EsmForMaskedLM": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "Gemma4AssistantForCausalLM": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [0],
        "spatial_vision_layer": 0,
        "downsample_rate": "1/2",
    },
    "HunYuanDenseV1ForCausalLM": {"head_dim": 64},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 64},
    "HunYuanVLForConditionalGeneration": {"text_config": {"head_dim": 64}},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    "MinistralForCausalLM": {"head_dim": 64},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "ReformerModelWithLMHead": {"is_decoder": True},
}
# Classes that need another library, by its name.
FOREIGN = {
    "DinatForImageClassification": "natten",
    "FastVlmForConditionalGeneration": "timm",
    "Gemma3nForConditionalGeneration": "timm",
    "PerceptionLMForConditionalGeneration": "timm",
    "TimmWrapperForImageClassification": "timm",
}
LAYERS = re.compile(r"(num_(hidden_)?layers|n_layers?|.+_layers|.*depth)")


def shrink(given: PreTrainedConfig) -> None:
    """Leave two layers of each kind in a config and those inside it."""
    for key, value in list(vars(given).items()):
        if isinstance(value, PreTrainedConfig):
            shrink(value)
        elif LAYERS.fullmatch(key) and isinstance(value, int) and value > 2:
            setattr(given, key, 2)


def built(name: str) -> PreTrainedModel:
    """A model without memory: its structure is all that is asked for. As many layers as it has, if two do not do."""
    kind = getattr(transformers, name)
    small, full = (kind.config_class(**OPTIONS.get(name, {})) for _ in range(2))
    shrink(small)
    with torch.device("meta"):
        try:
            return kind(small)
        except Exception:  # some lists in configs have one entry per layer, so anything may be raised
            return kind(full)


# Parts that read images or sound, or carry what they found to the text, by a part of their name.
TOWERS = re.compile(
    r"(^|\.)\w*(vision|visual|image|video|audio|speech|vq|tokenizer|qformer|resampler|merger|projector|timestamp)\w*\."
)
# Such parts whose names do not tell, by class.
ENCODERS = {
    "GraniteSpeechForConditionalGeneration": "model.encoder.",
    "GraniteSpeechPlusForConditionalGeneration": "model.encoder.",
    "PPFormulaNetForConditionalGeneration": "model.encoder.",
    "Pix2StructForConditionalGeneration": "encoder.",
    "VisionEncoderDecoderModel": "encoder.",
}
ROUTERS = re.compile(r"\.(gate|\w*router|shared_expert_gate)(\.|$)")
# Linears with a forward of their own, which no delta fits: by class.
OWN_FORWARD = {"DeepseekV4ForCausalLM": "o_a_proj"}


def expected(model: PreTrainedModel) -> set[str]:
    """Linears in numbered layers, by what their names say."""
    kind = type(model).__name__
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and re.search(r"(^|\.)\d+\.", name)
        and (kind in TOWERLESS or not TOWERS.search(name))
        and not name.startswith(ENCODERS.get(kind, "-"))
        and not name.endswith(OWN_FORWARD.get(kind, "-"))
        and not ROUTERS.search(name)
        and reader_of(model, name) is None
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_default_targets_are_the_linears_of_the_text(name: str) -> None:
    if name in FOREIGN:
        with pytest.raises(ImportError, match=FOREIGN[name]):
            built(name)
        return
    model = built(name)
    linears = expected(model)
    if not linears:
        with pytest.raises(ValueError, match="has no linear modules in numbered layers"):
            resolve_targets(model, config())
        return
    targets = resolve_targets(model, config())
    found = {use.name for target in targets.values() for use in target.uses}
    assert found == linears
    assert model.get_output_embeddings() not in [target.module for target in targets.values()]
