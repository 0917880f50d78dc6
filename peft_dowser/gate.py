"""The gate: a saved adapter is checked against the model as a whole, before a single tensor of it is loaded."""

import warnings
from collections.abc import Collection, Mapping
from typing import cast

from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .codec import DeltaFormatError, check_values
from .experts import FusedParameter
from .layer import DowserLayer
from .target import Target
from .tied import Tied

# How a saved adapter calls the tensors of a module: its values and its index code.
PREFIX, VALUES, CODE = "base_model.model.", ".dowser_values.weight", ".dowser_index.code"


def named(part: str, adapter_name: str) -> str:
    """How the state dict of a model, which has several adapters, calls what a file calls `VALUES` or `CODE`."""
    stem, _, leaf = part.rpartition(".")
    return f"{stem}.{adapter_name}.{leaf}"


def counts_in(state_dict: Mapping[str, Tensor] | None) -> dict[str, int] | None:
    """Trained weights by module, read off the tensors of a saved adapter."""
    if state_dict is None:
        return None
    return {key.removesuffix(VALUES): value.numel() for key, value in state_dict.items() if key.endswith(VALUES)}


def check_counts(counts: Mapping[str, int], targets: Mapping[str, Target], adapter_name: str) -> None:
    """Refuse a saved adapter that cannot belong to this model, before any module is replaced."""
    if not counts:
        raise DeltaFormatError(
            f"Adapter '{adapter_name}' is that of a saved adapter, but has values for no module. The file is "
            "incomplete, or its config was edited."
        )
    unknown = [name for name in counts if name not in targets]
    if unknown:
        raise DeltaFormatError(
            f"Adapter '{adapter_name}' has values for {len(unknown)} modules that are no targets in this model: "
            f"{few(unknown)}. It was made for another base model, or its config was edited."
        )
    for name, nnz in counts.items():
        numel = targets[name].numel
        if isinstance(nnz, bool) or not isinstance(nnz, int) or not 0 < nnz <= numel:
            raise DeltaFormatError(
                f"Adapter '{adapter_name}': the config gives {nnz!r} trained weights for module '{name}', whose "
                f"weight has {numel} entries {targets[name].shape}. It was made for another base "
                "model, or its config was edited."
            )


def check_file(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Check every tensor of a saved adapter against the layers that it is loaded into.

    The positions that this decodes are left with the layers, which so need not decode them again.

    Raises:
        DeltaFormatError: modules are missing or unknown, or a tensor has the wrong type, length or content.
    """
    where = f"Adapter '{adapter_name}'"
    expected = {}
    for name, layer in adapted(model, adapter_name):
        expected |= {name + named(part, adapter_name): layer for part in (VALUES, CODE)}
    check_keys(expected, state_dict, where)
    read = []
    for key, layer in expected.items():
        index, tensor = layer.index(adapter_name), state_dict[key]
        try:
            if key.endswith(".code"):
                read.append((index, tensor, index.read(tensor)))
            else:
                check_values(tensor, index.nnz)
        except DeltaFormatError as error:
            raise DeltaFormatError(f"{where}, module '{layer.module_name}': {error}.") from error
    for index, code, positions in read:
        index.checked = (code, positions)


def check_keys(expected: Collection[str], found: Collection[str], where: str) -> None:
    """Refuse a file that lacks Dowser tensors, or has some that the adapter has not.

    Args:
        expected: names of the Dowser tensors that the adapter has.
        found: names of all tensors in the file.
        where: the adapter, for the message.
    """
    missing = [key for key in expected if key not in found]
    if missing:
        number = "none of them" if len(missing) == len(expected) else f"{len(expected) - len(missing)}"
        raise DeltaFormatError(
            f"{where}: the file should have {len(expected)} Dowser tensors and has {number}; missing: "
            f"{few(missing)}. The file is incomplete, or belongs to another adapter or base model."
        )
    unknown = [key for key in found if ".dowser_" in key and key not in expected]
    if unknown:
        raise DeltaFormatError(
            f"{where}: the file has {len(unknown)} Dowser tensors that this adapter has not: {few(unknown)}. It "
            "belongs to another adapter or base model."
        )


def adapted(model: nn.Module, adapter_name: str) -> list[tuple[str, DowserLayer]]:
    """The layers that carry an adapter, with their names in the model."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, DowserLayer) and adapter_name in layer.dowser_values
    ]


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that could not be loaded out of the model again."""
    layers = adapted(model, adapter_name)
    if any(layer.index(adapter_name).positions is not None for _, layer in layers):
        return  # an adapter that works, into which another state should have been loaded
    remove(model, adapter_name)
    _unwrap_whole_modules(model, adapter_name)
    configs = cast(dict[str, PeftConfig], model.peft_config)
    configs.pop(adapter_name, None)


def _unwrap_whole_modules(model: nn.Module, adapter_name: str) -> None:
    """Take away what PEFT has put around modules of which an adapter trains all weights, or some tokens."""
    for name, wrapper in list(model.named_modules()):
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in wrapper._adapters:
            wrapper.delete_adapter(adapter_name, [other for other in wrapper.active_adapters if other != adapter_name])
            if not wrapper._adapters:
                path, _, child = name.rpartition(".")
                setattr(model.get_submodule(path), child, wrapper.original_module)


def remove(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of the model; a layer without any other gives its place back to the base layer."""
    for name, layer in adapted(model, adapter_name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT announces the next active adapter
            layer.delete_adapter(adapter_name)
        if not layer.dowser_values:
            _unwrap(model, name, layer)


def _unwrap(model: nn.Module, name: str, layer: DowserLayer) -> None:
    """Put the base layer back in the place of a layer without adapters."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(layer, FusedParameter):
        delattr(parent, child)
        if any(isinstance(other, FusedParameter) for other in parent.children()):
            return
        path, _, child = path.rpartition(".")
        parent = model.get_submodule(path)
    setattr(parent, child, layer.get_base_layer())
    for name, module in list(model.named_modules()):
        if isinstance(module, Tied) and module.layer is layer:
            path, _, child = name.rpartition(".")
            setattr(model.get_submodule(path), child, module.base_layer)


def few(names: list[str]) -> str:
    """The first names of a list that may be long and come from a stranger's file."""
    shown = ", ".join(repr(name[:100]) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
