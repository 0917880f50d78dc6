"""What has to hold before adapters are merged, and what holds in every layer afterwards."""

from collections.abc import Collection

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import dowser_layers


def prepare_merge(model: nn.Module, known: Collection[str], adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Refuse a merge that cannot be done as a whole; every layer stays as it is.

    Args:
        model: model with `DowserLayer`s; some adapters may be merged already.
        known: its adapters.
        adapter_names: those to merge; None takes the active ones.
        safe_merge: whether sums that are not finite are to be refused.

    Raises:
        ValueError: an adapter is unknown, which PEFT would leave out without a word, or a sum is not finite.
    """
    names = () if isinstance(adapter_names, str) else adapter_names or ()  # PEFT refuses a string
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"Cannot merge unknown adapters {unknown}; the model has {sorted(known)}.")
    for layer in dowser_layers(model) if safe_merge else []:
        merged = len(layer.merged_adapters)
        if merged and not layer.merges_in_place:
            continue  # the layer itself refuses, and stays as it is
        try:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
        finally:
            if layer.merged and not merged:
                layer.unmerge()
            while len(layer.merged_adapters) > merged:
                layer.unmerge_last()


def note_merged_everywhere(model: nn.Module) -> None:
    """Note what is merged in some layers in those too where it has no values: no other active adapter runs there."""
    layers = dowser_layers(model)
    merged = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
    for layer in layers:
        here = {*layer.merged_adapters, *layer.dowser_values}
        layer.merged_adapters += [name for name in merged if name not in here]


def unmerge_everywhere(model: nn.Module) -> None:
    """Unmerge all layers, also those of PEFT's that hold the tokens that an adapter trains."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            layer.unmerge()
