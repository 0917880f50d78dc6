"""Every architecture of transformers with a head that generates text, its config made small, with its own tokens."""

from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "speech": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
}
# Sizes, and what configs call them.
NAMES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim emb_dim width hidden_dim",
    64: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim mlp_dim moe_intermediate_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth layers "
    "num_key_value_heads num_kv_heads num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    8: "head_dim d_kv rotary_dim",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}


def classes(mapping: str) -> dict[str, str]:
    """Type of the model by the name of its class."""
    return {
        name: model_type
        for model_type, names in MAPPINGS[mapping].items()
        for name in (names if isinstance(names, tuple) else (names,))
    }


def small_model(name: str, model_type: str) -> nn.Module:
    """A random model in eval mode.

    Raises:
        Exception: the config does not allow these sizes, or a library is missing.
    """
    cls: Any = getattr(transformers, name)
    config = AutoConfig.for_model(model_type)
    if not isinstance(config, cls.config_class):
        config = config.get_text_config()
    _make_small(config)
    return cls(config).eval()


def _make_small(config: PreTrainedConfig) -> None:
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _make_small(value)
        elif key in SIZES and isinstance(value, int):
            setattr(config, key, min(value, SIZES[key]))
        elif key == "layer_types" and isinstance(value, list):
            kinds = sorted(set(value), key=value.index)
            setattr(config, key, (kinds * 2)[:2])
