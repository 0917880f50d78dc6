"""Which modules of a model an adapter targets, and the layers that they belong to."""

import copy
import re
import warnings
from typing import TypeAlias, cast

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import DowserConfig

# Linears of a language model that route tokens to experts; they are never adapted by default.
_ROUTERS = {"gate", "router", "shared_expert_gate"}
# A transformers Conv1D counts too: it has the same weight and bias, stored transposed.
BaseLayer: TypeAlias = nn.Linear

_LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


def resolve_targets(model: nn.Module, config: DowserConfig) -> dict[str, BaseLayer]:
    """Find the modules that a config targets.

    Args:
        model: the base model; it may carry adapters already.
        config: the adapter's config; read only.

    Returns:
        Base layers by name, in the order of the model: linears or Conv1Ds with a floating-point weight.

    Raises:
        ValueError: no default exists for this model, or a `ratio_pattern` or `last_layers` cannot be met.
        TypeError: a target is neither a linear nor a Conv1D.
    """
    if config.target_modules is None:
        names = _default_targets(model)
        if config.layers_to_transform is not None:
            names = _in_layers(names, config.layers_to_transform)
        config = copy.copy(config)
        config.target_modules = names
    else:
        config = cast(DowserConfig, _maybe_include_all_linear_layers(copy.copy(config), model))
    names = [name for name in _adaptable_names(model) if check_target_module_exists(config, name)]
    _check_matched(config.target_modules or set(), names, model)
    if config.last_layers is not None:
        names = _in_last_layers(names, config.last_layers)
    return {name: _base_layer(name, model.get_submodule(name)) for name in names}


def layer_of(name: str) -> str:
    """The name of the layer that a module belongs to: 'model.layers.3' for 'model.layers.3.mlp.up_proj'."""
    found = _LAYER_INDEX.search(name)
    return name[: found.end(1)] if found else name


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is stored as `(in, out)`."""
    return isinstance(layer, Conv1D)


def _adaptable_names(model: nn.Module) -> list[str]:
    """Module names, less those inside adapters that are there already."""
    names, inside = [], ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        names.append(name)
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
    return names


def _default_targets(model: nn.Module) -> set[str]:
    """The linears inside the numbered layers of the language model."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} is not a transformers model, "
            "so there is no default."
        )
    language_model = _language_model(model)
    start = next(name for name, module in model.named_modules() if module is language_model)
    vision = tuple(
        name + "."
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.main_input_name == "pixel_values"
    )
    prefix = f"{start}." if start else ""
    names = {
        name
        for name in _adaptable_names(model)
        if name.startswith(prefix)
        and not (vision and name.startswith(vision))
        and _LAYER_INDEX.search(name)
        and name.rpartition(".")[2] not in _ROUTERS
        and _is_linear(model.get_submodule(name))
    }
    if not names:
        raise ValueError(
            f"Please specify `target_modules` in `peft_config`: {type(model).__name__} has no linear modules in "
            "numbered layers."
        )
    return names


def _language_model(model: PreTrainedModel) -> nn.Module:
    """The text decoder; the whole model where it has an encoder for text."""
    if model.config.is_encoder_decoder:
        return model
    decoder = model.get_decoder()
    inside = decoder is not None and any(module is decoder for module in model.modules())
    return cast(nn.Module, decoder) if inside else model


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return isinstance(module, nn.Linear | Conv1D)


def _base_layer(name: str, module: nn.Module) -> BaseLayer:
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if not isinstance(module, nn.Linear | Conv1D):
        raise TypeError(
            f"Target module '{name}' is a {type(module).__name__}. Target modules must be torch.nn.Linear or "
            "transformers' Conv1D; change target_modules or exclude_modules."
        )
    if not module.weight.is_floating_point() or module.weight.element_size() < 2:
        raise TypeError(
            f"Target module '{name}' has a weight of {module.weight.dtype}. This release adapts weights of float16, "
            "bfloat16, float32 and float64; load the base without quantization."
        )
    return cast(BaseLayer, module)


def _check_matched(targets: set[str] | list[str] | str, names: list[str], model: nn.Module) -> None:
    """Name the targets that match nothing: an error where nothing at all is left, otherwise a warning."""
    asked = [targets] if isinstance(targets, str) else sorted(targets)
    known = _adaptable_names(model)
    if not names:
        leaves = sorted({name.rpartition(".")[2] for name in known if _is_linear(model.get_submodule(name))})
        raise NoMatchingPeftModuleError(
            f"Target modules {asked} not found in the base model, or all of them are excluded. Its linear modules are "
            f"called {leaves}; change target_modules or exclude_modules."
        )
    if isinstance(targets, str):
        return
    suffixes = {name[at:] for name in known for at in _starts_of_parts(name)}
    unmatched = [target for target in asked if target not in suffixes]
    if unmatched:
        warnings.warn(
            f"The following target_modules matched nothing and are ignored: {unmatched}.", UserWarning, stacklevel=2
        )


def _starts_of_parts(name: str) -> list[int]:
    """Where the dot-separated parts of a module name begin."""
    return [0] + [at + 1 for at, letter in enumerate(name) if letter == "."]


def _in_layers(names: set[str], layers: list[int] | int) -> set[str]:
    """Those in the layers of the given indices."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    indices = {name: int(found[1]) for name in names if (found := _LAYER_INDEX.search(name))}
    last = max(indices.values())
    if unknown := sorted(wanted - set(indices.values())):
        raise ValueError(f"layers_to_transform names layers {unknown}, but the model has layers 0 to {last}.")
    return {name for name, index in indices.items() if index in wanted}


def _in_last_layers(names: list[str], last_layers: int) -> list[str]:
    """Those in the last layers of their own layer list."""
    indices: dict[str, int] = {}
    for name in names:
        if found := _LAYER_INDEX.search(name):
            stack = name[: found.start(1)]
            indices[stack] = max(indices.get(stack, 0), int(found[1]))
    kept = []
    for name in names:
        found = _LAYER_INDEX.search(name)
        if found and int(found[1]) > indices[name[: found.start(1)]] - last_layers:
            kept.append(name)
    if names and not indices:
        raise ValueError("last_layers needs targets in numbered layers, but none of the targets is in one.")
    too_many = [stack for stack, last in indices.items() if last_layers > last + 1]
    if too_many:
        raise ValueError(
            f"last_layers={last_layers}, but '{too_many[0].rstrip('.')}' has only {indices[too_many[0]] + 1} layers."
        )
    return kept
