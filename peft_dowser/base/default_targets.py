"""The modules that are targeted where a config names none."""

from torch import nn
from transformers import PreTrainedModel

from .compiled import modules_by_name, uncompiled
from .module_names import LAYER_INDEX, adaptable_names, unwrapped
from .target import LINEAR, target_kind
from .weight_readers import reader_of

# Linears of a language model, or modules around them, that route tokens to experts or streams; no default targets.
_ROUTERS = {"gate", "router", "modality_router", "shared_expert_gate"}


def default_modules(model: nn.Module) -> set[str]:
    """Names of the linears inside the numbered layers of the language model.

    Raises:
        ValueError: the model is not one of transformers', or has none.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} is not a transformers model, "
            "so there is no default."
        )
    text = _text_part(model)
    whole = uncompiled(model if model.config.is_encoder_decoder else text)
    modules = {name: uncompiled(module) for name, module in modules_by_name(model).items()}
    start = next(f"{name}." if name else "" for name, module in modules.items() if module is whole)
    towers = tuple(
        f"{name}."
        for name, module in modules.items()
        if name and _is_tower(module, model) and all(inner is not text for inner in module.modules())
    )
    linears = {
        name
        for name in adaptable_names(model)
        if name.startswith(start)
        and LAYER_INDEX.search(name)
        and _ROUTERS.isdisjoint(name.split("."))
        and target_kind(unwrapped(model.get_submodule(name))) in LINEAR
        and reader_of(model, name) is None
    }
    # A model of images or sound alone is all tower.
    names = {name for name in linears if not name.startswith(towers)} or linears
    if not names:
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no linear modules in "
            "numbered layers."
        )
    return names


def _text_part(model: PreTrainedModel) -> nn.Module:
    """The part that has the config of the text; in an encoder-decoder, the decoder."""
    config = model.config.get_text_config(decoder=True)
    parts = (module for module in model.modules() if getattr(module, "config", None) is config)
    return next(parts, model)


def _is_tower(module: nn.Module, model: PreTrainedModel) -> bool:
    """Whether a part of a model reads images or sound, but not text."""
    if isinstance(module, PreTrainedModel):
        return "text" not in (module.input_modalities or ())
    return getattr(module, "config", model.config) is getattr(model.config, "vision_config", None)
