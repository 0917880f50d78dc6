"""One mask on every rank of a distributed run."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from .codec import decode, encode
from .targets import BaseLayer


def same_on_all_ranks(choose: Callable[[], dict[str, Tensor]], layers: Mapping[str, BaseLayer]) -> dict[str, Tensor]:
    """Choose the masks on rank 0 and hand them to the others; an error there is raised on every rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return choose()
    masks: dict[str, Tensor] = {}
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            masks = choose()
            outcome = [{name: mask.numel() for name, mask in masks.items()}]
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    received: dict[str, Tensor] = {}
    for name, nnz in outcome[0].items():
        weight = layers[name].weight
        code: list[Any] = [encode(masks[name], weight.numel()).cpu() if masks else None]
        dist.broadcast_object_list(code, src=0)
        if dist.get_rank() != 0:
            received[name] = decode(code[0], weight.numel(), nnz).to(weight.device)
    return masks or received
