"""A module that shares its weight with an adapted module: both compute with one delta."""

from typing import Any

from torch import Tensor, nn

from .layer import DowserLayer, Linear


class Tied(nn.Module):
    """Computes with the deltas of the layer that has the same weight; it has no state of its own.

    A merge into that layer writes the weight that both share, and so merges this one too.

    Attributes:
        base_layer: the module of the base model.
        layer: the adapted layer with the same weight.
    """

    def __init__(self, layer: DowserLayer, own: Linear) -> None:
        """Share the deltas of a layer; `own` is a layer without adapters around the base module of this one."""
        super().__init__()
        self.base_layer = own.base_layer
        own.dowser_values, own.dowser_index, own.scaling = layer.dowser_values, layer.dowser_index, layer.scaling
        layer.is_tied = True
        # In a tuple, which hides the layers from torch: their tensors belong to the adapted layer.
        self._layers = (layer, own)

    @property
    def layer(self) -> DowserLayer:
        return self._layers[0]

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The output for the adapters in use, as `Linear.forward` gives it."""
        layer, own = self._layers
        names = None if layer.disable_adapters else adapter_names
        return own.output(x, layer.in_use(), names, *args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer; called by PEFT, which merges the layer with the same weight."""
        return self.base_layer

    def __repr__(self) -> str:
        return "dowser." + super().__repr__()
