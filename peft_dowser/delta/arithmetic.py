"""Arithmetic on sparse deltas: weighted sums and combinations, without a dense matrix.

Plain functions of `Delta`s of one matrix. Every result is a new delta whose positions follow from the
positions of its terms alone: entries that cancel to zero stay, so that they can train on.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal, TypeAlias, TypeGuard, get_args

import torch
from torch import Tensor

from .apply import Delta
from .masks import select, select_at_random, trained_count
from .seeds import derived_seed

CombinationType: TypeAlias = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]

SignMethod: TypeAlias = Literal["total", "frequency"]


def weighted_sum(deltas: Sequence[Delta], weights: Sequence[float]) -> Delta:
    """The sum of w_i D_i of one or more deltas of a matrix, on the union of their positions, added in the order given.

    It is in float32, or in the dtype of the widest term where that is wider. One delta with the weight 1 comes back bit
    for bit.
    """
    positions, slots = _union(deltas)
    return Delta(positions, _sum_at(positions, slots, _weighted(deltas, weights)))


def elected_mean(
    deltas: Sequence[Delta], weights: Sequence[float], majority_sign_method: SignMethod = "total"
) -> Delta:
    """The mean of the w_i D_i whose D_i has the elected sign of its entry, on the union of their positions (TIES).

    An entry's sign is that of the sum of its values ("total") or of its signs ("frequency"), without the weights; zero
    elects the plus. The mean is 0 where no value has the elected sign, and its dtype is as in `weighted_sum`.
    """
    positions, slots = _union(deltas)
    values = _weighted(deltas, [1.0] * len(deltas))
    signs = [value.sign() for value in values]
    votes = signs if majority_sign_method == "frequency" else values
    elected = torch.where(_sum_at(positions, slots, votes) >= 0, 1, -1)
    agree = [sign == elected[slot] for sign, slot in zip(signs, slots, strict=True)]
    terms = [term.where(yes, 0) for term, yes in zip(_weighted(deltas, weights), agree, strict=True)]
    counts = _sum_at(positions, slots, [yes.to(terms[0].dtype) for yes in agree])
    return Delta(positions, _sum_at(positions, slots, terms).div_(counts.clamp_(min=1)))


def keep_largest(delta: Delta, density: float) -> Delta:
    """Keep the largest |D|: exactly round(density nnz) of the stored entries, ties to the lowest position."""
    return _at(delta, select(delta.values.abs().float(), trained_count(density, delta.values.numel()), largest=True))


def keep_random(delta: Delta, density: float, seed: int) -> Delta:
    """Keep every stored entry with the probability `density`, and divide it by it (DARE); one seed, one choice on
    all devices.
    """
    chosen = select_at_random(delta.values.numel(), density, seed)
    kept = _at(delta, chosen.to(delta.values.device))
    return Delta(kept.positions, kept.values.to(_wide([delta])).div_(density))


def combine(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    combination_type: CombinationType = "linear",
    density: float | None = None,
    majority_sign_method: SignMethod = "total",
    seed: int = 0,
) -> Delta:
    """Combine the deltas of several adapters as PEFT's `combination_type` of the same name combines dense ones.

    ==================  ==================================  ====================
    combination_type    first, of each delta                then
    ==================  ==================================  ====================
    "linear"            everything                          `weighted_sum`
    "magnitude_prune"   `keep_largest`                      `weighted_sum`
    "ties"              `keep_largest`                      `elected_mean`
    "dare_linear"       `keep_random`                       `weighted_sum`
    "dare_ties"         `keep_random`                       `elected_mean`
    ==================  ==================================  ====================

    Args:
        deltas: one per adapter, of the same matrix, on one device; an adapter without values there has an empty one.
        weights: one factor per adapter.
        combination_type: see above.
        density: fraction of the *stored* entries of each delta to keep, in (0, 1]; not for "linear". The entries that
            a sparse delta does not store were dropped when its mask was chosen, and do not count again.
        majority_sign_method: "total" or "frequency", see `elected_mean`.
        seed: of "dare_linear" and "dare_ties"; every delta draws for itself.

    Raises:
        ValueError: an argument is out of range, or the deltas are on several devices.

    Note: PEFT keeps int(density n) entries where this keeps round(density n), and treats a single adapter as "linear"
    whatever is asked for.
    """
    _check(deltas, weights, combination_type, density, majority_sign_method)
    if density is not None and combination_type.startswith("dare"):
        deltas = [keep_random(delta, density, derived_seed(seed, number)) for number, delta in enumerate(deltas)]
    elif density is not None:
        deltas = [keep_largest(delta, density) for delta in deltas]
    if combination_type.endswith("ties"):
        return elected_mean(deltas, weights, majority_sign_method)
    return weighted_sum(deltas, weights)


def _at(delta: Delta, chosen: Tensor) -> Delta:
    return Delta(delta.positions.index_select(0, chosen), delta.values.index_select(0, chosen))


def _union(deltas: Sequence[Delta]) -> tuple[Tensor, Sequence[Tensor]]:
    """The positions in any of the deltas, sorted, and for each delta where its entries are among them."""
    together = torch.cat([delta.positions for delta in deltas])
    positions, slots = together.unique(return_inverse=True)
    return positions, slots.split([delta.positions.numel() for delta in deltas])


def _wide(deltas: Sequence[Delta]) -> torch.dtype:
    """Float32, or the dtype of the widest values where that is wider."""
    return reduce(torch.promote_types, [delta.values.dtype for delta in deltas], torch.float32)


def _weighted(deltas: Sequence[Delta], weights: Sequence[float]) -> list[Tensor]:
    wide = _wide(deltas)
    return [delta.values.to(wide) * weight for delta, weight in zip(deltas, weights, strict=True)]


def _sum_at(positions: Tensor, slots: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    # -0.0 is the zero that changes no addend, not even -0.0.
    total = torch.full(positions.shape, -0.0, dtype=terms[0].dtype, device=positions.device)
    for slot, term in zip(slots, terms, strict=True):
        total.index_add_(0, slot, term)
    return total


def _check(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
    majority_sign_method: str,
) -> None:
    if not deltas:
        raise ValueError("There is nothing to combine: name at least one adapter.")
    if len(weights) != len(deltas) or not all(map(_is_finite, weights)):
        raise ValueError(f"weights must be finite numbers, one for each of the {len(deltas)} adapters, got {weights}.")
    if combination_type not in get_args(CombinationType):
        known = ", ".join(get_args(CombinationType))
        raise ValueError(f"combination_type must be one of {known}, got {combination_type!r}.")
    if combination_type == "linear" and density is not None:
        raise ValueError(
            f"combination_type='linear' keeps every entry and takes no density, got {density!r}. Leave it out, or use "
            "combination_type='magnitude_prune'."
        )
    if combination_type != "linear" and not (_is_finite(density) and 0 < density <= 1):
        raise ValueError(
            f"combination_type={combination_type!r} needs a density in (0, 1], the fraction of each adapter's values "
            f"to keep, got {density!r}."
        )
    if majority_sign_method not in get_args(SignMethod):
        known = ", ".join(get_args(SignMethod))
        raise ValueError(f"majority_sign_method must be one of {known}, got {majority_sign_method!r}.")
    if len(devices := {str(delta.values.device) for delta in deltas}) > 1:
        raise ValueError(f"The deltas are on several devices, {', '.join(sorted(devices))}; move them to one.")


def _is_finite(number: object) -> TypeGuard[float]:
    return isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
