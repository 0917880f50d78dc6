"""The names of a model's modules: without adapters, in numbered layers, of embeddings."""

import re
from collections.abc import Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .._peft import AuxiliaryTrainingWrapper
from .compiled import modules_by_name

LAYER_INDEX = re.compile(r"(?:^|\.)(\d+)\.")


def adaptable_names(model: nn.Module) -> list[str]:
    """Names of the modules, without those that are inside an adapter."""
    names, inside = [], ()
    for name, module in modules_by_name(model).items():
        if not name or (inside and name.startswith(inside)):
            continue
        names.append(name)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) or "base_layer" in module._modules:
            inside = (*inside, name + ".")
    return names


def name_without_adapter(name: str) -> str:
    return re.sub(r"\.base_layer\b", "", name)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside an adapter's layer, or the module itself."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return cast(nn.Module, module._modules.get("base_layer", module))


def layer_of(name: str) -> str:
    """The name of the layer that a module belongs to: 'model.layers.3' for 'model.layers.3.mlp.up_proj'."""
    found = LAYER_INDEX.search(name)
    return name[: found.end(1)] if found else name


def name_in_layer(name: str) -> str:
    """The rest of the name: 'mlp.up_proj'."""
    return name.removeprefix(layer_of(name) + ".")


def embedding_tensors(model: nn.Module) -> Iterator[str]:
    for name, module in embedding_modules(model):
        yield from (f"{name}.{key}" for key in module.state_dict())


def embedding_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The embeddings and the output head, which PEFT counts among them, with their names in the model."""
    base: Any = next((module for module in model.modules() if hasattr(module, "get_input_embeddings")), None)
    if base is None:
        return []
    try:
        found = [base.get_input_embeddings(), base.get_output_embeddings()]
    except (NotImplementedError, AttributeError):
        return []
    return [(name, module) for name, module in model.named_modules() if any(module is one for one in found)]
