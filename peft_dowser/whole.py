"""Whole tensors beside the deltas of a saved adapter: those that it trains, and no others.

PEFT loads every tensor whose name the model has, the base's own weights too. An adapter may bring the biases and the
modules that its config says it trains, and the embeddings, which PEFT saves where tokens were added.
"""

from collections.abc import Collection, Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .codec import DeltaFormatError
from .config import DowserConfig
from .gate import adapted
from .names import PREFIX, few


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
    own = {name.removeprefix(PREFIX) for name in _own(model, adapter_name, config)}
    foreign = [key for key in keys if key.removeprefix(PREFIX) not in own and not _is_trained_bias(key, config)]
    if foreign:
        raise DeltaFormatError(f"{where}: {_problem(foreign)}")


def foreign_tensors(
    base: PreTrainedModel, config: DowserConfig, modules: Collection[str], names: Collection[str]
) -> str | None:
    """What is wrong with the whole tensors of a saved adapter that is in no model; None where nothing is.

    Args:
        base: architecture of the base.
        config: configuration of the adapter.
        modules: those that have a delta.
        names: the tensors, as the base calls them.
    """
    own = set(_embeddings(base))
    if config.bias == "dowser_only":
        own |= {f"{module}.bias" for module in modules}
    for name in base.state_dict():
        if any(name.rpartition(".")[0].endswith(module) for module in config.modules_to_save or []):
            own.add(name)
    foreign = [name for name in names if name not in own and not _is_trained_bias(name, config)]
    return _problem(foreign) if foreign else None


def _own(model: nn.Module, adapter_name: str, config: DowserConfig) -> Iterator[str]:
    """Names of the whole tensors that an adapter in a model may have."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            start = name.removeprefix("_fsdp_wrapped_module.")
            yield from (f"{start}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
    if config.bias == "dowser_only":
        yield from (f"{name}.base_layer.bias" for name, _ in adapted(model, adapter_name))
    yield from _embeddings(model)


def _is_trained_bias(name: str, config: DowserConfig) -> bool:
    return config.bias == "all" and name.rpartition(".")[2] == "bias"


def _embeddings(model: nn.Module) -> Iterator[str]:
    """Names of the tensors of the embeddings, and of the output head, which PEFT counts among them."""
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if base is None:
        return
    try:
        found = [base.get_input_embeddings(), base.get_output_embeddings()]
    except NotImplementedError:
        return
    for name, module in model.named_modules():
        if any(module is embedding for embedding in found):
            yield from (f"{name}.{key}" for key in module.state_dict())


def _problem(foreign: list[str]) -> str:
    return (
        f"the file has {len(foreign)} tensors that the adapter does not train: {few(foreign)}. Loading them could "
        "overwrite the base model. The file was edited, or its config has lost its bias or modules_to_save."
    )
