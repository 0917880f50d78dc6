"""Trained input channels as the factors of a LoRA adapter: exactly, with a scaling of 1."""

import torch
from torch import Tensor

from .layout import StoredDelta


def lora_factors(stored: StoredDelta, inputs: int, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A and B with x A^T B^T = x[..., channels] D^T, for k input channels and their values D.

    A, shape `(rank, inputs)`, has a single 1 in each of its first k rows, and B, shape `(out, rank)`, begins with D;
    the rest of both is zero. They have the dtype and device of the values.
    """
    channels, values = stored
    count = channels.numel()
    first = values.new_zeros(rank, inputs)
    first[torch.arange(count, device=channels.device), channels.long()] = 1
    second = values.new_zeros(values.shape[0], rank)
    second[:, :count] = values
    return first, second
