# ruff: noqa: F401
"""The one place for what transformers does not promise to keep: private and undocumented names.

Each name has its reason next to it; `tests/scenarios/test_private_names.py` reports names that have moved. `base.fused`
does not import transformers, but looks for one op of it, in `torch.ops.transformers`.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# How names in a checkpoint become names in the model, and how tensors per expert become a fused tensor.
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

# Some vision towers would read a weight to initialize it, which a fake tensor cannot give.
from transformers.initialization import no_init_weights

# Where accelerate spreads the weights that rank 0 alone has loaded.
from transformers.integrations.fsdp import is_fsdp_enabled

# Its `load_adapter` puts tensors into a model before anyone has checked the file.
from transformers.integrations.peft import PeftAdapterMixin

# The task of a model, by the name of its class.
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

# "5GB" as `save_pretrained` reads it.
from transformers.utils.hub import convert_file_size_to_int


def uninitialized(cls: Any, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model with uninitialized weights, in this dtype and with the attention that `from_pretrained` would choose."""
    with no_init_weights():
        return cls._from_config(config, dtype=dtype)


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """The names that share a weight when a checkpoint is loaded, each with the name that it is tied to."""
    return model.all_tied_weights_keys


def still_tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Like `tied_weights`, but for the config of the model as it is now."""
    return model.get_expanded_tied_weights_keys(all_submodels=True)


def experts_implementation(experts: Any) -> str | None:
    """How an experts module computes, such as "eager" or "batched_mm"; None if transformers does not choose."""
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)


def implementations(model: nn.Module) -> list[Any]:
    """The code that computes attention and experts in every part of a model: its choice changes the last bits."""
    configs: list[Any] = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    names = ("_attn_implementation", "_experts_implementation")
    return [getattr(config, name, None) for config in configs for name in names]


def is_experts(module: nn.Module) -> bool:
    """Whether transformers has marked a module as fused experts."""
    return hasattr(module, "is_transposed")


def stores_transposed(experts: nn.Module) -> bool:
    """Whether an experts module stores each matrix as `(in, out)`."""
    return bool(getattr(experts, "is_transposed", False))


def is_falcons(module: nn.Module) -> bool:
    """Whether this is Falcon's linear layer, which rounds the product before it adds the bias."""
    return type(module).__name__ == "FalconLinear"


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether this is an embedding times a constant; several models have a class with such a name."""
    return type(module).__name__.endswith("ScaledWordEmbedding")


def without_adapters(model: Any) -> None:
    """Tell a model that it has no PEFT adapter any more; otherwise transformers believes that it has one."""
    model._hf_peft_config_loaded = False


def kept_in_float32(model: nn.Module) -> set[str]:
    """Parts of the names of parameters that the class keeps in float32, whatever dtype is asked for."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return {part for name in names for part in getattr(model, name, None) or ()}
