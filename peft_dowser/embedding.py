"""An embedding with sparse deltas: a linear layer on one-hot inputs, of which only the rows looked up are formed."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer import Linear
from .sparse_rows import summed_rows


class Embedding(Linear):
    """`torch.nn.Embedding`, perhaps scaled as in transformers' word embeddings, with sparse deltas on its weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rows of W + D for the active adapters' D: bit for bit what the merged layer gives.

        Where the layer `is_additive`, the rows of D are added to what the base layer gives, equal up to rounding.

        Args:
            x: token ids, any shape, int32 or int64.
            args: further arguments of the base layer.
            kwargs: the same.

        Returns:
            Embeddings, shape `(*x.shape, width)`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.dowser_values]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(x, *args, **kwargs)
        base = cast(nn.Embedding, self.get_base_layer())
        nothing = torch.zeros((), dtype=base.weight.dtype, device=x.device)
        weight = nothing.expand(self.base_shape) if self.is_additive else base.weight
        values = [self.loaded_values(name) for name in active]
        rows, places = x.long().unique(return_inverse=True)
        total = summed_rows(weight, rows, values, [self.index(name).decoded() for name in active])
        found = _only(base, rows, total)(places)
        return self.base_layer(x, *args, **kwargs) + found if self.is_additive else found


def _only(base: nn.Embedding, rows: Tensor, weight: Tensor) -> nn.Embedding:
    """An embedding of the class and the settings of another, but with the given rows only."""
    small = copy.copy(base)
    small.__dict__.pop("forward", None)  # accelerate's, which brings the whole weight
    small._parameters = {"weight": weight}  # type: ignore[dict-item]
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(small, hooks, {})
    small.num_embeddings, small.sparse = len(rows), False
    if base.padding_idx is not None:  # its row gets no gradient
        found = (rows == base.padding_idx).nonzero().view(-1).tolist()
        small.padding_idx = found[0] if found else None  # type: ignore[assignment]
    return small
