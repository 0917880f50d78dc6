"""Batches whose rows are for different adapters: `model(..., adapter_names=[...])`, one name per row."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ._peft import AuxiliaryTrainingWrapper, adapters_of
from .experts import FusedParameter
from .layer import DowserLayer, dowser_layers
from .tied import Tied

# What PEFT calls the bare base model in `adapter_names`.
BASE = "__base__"


def check_names(model: nn.Module, names: Sequence[str], known: Mapping[str, Any]) -> None:
    """Refuse names that a mixed batch cannot have.

    Args:
        model: the adapted model.
        names: one per row.
        known: adapters by name.

    Raises:
        ValueError: a name is unknown, an adapter is merged, one of them changes the weights of experts, which see
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
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names: an adapter is merged into the base; call unmerge_adapter() first.")
    fused = [layer for layer in layers if isinstance(layer, FusedParameter)]
    if any(layer.in_use() or set(names) & set(layer.dowser_values) for layer in fused):
        raise ValueError(
            "adapter_names: an adapter of the batch, or the active one, changes the fused weights of experts, where "
            "the rows of a batch cannot be told apart; run one forward per adapter, after set_adapter."
        )


@contextmanager
def mixed_batch(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Hand the names to every adapted layer for a while."""

    def add_names(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        own = list(names)
        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's fail at an adapter that they do not have
            own = [name if name in adapters_of(module) else BASE for name in names]
        return args, kwargs | {"adapter_names": own}

    with ExitStack() as hooks:
        for module in model.modules():
            adapted = isinstance(module, DowserLayer) and not isinstance(module, FusedParameter)
            if adapted or isinstance(module, Tied | AuxiliaryTrainingWrapper):
                hook = module.register_forward_pre_hook(add_names, with_kwargs=True)
                hooks.callback(hook.remove)
        yield
