"""An embedding with sparse deltas: a linear layer on one-hot inputs that forms only the rows that are looked up."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from .layer import Linear
from .linear_op import refuse_tangents, summed_rows


class Embedding(Linear):
    """`torch.nn.Embedding`, perhaps scaled as in transformers' word embeddings, with sparse deltas on its weight."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # PEFT writes what it converts as factors of a linear layer

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Rows of W + D, shape `(*x.shape, width)`; where it `is_additive`, rows of D added to rows of the base.

        `x` has token ids, int32 or int64, and the base layer gets the further arguments.
        """
        base = cast(nn.Embedding, self.get_base_layer())
        values = [self.scaled_values(name) for name in active]
        refuse_tangents(base.weight, *values)
        positions = [self.index(name).decoded() for name in active]
        here = x.to(positions[0].device)  # where accelerate moves it for the base layer
        nothing = torch.zeros((), dtype=base.weight.dtype, device=here.device)
        weight = nothing.expand(self.target.shape) if self.is_additive else base.weight
        rows, places = here.long().unique(return_inverse=True)
        found = _only(base, rows, summed_rows(weight, rows, values, positions))(places)
        if not self.is_additive:
            return found
        output = self.base_layer(x, *args, **kwargs)
        return output + found.to(output.device)


def _only(base: nn.Embedding, rows: Tensor, weight: Tensor) -> nn.Embedding:
    """An embedding with the class and settings of another, but only the given rows."""
    small = copy.copy(base)
    small.__dict__.pop("forward", None)  # accelerate's, which loads the whole weight
    small.__dict__.pop("weight", None)  # FSDP1's, which is not a parameter while a forward runs
    small._parameters = {"weight": weight}  # type: ignore[dict-item]
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(small, hooks, {})
    small.num_embeddings, small.sparse = len(rows), False
    if base.padding_idx is not None:  # its row gets no gradient
        found = (rows == base.padding_idx).nonzero().view(-1).tolist()
        small.padding_idx = found[0] if found else None  # type: ignore[assignment]
    return small
