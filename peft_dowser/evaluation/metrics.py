"""Metrics: what a fine-tuned model keeps and learns, how masks overlap, and how alike two scores rank (Eq. 9, 28-31).

Results of an evaluation are fractions or percent, all of one call in the same unit, which the function also returns
unless it says otherwise. A result that is negative, infinite or NaN, or a reference of 0, raises a ValueError.

`accuracy[t][i]` is A_ti, the accuracy on task i after training task t, shape `(T, T)`. Only i <= t is read: above the
diagonal there may be NaN, and in a nested sequence nothing at all. Other shapes raise a ValueError.

Masks are flat positions, strictly increasing, shape `(nnz,)`, int32 or int64; two masks may differ in count, dtype and
device. Other positions raise a ValueError.
"""

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from ..delta.masks import shared_positions

# Entries that `spearman` ranks at most.
_SAMPLE = 1_000_000


def average(upstream: float, downstream: float) -> float:
    """Arithmetic mean of upstream and downstream accuracy (Avg, Eq. 9): (A_up + A_down) / 2."""
    _check_results(upstream=upstream, downstream=downstream)
    return (upstream + downstream) / 2


def h_score(upstream: float, downstream: float) -> float:
    """Harmonic mean of upstream and downstream accuracy (H-score, Eq. 9): 2 A_up A_down / (A_up + A_down).

    It is 0 where both are 0. The mean of several H-scores is not the H-score of the mean results.

    Note: CIDEr x 100 may exceed 100, which an accuracy in percent cannot, and this excess can decide a ranking: A_up =
    59.1 gives H = 80.0 with CIDEr 123.6, and 74.3 with CIDEr capped at 100. `h_score(retention(...), plasticity(...))`
    puts both on the scale of their references.
    """
    _check_results(upstream=upstream, downstream=downstream)
    if upstream == downstream == 0:
        return 0.0
    return 2 * upstream * downstream / (upstream + downstream)


def retention(upstream: float, base_upstream: float) -> float:
    """Fraction of the base model's upstream accuracy that is left (not in the paper): A_up / A_up(base)."""
    _check_results(upstream=upstream, base_upstream=base_upstream)
    return _fraction(upstream, base_upstream, "base_upstream")


def plasticity(downstream: float, best_downstream: float) -> float:
    """Fraction of the downstream accuracy of the best single-task model (not in the paper): A_down / A_down(best)."""
    _check_results(downstream=downstream, best_downstream=best_downstream)
    return _fraction(downstream, best_downstream, "best_downstream")


def _check_results(**results: float) -> None:
    for name, result in results.items():
        if not 0 <= result < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {result!r}.")


def _fraction(result: float, reference: float, name: str) -> float:
    if reference == 0:
        raise ValueError(f"{name} is 0, and no fraction of it exists. Check how the reference was evaluated.")
    return result / reference


def mean_finetune_accuracy(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean accuracy on each task just after it was learned (MFT, Eq. 28): sum_i A_ii / T."""
    return fmean([row[-1] for row in _lower_triangle(accuracy)])


def mean_final_accuracy(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean accuracy on all tasks after the last one (MFN, Eq. 29): sum_i A_Ti / T."""
    return fmean(_lower_triangle(accuracy)[-1])


def mean_average_accuracy(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean over time of the mean accuracy on the tasks seen so far (MAA, Eq. 30): sum_t (sum_{i<=t} A_ti / t) / T."""
    return fmean([fmean(row) for row in _lower_triangle(accuracy)])


def backward_transfer(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean change on the earlier tasks since each was learned (BWT, Eq. 31): sum_{i<T} (A_Ti - A_ii) / (T - 1).

    It is negative where earlier tasks are forgotten, and needs at least two tasks.

    Note: equals T / (T - 1) (MFN - MFT). Table 9 of the paper prints MFN - MFT, a division by T, as BWT; multiply it by
    T / (T - 1) to compare.
    """
    *earlier, final = _lower_triangle(accuracy)
    if not earlier:
        raise ValueError("Backward transfer needs at least 2 tasks, got 1.")
    return fmean([after - row[-1] for after, row in zip(final, earlier, strict=False)])


def _lower_triangle(accuracy: Sequence[Sequence[float]] | Tensor) -> list[Sequence[float]]:
    """Row t holds the accuracies on the tasks up to t, all of them checked."""
    if isinstance(accuracy, Tensor):
        if accuracy.dim() != 2:
            raise ValueError(f"accuracy must be a matrix of shape (T, T), got shape {tuple(accuracy.shape)}.")
        accuracy = accuracy.tolist()
    tasks = len(accuracy)
    if tasks == 0:
        raise ValueError("accuracy is empty; it needs one row for each task.")
    for seen, row in enumerate(accuracy, start=1):
        if len(row) not in (seen, tasks):
            raise ValueError(
                f"accuracy has {tasks} rows, so row {seen} must hold {seen} accuracies (the tasks seen so far) or "
                f"{tasks} (all), got {len(row)}."
            )
    triangle = [row[:seen] for seen, row in enumerate(accuracy, start=1)]
    for seen, row in enumerate(triangle, start=1):
        _check_results(**{f"accuracy on task {task} after task {seen}": a for task, a in enumerate(row, start=1)})
    return triangle


def hamming(first: Tensor, second: Tensor, numel: int) -> float:
    """Fraction of the `numel` weights of a matrix on which two masks differ (Appendix G): mean(M1 != M2).

    Masks of trained and masks of protected weights give the same number. It grows with the density of the masks:
    compare it with `random_hamming`.
    """
    if numel < 1:
        raise ValueError(f"numel must be an integer of at least 1, got {numel!r}.")
    common = _common(first, second, numel)
    return (len(first) + len(second) - 2 * common) / numel


def overlap(first: Tensor, second: Tensor) -> float:
    """Fraction of the smaller mask that lies in the other (not in the paper): |M1 & M2| / min(|M1|, |M2|).

    Neither mask may be empty. Two random masks of density p share a fraction p.
    """
    common = _common(first, second)
    if min(len(first), len(second)) == 0:
        raise ValueError(f"The overlap with an empty mask is undefined, got {len(first)} and {len(second)} positions.")
    return common / min(len(first), len(second))


def jaccard(first: Tensor, second: Tensor) -> float:
    """Common positions of two masks, as a fraction of all their positions (not in the paper): |M1 & M2| / |M1 | M2|.

    At most one mask may be empty. Two random masks of density p have p / (2 - p) in common.
    """
    common = _common(first, second)
    if len(first) + len(second) == 0:
        raise ValueError("The Jaccard index of two empty masks is undefined.")
    return common / (len(first) + len(second) - common)


def random_hamming(p: float, q: float) -> float:
    """The expected `hamming` of two independent random masks of densities p and q in [0, 1]: p + q - 2 p q.

    Note: 0.18 for two masks of 10 %. Table 8 of the paper has 0.226, the value of two masks of 13 %.
    """
    for name, density in (("p", p), ("q", q)):
        if not 0 <= density <= 1:
            raise ValueError(f"{name} must be a density in [0, 1], got {density!r}.")
    return p + q - 2 * p * q


def _common(first: Tensor, second: Tensor, numel: float = math.inf) -> int:
    _check_positions("first", first, numel)
    _check_positions("second", second, numel)
    few, many = sorted((first, second), key=len)
    return len(shared_positions(few.to(many.device), many)[0])


def _check_positions(name: str, positions: Tensor, numel: float) -> None:
    if positions.dim() != 1 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must hold flat positions, shape (nnz,), int32 or int64, got shape {tuple(positions.shape)}, "
            f"{positions.dtype}. Those of a dense mask are mask.flatten().nonzero().flatten()."
        )
    if not bool((positions[1:] > positions[:-1]).all()):
        raise ValueError(f"{name} must hold strictly increasing positions. Sort them, each once: positions.unique().")
    for position in positions[[0, -1]].tolist() if len(positions) else ():
        if not 0 <= position < numel:
            raise ValueError(f"{name} must hold positions in [0, {numel}), got {position}.")


def spearman(first: Tensor, second: Tensor, seed: int = 0) -> float:
    """Rank correlation of two scores of one matrix (Appendix G): Pearson's correlation of their ranks, in [-1, 1].

    Equal scores share the mean of their ranks, and infinite ones rank at the ends.

    Args:
        first: scores, any shape and float dtype.
        second: scores of the same shape; its dtype and device may differ.
        seed: seed of the sample that is ranked above 1e6 entries, one at random out of each of 1e6 equal stretches of
            the matrix, so that neither time nor memory grows. The same on every device; another seed changes the
            correlation by about 0.001.

    Raises:
        ValueError: shapes differ, there are no entries, some are NaN, or all that are ranked are equal.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"first and second must have one shape, got {tuple(first.shape)} and {tuple(second.shape)}. Scores are "
            "compared within one matrix."
        )
    if first.numel() == 0:
        raise ValueError(f"first and second have no entries to rank: their shape is {tuple(first.shape)}.")
    positions = _sample(first.numel(), seed)
    ranks = [_ranks("first", first, positions), _ranks("second", second, positions)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _sample(numel: int, seed: int) -> Tensor:
    """Positions of all entries or, where they are too many, of one at random in each of `_SAMPLE` stretches."""
    if numel <= _SAMPLE:
        return torch.arange(numel, device="cpu")
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(_SAMPLE, generator=generator, dtype=torch.float64, device="cpu")
    starts = torch.arange(_SAMPLE + 1, device="cpu") * numel // _SAMPLE
    return starts[:-1] + (chance * starts.diff()).long()


def _ranks(name: str, score: Tensor, positions: Tensor) -> Tensor:
    """Ranks, from 1, of the scores at these positions, float64; equal scores share the mean of their ranks."""
    if bad := int(score.isnan().sum()):
        raise ValueError(f"{name} has {bad} entries that are NaN, which have no rank.")
    ranked = score.detach().flatten()[positions.to(score.device)].cpu().double()
    _, group, size = ranked.unique(return_inverse=True, return_counts=True)
    if len(size) == 1:
        raise ValueError(
            f"{name} is constant over the {len(ranked)} entries that are ranked, so its rank correlation is undefined."
        )
    last = size.cumsum(0).double()
    return (last - (size.double() - 1) / 2)[group]
