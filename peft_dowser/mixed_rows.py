"""The rows of a batch, each with an adapter of its own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def by_adapter(x: Tensor, names: Sequence[str], apply: Callable[[Tensor, str], Tensor]) -> Tensor:
    """Run every adapter on its own rows of a batch.

    Args:
        x: input, shape `(batch, ...)`.
        names: one adapter per row.
        apply: gives the output of an adapter for some rows.

    Returns:
        The outputs, in the order of the rows.

    Raises:
        ValueError: there are more or fewer names than rows.
    """
    if len(names) != x.shape[0]:
        raise ValueError(f"adapter_names must have one name for each of the {x.shape[0]} rows, got {len(names)}.")
    rows = {name: [row for row, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    chosen = {name: torch.tensor(at, device=x.device) for name, at in rows.items()}
    parts = [apply(x.index_select(0, at), name) for name, at in chosen.items()]
    return torch.cat(parts).index_select(0, torch.cat(list(chosen.values())).argsort())
