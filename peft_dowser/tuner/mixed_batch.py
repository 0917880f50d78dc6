"""Batches whose rows are for different adapters: `model(..., adapter_names=[...])`, one name per row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._peft import AuxiliaryTrainingWrapper, adapters_of
from ..layers.layer import DowserLayer, dowser_layers
from ..layers.tied import Tied
from .merging import check_unmerged

# What PEFT calls the bare base model in `adapter_names`.
BASE = "__base__"


def check_names(model: nn.Module, names: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse names, one per row, that a mixed batch cannot have.

    They are refused if one is unknown, an adapter is merged, one of them changes the weights of experts, which see
    tokens and not rows, or gradient checkpointing would run layers again when the names are gone.
    """
    if torch.is_grad_enabled() and any(
        module.training and getattr(module, "gradient_checkpointing", False) for module in model.modules()
    ):
        raise ValueError(
            "adapter_names: with gradient checkpointing the backward runs layers again, without the names. Call "
            "model.gradient_checkpointing_disable(), or run one forward per adapter, after set_adapter."
        )
    if unknown := sorted(set(names) - {BASE, *known}):
        raise ValueError(f"adapter_names has unknown adapters {unknown}; the model has {sorted(known)} and '{BASE}'.")
    layers = dowser_layers(model)
    check_unmerged(layers, "a forward with adapter_names")
    fused = [layer for layer in layers if layer.target.kind == "fused"]
    if any(layer.in_use() or set(names) & set(layer.dowser_values) for layer in fused):
        raise ValueError(
            "adapter_names: an adapter of the batch, or the active one, changes the fused weights of experts, where "
            "the rows of a batch cannot be told apart; run one forward per adapter, after set_adapter."
        )


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    around = {child: parent for parent in model.modules() for child in parent.children() if _takes_names(child)}
    entered: dict[nn.Module, torch.Size] = {}  # shape of what entered a module last

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        entered[module] = next(given, torch.empty(0)).shape

    def add_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        own = list(names)
        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's fail at an adapter that they do not have
            own = [name if name in adapters_of(module) else BASE for name in names]
        elif args:  # the module around it may have made one row of every token, as OPT does
            outer = entered.get(around[module], ())
            if len(outer) == 3 and outer[0] == len(own) and args[0].shape[:-1] == (outer[0] * outer[1],):
                own = [name for name in own for _ in range(outer[1])]
        return args, kwargs | {"adapter_names": own}

    with ExitStack() as hooks:
        for module in set(around.values()):
            hooks.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        for module in around:
            hooks.callback(module.register_forward_pre_hook(add_names, with_kwargs=True).remove)
        yield


def _takes_names(module: nn.Module) -> bool:
    if isinstance(module, DowserLayer):
        return module.target.kind != "fused"
    return isinstance(module, Tied | AuxiliaryTrainingWrapper)
