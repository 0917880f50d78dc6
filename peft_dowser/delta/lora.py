"""Trained input channels as the factors of a LoRA adapter: exactly, with a scaling of 1."""

import torch
from torch import Tensor

from .layout import StoredDelta


def lora_factors(stored: StoredDelta, inputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A and B with x A^T B^T = x[..., channels] D^T.

    Args:
        stored: k input channels and their values D.
        inputs: number of input channels of the layer.
        rank: of the factors, at least k; rows of A and columns of B beyond k are zero.

    Returns:
        A, shape `(rank, inputs)`, with a single 1 in each of its first k rows; and B, shape `(out, rank)`, which begins
        with D. Both have the dtype and device of the values.
    """
    channels, values = stored
    count = channels.numel()
    first = values.new_zeros(rank, inputs)
    first[torch.arange(count, device=channels.device), channels.long()] = 1
    second = values.new_zeros(values.shape[0], rank)
    second[:, :count] = values
    return first, second
