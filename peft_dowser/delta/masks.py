"""From scores to masks: the positions of the weights that train (Eq. 7), as sorted flat positions.

Selection is exact: `count` entries, never one more, and ties go to the lowest position. The threshold is found by two
histograms over the bits of the scores, so no sort and no 64-bit array of the size of the weight is made, and the result
is the same on every device.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .codec import position_dtype

# Entries examined at a time: bounds the temporaries, whatever the size of the matrix.
_BLOCK = 1 << 22

_Digit: TypeAlias = Callable[[Tensor], Tensor]


def trained_count(update_ratio: float, numel: int) -> int:
    """Number of weights that train: k = round(rho n), halves to the even side."""
    return round(update_ratio * numel)


def frozen_reason(score: Tensor) -> str | None:
    """Why float32 scores cannot be ranked, or None where they can.

    A constant or non-finite score says nothing about which weight matters, so its matrix must stay frozen.
    """
    lowest, highest = score.aminmax()
    if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
        return "scores are not finite"
    if bool(lowest == highest):
        return "all scores are equal"
    return None


def select(score: Tensor, count: int, largest: bool = False) -> Tensor:
    """Select exactly the `count` lowest (or highest) of non-negative finite float32 scores of one matrix.

    Returns flat positions, strictly increasing, shape `(count,)`, int32 (int64 above 2**31 - 1 entries).
    """
    return select_jointly([lambda: score], count, largest)[0]


def select_jointly(scores: Sequence[Callable[[], Tensor]], count: int, largest: bool = False) -> list[Tensor]:
    """Select the `count` lowest (or highest) scores over several matrices that share one ranking.

    Args:
        scores: one function per matrix that computes its non-negative finite scores, float32. With several matrices
            each is called three times, so that only one score matrix exists at a time.
        count: number of entries to select in all of them together.
        largest: select the highest scores instead.

    Returns:
        For each matrix its flat positions, strictly increasing. Ties go to the earlier matrix, then the lower position.
    """
    if len(scores) == 1:
        only = scores[0]()
        scores = [lambda: only]

    threshold, ties = _threshold(scores, count, largest)
    selected = []
    for score in scores:
        positions, used = _at_most(_keys(score(), largest), threshold, ties)
        selected.append(positions)
        ties -= used
    return selected


def select_rows(score: Tensor, count: int, largest: bool = False) -> Tensor:
    """Select the `count` lowest (or highest) scores of every row of a matrix; otherwise as `select`."""
    height, width = score.shape
    rows = torch.arange(height, device=score.device)[:, None]
    step = max(1, _BLOCK // width)
    selected = []
    for row, block in zip(rows.split(step), score.split(step), strict=True):
        columns = block.sort(dim=1, descending=largest, stable=True).indices[:, :count]
        selected.append((columns.sort(dim=1).values + row * width).reshape(-1).to(position_dtype(score.numel())))
    return torch.cat(selected)


def select_at_random(numel: int, probability: float, seed: int) -> Tensor:
    """Select every entry of a matrix with a probability, so the number of them is random too (DARE).

    Returns flat positions as `select`, on the CPU; one seed selects the same entries on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(numel, generator=generator, dtype=torch.float32, device="cpu")
    return (chance < probability).nonzero().view(-1).to(position_dtype(numel))


def transpose_positions(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """Positions in a matrix of `shape`, expressed as positions in its transpose, sorted."""
    rows, columns = shape
    wide = positions.long()
    return ((wide % columns) * rows + wide // columns).sort().values.to(positions.dtype)


def shared_positions(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the positions that two masks share are in either.

    Args:
        first: flat positions, strictly increasing, shape `(k1,)`, int32 or int64.
        second: likewise, on the same device; best the longer one, as it is the one that is searched.

    Returns:
        For each shared position, in their order, its index in `first` and that in `second`, int64.
    """
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(dtype).contiguous(), second.to(dtype).contiguous()
    if len(second) == 0:
        first = first[:0]
    found = torch.searchsorted(second, first).clamp_(max=len(second) - 1)
    own = (second[found] == first).nonzero().view(-1)
    return own, found[own]


def _keys(score: Tensor, largest: bool) -> Tensor:
    """Integers in the order of selection: the bits of a non-negative float sort like the float itself."""
    bits = score.contiguous().view(-1).view(torch.int32)
    return 0x7FFFFFFF - bits if largest else bits


def _threshold(scores: Sequence[Callable[[], Tensor]], count: int, largest: bool) -> tuple[int, int]:
    """The key of the last selected entry, and how many entries with just this key are selected."""
    if count == 0:
        return 0, 0
    high = _histogram(scores, largest, 1 << 15, lambda block: block >> 16)
    high_key, rank = _bin_of(high, count)
    low = _histogram(scores, largest, 1 << 16, lambda block: block[(block >> 16) == high_key] & 0xFFFF)
    low_key, rank = _bin_of(low, rank)
    return (high_key << 16) | low_key, rank


def _histogram(scores: Sequence[Callable[[], Tensor]], largest: bool, bins: int, digit: _Digit) -> Tensor:
    total = torch.zeros(bins, dtype=torch.int64, device="cpu")
    for score in scores:
        _count(total, _keys(score(), largest), digit)
    return total


def _count(total: Tensor, keys: Tensor, digit: _Digit) -> None:
    """Add the digits of all keys to a histogram; a function, so that no loop variable keeps keys of this matrix."""
    for block in keys.split(_BLOCK):
        total += torch.bincount(digit(block), minlength=len(total)).cpu()


def _bin_of(histogram: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th smallest entry (from 1), and that entry's rank inside the bin."""
    cumulative = histogram.cumsum(0)
    found = int(torch.searchsorted(cumulative, rank))
    return found, rank - (int(cumulative[found - 1]) if found else 0)


def _at_most(keys: Tensor, threshold: int, ties: int) -> tuple[Tensor, int]:
    """Positions of all keys below the threshold and of the first `ties` keys at it; the ties used."""
    selected, used = [], 0
    dtype = position_dtype(keys.numel())
    for number, block in enumerate(keys.split(_BLOCK)):
        chosen = block < threshold
        if used < ties:
            at_threshold = (block == threshold).nonzero().view(-1)[: ties - used]
            chosen[at_threshold] = True
            used += at_threshold.numel()
        selected.append((chosen.nonzero().view(-1) + number * _BLOCK).to(dtype))
    return torch.cat(selected), used
