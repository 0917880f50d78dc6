"""Which layer stands in the base for each kind of target."""

from ..base.target import Target, TargetKind
from .embedding import Embedding
from .layer import Linear
from .quantized import QuantizedLinear

# Without the fused parameters, for which `experts.Experts` makes room.
_LAYERS: dict[TargetKind, type[Linear]] = {
    "linear": Linear,
    "conv1d": Linear,
    "embedding": Embedding,
    "quantized": QuantizedLinear,
}


def layer_for(target: Target, sample: str | None = None) -> Linear:
    """A layer without adapters around the module of a target; `sample` as in `DowserLayer`."""
    return _LAYERS[target.kind](target, sample)
