"""Whole tensors beside the deltas of a saved adapter: those that it trains, and no others.

PEFT loads every tensor whose name the model has, the base's own weights too. An adapter may bring the biases and the
modules that its config says it trains, and the embeddings, which PEFT saves where tokens were added.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from torch import Tensor, nn
from transformers import PreTrainedModel

from ._peft import AuxiliaryTrainingWrapper, saved_names
from .codec import DeltaFormatError
from .compiled import usual_name
from .config import DowserConfig
from .gate import adapted
from .layer import DowserLayer
from .names import PREFIX, base_name, few
from .tied import Tied


def check_whole_tensors(
    model: nn.Module, adapter_name: str, config: DowserConfig, keys: Collection[str], where: str
) -> None:
    """Refuse a saved adapter with tensors that it does not train.

    Args:
        model: the model that it is about to be loaded into, its layers in place.
        adapter_name: its name.
        config: its configuration.
        keys: names of its tensors beside the deltas, as the model calls them.
        where: the adapter, for the message.

    Raises:
        DeltaFormatError: loading would overwrite something else, or there is nothing of this name.
    """
    if not keys:
        return
    layers = [f"{name}.base_layer" for name, _ in adapted(model, adapter_name)]
    if problem := foreign_tensors(config, keys, layers, whole_in_model(model, adapter_name)):
        raise DeltaFormatError(f"{where}: {problem}")


def own_biases(selected: Mapping[str, Tensor], config: DowserConfig, modules: Collection[str]) -> dict[str, Tensor]:
    """What PEFT selects for a save, less the biases of layers of other adapters where only those of its own train.

    Args:
        selected: tensors by their name in the model.
        config: configuration of the adapter.
        modules: names of its modules in the base.
    """
    own = {f"{module}.base_layer.bias" for module in modules}
    return {
        key: tensor
        for key, tensor in selected.items()
        if config.bias != "dowser_only" or not key.endswith(".bias") or key.removeprefix(PREFIX) in own
    }


def with_names_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A saved adapter with its biases under the names that they have in a model.

    PEFT would leave them out where adapters wrap a module in one of the two models, the saved one or this, only.
    """
    names = {base_name(usual_name(name)): name for name, _ in model.named_parameters() if name.endswith(".bias")}
    return {names.get(base_name(key), key): tensor for key, tensor in tensors.items()}


def foreign_tensors(
    config: DowserConfig, keys: Collection[str], layers: Iterable[str], whole: Iterable[str]
) -> str | None:
    """What is wrong with the whole tensors of a saved adapter; None where nothing is.

    Args:
        config: configuration of the adapter.
        keys: names of the tensors.
        layers: names of the layers under its deltas.
        whole: what it may bring besides the biases that it trains, see `whole_in_model` and `whole_in_base`.
    """
    own = {name.removeprefix(PREFIX) for name in whole}
    if config.bias == "dowser_only":
        own |= {f"{layer.removeprefix(PREFIX)}.bias" for layer in layers}
    foreign = [key for key in keys if key.removeprefix(PREFIX) not in own]
    if config.bias == "all":
        foreign = [key for key in foreign if key.rpartition(".")[2] != "bias"]
    if not foreign:
        return None
    return (
        f"the file has {len(foreign)} tensors that the adapter does not train: {few(foreign)}. Loading them could "
        "overwrite the base model. The file was edited, or its config has lost its bias or modules_to_save."
    )


def whole_in_model(model: nn.Module, adapter_name: str) -> Iterator[str]:
    """Names of the tensors that an adapter in a model trains as a whole, and of the embeddings."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            start = name.removeprefix("_fsdp_wrapped_module.")
            yield from (f"{start}.{key}" for key in saved_names(module, adapter_name))
    yield from _embeddings(model)


def whole_in_base(base: nn.Module, config: DowserConfig) -> Iterator[str]:
    """Names of the tensors that an adapter over a base would train as a whole, and of the embeddings."""
    yield from _in_modules_to_save(base, config)
    yield from _embeddings(base)


def missing_tensors(config: DowserConfig, keys: Collection[str], base: nn.Module) -> str | None:
    """What a saved adapter lacks of the modules that it trains as a whole; None where nothing is missing.

    Args:
        config: configuration of the adapter.
        keys: names of its tensors in the base.
        base: the base.
    """
    missing = [name for name in _in_modules_to_save(base, config) if name not in keys]
    if not missing:
        return None
    return (
        f"the file lacks {len(missing)} tensors of modules that the adapter trains as a whole (modules_to_save): "
        f"{few(missing)}. The file was edited or is not that of the config; copy the adapter again."
    )


def _in_modules_to_save(base: nn.Module, config: DowserConfig) -> Iterator[str]:
    for name, module in base.named_modules(remove_duplicate=False):
        if name.endswith(tuple(config.modules_to_save or [])):  # as PEFT matches
            yield from (f"{name}.{key}" for key in module.state_dict())


def check_unmerged_embeddings(model: nn.Module) -> None:
    """Refuse to save an adapter while PEFT would take merged weights for those of the base.

    Raises:
        ValueError: adapters are merged into the embeddings or the output head.
    """
    layers = [module.layer if isinstance(module, Tied) else module for _, module in _embedding_modules(model)]
    layers = [layer for layer in layers if isinstance(layer, DowserLayer)]
    if merged := sorted({name for layer in layers for name in layer.merged_adapters if name in layer.dowser_values}):
        raise ValueError(
            f"Adapters {merged} are merged into the embeddings, which PEFT saves beside an adapter that targets them, "
            "so loading would add its delta twice. Call unmerge_adapter() before saving."
        )


def _embeddings(model: nn.Module) -> Iterator[str]:
    """Names of the tensors of the embeddings."""
    for name, module in _embedding_modules(model):
        yield from (f"{name}.{key}" for key in module.state_dict())


def _embedding_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The embeddings and the output head, which PEFT counts among them, with their names in the model."""
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        return []
    try:
        found = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:
        return []
    return [(name, module) for name, module in model.named_modules() if any(module is one for one in found)]
