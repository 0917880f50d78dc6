"""Metrics: what a fine-tuned model keeps and learns, how masks overlap, and how alike two scores rank (Eq. 9, 28-31).

Plain functions of numbers and tensors. Results of an evaluation may be fractions or percent, as long as all that enter
one call are in the same unit; a function returns that unit unless it says otherwise. A result that is negative,
infinite or NaN raises a ValueError, and so does a reference of 0.

Masks are flat positions, strictly increasing, shape `(nnz,)`, int32 or int64; two masks may differ in count, dtype and
device. Other positions raise a ValueError.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..delta.masks import shared

# Entries that `spearman` ranks at most.
_SAMPLE = 1_000_000


def average(upstream: float, downstream: float) -> float:
    """Arithmetic mean of what is kept and what is learned (Avg, Eq. 9): (A_up + A_down) / 2.

    Args:
        upstream: A_up, the mean accuracy over the upstream benchmarks.
        downstream: A_down, accuracy or CIDEr x 100 on the downstream task.
    """
    _check_results(upstream=upstream, downstream=downstream)
    return (upstream + downstream) / 2


def h_score(upstream: float, downstream: float) -> float:
    """Harmonic mean of what is kept and what is learned (H-score, Eq. 9): 2 A_up A_down / (A_up + A_down).

    Args:
        upstream: as in `average`.
        downstream: as in `average`.

    Returns:
        The H-score, at most twice the smaller result; 0 where both are 0.

    Note: CIDEr x 100 may exceed 100, and an accuracy in percent cannot. H then exceeds what the same A_up could reach
    with any accuracy, and the excess can decide a ranking: A_up = 59.1 with CIDEr 123.6 gives H = 80.0, and with CIDEr
    capped at 100 it gives 74.3. `h_score(retention(...), plasticity(...))` puts both on the scale of their references.
    The mean of several H-scores is not the H-score of the mean results.
    """
    _check_results(upstream=upstream, downstream=downstream)
    if upstream == downstream == 0:
        return 0.0
    return 2 * upstream * downstream / (upstream + downstream)


def retention(upstream: float, base_upstream: float) -> float:
    """Fraction of the base model's upstream result that is left (not in the paper): A_up / A_up(base).

    Args:
        upstream: A_up of the fine-tuned model.
        base_upstream: A_up of the base model, on the same benchmarks and in the same unit.

    Returns:
        A fraction: 1 where nothing is forgotten, above 1 where fine-tuning also helped upstream.
    """
    _check_results(upstream=upstream, base_upstream=base_upstream)
    _check_reference(base_upstream=base_upstream)
    return upstream / base_upstream


def plasticity(downstream: float, best_downstream: float) -> float:
    """Fraction of the best known downstream result that is reached (not in the paper): A_down / A_down(best).

    Args:
        downstream: A_down of the fine-tuned model.
        best_downstream: A_down of the best single-task model, on the same test set and in the same unit.

    Returns:
        A fraction: 1 where the reference is reached, above 1 where it is exceeded.
    """
    _check_results(downstream=downstream, best_downstream=best_downstream)
    _check_reference(best_downstream=best_downstream)
    return downstream / best_downstream


def _check_results(**results: float) -> None:
    for name, result in results.items():
        if not 0 <= result < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {result!r}.")


def _check_reference(**reference: float) -> None:
    for name, result in reference.items():
        if result == 0:
            raise ValueError(f"{name} is 0, and no fraction of it exists. Check how the reference was evaluated.")


def mean_finetune_accuracy(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean accuracy on each task just after it was learned (MFT, Eq. 28): sum_i A_ii / T.

    Args:
        accuracy: `accuracy[t][i]` is A_ti, on task i after training task t, shape `(T, T)`. Only i <= t is read: above
            the diagonal there may be NaN, and in a nested sequence nothing at all.

    Raises:
        ValueError: there is no task, or the shape is not `(T, T)` or its lower triangle.
    """
    return _mean([row[-1] for row in _lower_triangle(accuracy)])


def mean_final_accuracy(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean accuracy over all tasks at the end of the sequence (MFN, Eq. 29): sum_i A_Ti / T.

    Args:
        accuracy: as in `mean_finetune_accuracy`.
    """
    return _mean(_lower_triangle(accuracy)[-1])


def mean_average_accuracy(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean over time of the mean accuracy on the tasks seen so far (MAA, Eq. 30): sum_t (sum_{i<=t} A_ti / t) / T.

    Args:
        accuracy: as in `mean_finetune_accuracy`.
    """
    return _mean([_mean(row) for row in _lower_triangle(accuracy)])


def backward_transfer(accuracy: Sequence[Sequence[float]] | Tensor) -> float:
    """Mean change on the earlier tasks since each was learned (BWT, Eq. 31): sum_{i<T} (A_Ti - A_ii) / (T - 1).

    Args:
        accuracy: as in `mean_finetune_accuracy`, of at least two tasks.

    Returns:
        BWT; negative where earlier tasks are forgotten.

    Raises:
        ValueError: as in `mean_finetune_accuracy`, or there is only one task.

    Note: equals T / (T - 1) (MFN - MFT). The BWT printed in Table 9 of the paper is MFN - MFT, a division by T;
    multiply it by T / (T - 1) to compare.
    """
    *earlier, final = _lower_triangle(accuracy)
    if not earlier:
        raise ValueError("Backward transfer needs at least 2 tasks, got 1.")
    return _mean([after - row[-1] for after, row in zip(final, earlier, strict=False)])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


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
    """Fraction of the weights on which two masks of one matrix differ (Appendix G): mean(M1 != M2).

    Args:
        first: the first mask.
        second: the second mask.
        numel: number of entries of the matrix, at least 1.

    Returns:
        A fraction: 0 where the masks agree. Masks of trained and masks of protected weights give the same number.

    Note: grows with the density of the masks; compare it with `random_hamming`.
    """
    if numel < 1:
        raise ValueError(f"numel must be an integer of at least 1, got {numel!r}.")
    common = _common(first, second, numel)
    return (len(first) + len(second) - 2 * common) / numel


def overlap(first: Tensor, second: Tensor) -> float:
    """Fraction of the smaller mask that the other one shares (not in the paper): |M1 & M2| / min(k1, k2).

    Args:
        first: the first mask, shape `(k1,)`, not empty.
        second: the second mask, shape `(k2,)`, not empty.

    Returns:
        A fraction: 1 where one mask contains the other. For masks of one size k it is |M1 & M2| / k.

    Note: two random masks of density p share a fraction p.
    """
    common = _common(first, second)
    if min(len(first), len(second)) == 0:
        raise ValueError(f"The overlap with an empty mask is undefined, got {len(first)} and {len(second)} positions.")
    return common / min(len(first), len(second))


def jaccard(first: Tensor, second: Tensor) -> float:
    """Common positions of two masks, as a fraction of all their positions (not in the paper): |M1 & M2| / |M1 | M2|.

    Args:
        first: the first mask.
        second: the second mask; not both are empty.

    Returns:
        A fraction: 1 where the masks are equal, 0 where they share nothing.

    Note: two random masks of density p have p / (2 - p) in common.
    """
    common = _common(first, second)
    if len(first) + len(second) == 0:
        raise ValueError("The Jaccard index of two empty masks is undefined.")
    return common / (len(first) + len(second) - common)


def random_hamming(p: float, q: float) -> float:
    """`hamming` that two independent random masks are expected to have: p + q - 2 p q.

    Args:
        p: density of the first mask, the fraction of weights in it, in [0, 1].
        q: density of the second mask, likewise.

    Returns:
        A fraction, whichever scope the masks were ranked in.

    Note: 0.18 for two masks of 10 %. The random baseline of Table 8, 0.226, is that of two masks of 13 %.
    """
    for name, density in (("p", p), ("q", q)):
        if not 0 <= density <= 1:
            raise ValueError(f"{name} must be a density in [0, 1], got {density!r}.")
    return p + q - 2 * p * q


def _common(first: Tensor, second: Tensor, numel: float = math.inf) -> int:
    """Number of positions in both masks, by binary search of the fewer in the more."""
    _check_positions("first", first, numel)
    _check_positions("second", second, numel)
    few, many = sorted((first, second), key=len)
    return len(shared(few.to(many.device), many)[0])


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
    """Rank correlation of two scores of one matrix (Appendix G): Pearson's correlation of their ranks.

    Args:
        first: scores, any shape and float dtype; read only. Infinite scores rank at the ends.
        second: scores of the same shape; its dtype and device may differ.
        seed: seed of the sample that is ranked above 1e6 entries. One seed gives one sample, on every device.

    Returns:
        The correlation, in [-1, 1]: 1 where both rank alike, about 0 for a random score. Equal scores share the mean
        of their ranks.

    Raises:
        ValueError: shapes differ, there are no entries, some are NaN, or all that are ranked are equal.

    Note: above 1e6 entries, one at random out of each of 1e6 equal stretches of the matrix is ranked, so that neither
    time nor memory grows; the correlation then moves by about 0.001 with the seed. Computes in float64 on the CPU.
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
