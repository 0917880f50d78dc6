"""Metrics: the paper's own rows, sets for the masks, and scipy for the ranks."""

import math
from statistics import fmean

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from peft_dowser.evaluation import metrics
from peft_dowser.evaluation.metrics import (
    average,
    backward_transfer,
    h_score,
    hamming,
    jaccard,
    mean_average_accuracy,
    mean_final_accuracy,
    mean_finetune_accuracy,
    overlap,
    plasticity,
    random_hamming,
    retention,
    spearman,
)

NAN, INF = math.nan, math.inf

# Upstream and downstream: Tables 1, 2 and 5, the six upstream columns, A_down, Avg and H-score.

ROWS = {
    "NVILA COCO zero-shot": ([70.8, 51.2, 69.4, 78.1, 42.2, 62.3], 26.1, 44.2, 36.8),
    "NVILA COCO SPIDER": ([65.3, 42.3, 67.8, 72.0, 48.4, 59.6], 115.4, 87.3, 78.3),
    "NVILA COCO Dowser": ([69.3, 48.6, 68.8, 77.7, 50.8, 60.7], 135.5, 99.1, 85.7),
    "NVILA ImageNet-R Dowser": ([64.4, 45.7, 68.6, 75.7, 38.8, 59.4], 90.3, 74.5, 71.2),
    "LLaVA COCO full": ([52.7, 48.8, 63.0, 63.9, 58.0, 57.5], 100.0, 78.7, 72.9),
    "LLaVA COCO Dowser": ([57.0, 54.3, 65.0, 62.9, 55.0, 60.3], 123.6, 91.3, 79.9),
    "LLaVA ImageNet-R Dowser": ([54.6, 48.4, 64.8, 64.4, 55.8, 56.5], 88.8, 73.1, 69.7),
    "LLaVA Flickr30k Dowser": ([56.5, 55.2, 63.3, 63.8, 55.1, 59.6], 85.0, 72.0, 69.6),
}


@pytest.mark.parametrize("row", ROWS)
def test_the_rows_of_the_paper(row: str) -> None:
    upstream, downstream, printed_average, printed_h = ROWS[row]
    assert average(fmean(upstream), downstream) == pytest.approx(printed_average, abs=0.06)
    assert h_score(fmean(upstream), downstream) == pytest.approx(printed_h, abs=0.06)


@pytest.mark.parametrize(
    ("upstream", "downstream", "expected"), [(0, 0, 0), (0, 50, 0), (50, 0, 0), (60, 60, 60), (0.3, 0.6, 0.4)]
)
def test_the_h_score_lies_near_the_smaller_result(upstream: float, downstream: float, expected: float) -> None:
    assert h_score(upstream, downstream) == h_score(downstream, upstream) == pytest.approx(expected)


@pytest.mark.parametrize("fraction", [retention, plasticity])
def test_fractions_of_a_reference(fraction) -> None:
    assert fraction(0, 60) == 0
    assert fraction(45, 60) == 0.75
    assert fraction(75, 60) == 1.25
    with pytest.raises(ValueError, match=r"(base_up|best_down)stream is 0, and no fraction of it exists\. Check how"):
        fraction(45, 0)


@pytest.mark.parametrize("bad", [-0.1, NAN, INF])
@pytest.mark.parametrize("metric", [average, h_score, retention, plasticity])
def test_bad_results_are_refused(metric, bad: float) -> None:
    for results in [(bad, 50.0), (50.0, bad)]:
        with pytest.raises(ValueError, match=rf"stream must be a finite number of at least 0, got {bad}\."):
            metric(*results)


# Continual learning

RAGGED = [[90], [72, 80], [50, 60, 40]]
PADDED = [[90, NAN, NAN], [72, 80, NAN], [50, 60, 40]]
FORMS = {"ragged": RAGGED, "padded": PADDED, "tensor": torch.tensor(PADDED)}
CONTINUAL = [mean_finetune_accuracy, mean_final_accuracy, mean_average_accuracy, backward_transfer]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("metric", "expected"), list(zip(CONTINUAL, [70, 50, 72, -30], strict=True)))
def test_three_tasks_by_hand(metric, expected: float, form: str) -> None:
    assert metric(FORMS[form]) == pytest.approx(expected)


@pytest.mark.parametrize("tasks", [2, 5, 9])
def test_backward_transfer_is_the_loss_from_mft_to_mfn(tasks: int) -> None:
    accuracy = torch.rand(tasks, tasks, generator=torch.Generator().manual_seed(tasks))
    change = mean_final_accuracy(accuracy) - mean_finetune_accuracy(accuracy)
    assert backward_transfer(accuracy) == pytest.approx(tasks / (tasks - 1) * change)


@pytest.mark.parametrize(
    ("upstream", "final", "printed_mfn", "printed_h"),
    [
        (40.2, [60.0, 50.1, 20.6, 51.0, 91.6], 54.7, 46.3),
        (40.6, [66.0, 50.0, 21.2, 51.1, 91.3], 55.9, 47.0),
        (61.2, [73.2, 51.5, 35.0, 49.6, 90.9], 60.0, 60.6),
        (61.2, [78.8, 61.2, 48.0, 53.5, 91.4], 66.6, 63.8),
    ],
    ids=["full", "Tailor", "MoELoRA", "Dowser"],
)
def test_the_continual_rows_of_the_paper(
    upstream: float, final: list[float], printed_mfn: float, printed_h: float
) -> None:
    mfn = mean_final_accuracy([[0.0] * 5] * 4 + [final])
    assert mfn == pytest.approx(printed_mfn, abs=0.06)
    assert h_score(upstream, mfn) == pytest.approx(printed_h, abs=0.06)


def test_one_task_has_no_backward_transfer() -> None:
    assert [metric([[60]]) for metric in CONTINUAL[:3]] == [60, 60, 60]
    with pytest.raises(ValueError, match=r"needs at least 2 tasks, got 1\."):
        backward_transfer([[60]])


@pytest.mark.parametrize("metric", CONTINUAL)
@pytest.mark.parametrize(
    ("accuracy", "problem"),
    [
        ([], r"accuracy is empty; it needs one row for each task\."),
        (torch.zeros(0, 0), "accuracy is empty"),
        (torch.zeros(3), r"must be a matrix of shape \(T, T\), got shape \(3,\)\."),
        (torch.zeros(2, 3), r"2 rows, so row 1 must hold 1 accuracies \(the tasks seen so far\) or 2 \(all\), got 3\."),
        ([[1], [1], [1, 1, 1]], "3 rows, so row 2 must hold 2 accuracies .* got 1"),
        ([[1], [1, NAN]], "accuracy on task 2 after task 2 must be a finite number of at least 0, got nan"),
        ([[1, 1], [-1, 1]], "accuracy on task 1 after task 2 must be a finite number of at least 0, got -1"),
    ],
)
def test_bad_accuracies_are_refused(metric, accuracy, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        metric(accuracy)


# Masks

NUMEL = 1000
DTYPES = [torch.int32, torch.int64]


def mask(count: int, seed: int) -> Tensor:
    """Positions of `count` random entries of `NUMEL`."""
    return torch.randperm(NUMEL, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("counts", [(100, 100), (1, 999), (300, 7), (1000, 1000), (1000, 1)])
def test_masks_are_compared_as_sets(counts: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    first, second = (mask(count, seed).to(dtypes[seed]) for seed, count in enumerate(counts))
    ones, others = set(first.tolist()), set(second.tolist())
    assert hamming(first, second, NUMEL) == len(ones ^ others) / NUMEL
    assert overlap(first, second) == len(ones & others) / min(counts)
    assert jaccard(first, second) == len(ones & others) / len(ones | others)


def test_masks_of_special_kinds() -> None:
    few, none = torch.tensor([2, 5, 9]), torch.tensor([], dtype=torch.int32)
    assert (hamming(few, few, 10), overlap(few, few), jaccard(few, few)) == (0, 1, 1)
    assert (hamming(few, few + 10, 20), overlap(few, few + 10), jaccard(few, few + 10)) == (0.3, 0, 0)
    assert (hamming(few, none, 10), hamming(none, none, 10), jaccard(few, none)) == (0.3, 0, 0)
    huge = torch.tensor([0, 2**33])
    assert overlap(huge, none.new_tensor([0, 7])) == 0.5
    assert jaccard(torch.arange(20)[::2], torch.arange(20)[::2]) == 1


@pytest.mark.parametrize(("p", "q"), [(0.1, 0.1), (0.5, 0.2), (0, 0.3), (1, 1)])
def test_random_masks_differ_as_expected(p: float, q: float) -> None:
    pairs = [(mask(round(p * NUMEL), seed), mask(round(q * NUMEL), seed + 100)) for seed in range(100)]
    found = fmean(hamming(first, second, NUMEL) for first, second in pairs)
    assert found == pytest.approx(random_hamming(p, q), abs=0.005)


@pytest.mark.parametrize(
    ("positions", "problem"),
    [
        (
            torch.zeros(5, 2, dtype=torch.bool),
            r"shape \(nnz,\), int32 or int64, got shape \(5, 2\), torch\.bool\. Those",
        ),
        (torch.tensor([0.0, 1.0]), r"int32 or int64, got shape \(2,\), torch\.float32\."),
        (torch.tensor([1, 1]), r"strictly increasing positions\. Sort them, each once: positions\.unique\(\)\."),
        (torch.tensor([3, 1]), "strictly increasing positions"),
        (torch.tensor([-1, 1]), r"positions in \[0, (10|inf)\), got -1\."),
    ],
)
def test_bad_positions_are_refused(positions: Tensor, problem: str) -> None:
    good = torch.tensor([0, 9])
    for measure in (lambda a, b: hamming(a, b, 10), overlap, jaccard):
        with pytest.raises(ValueError, match="first must hold .*" + problem):
            measure(positions, good)
        with pytest.raises(ValueError, match="second must hold .*" + problem):
            measure(good, positions)


def test_undefined_comparisons_of_masks_are_refused() -> None:
    some, none = torch.tensor([0, 9]), torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"second must hold positions in \[0, 9\), got 9\."):
        hamming(none, some, 9)
    with pytest.raises(ValueError, match=r"numel must be an integer of at least 1, got 0\."):
        hamming(none, none, 0)
    with pytest.raises(ValueError, match=r"overlap with an empty mask is undefined, got 2 and 0 positions\."):
        overlap(some, none)
    with pytest.raises(ValueError, match=r"Jaccard index of two empty masks is undefined\."):
        jaccard(none, none)


@pytest.mark.parametrize("bad", [-0.1, 1.1, NAN])
def test_densities_out_of_range_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"p must be a density in \[0, 1\], got {bad}\."):
        random_hamming(bad, 0.1)
    with pytest.raises(ValueError, match=rf"q must be a density in \[0, 1\], got {bad}\."):
        random_hamming(0.1, bad)


# Scores


def alike(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two scores that rank alike, but not the same."""
    first, noise = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed))
    return first, first + noise


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("shape", [(50,), (40, 30), (3, 4, 5)])
def test_the_correlation_is_that_of_scipy(shape: tuple[int, ...], levels: int, dtype: torch.dtype) -> None:
    first, second = ((levels * score).round().to(dtype) for score in alike(shape))
    expected = spearmanr(first.double().flatten(), second.double().flatten()).statistic
    assert spearman(first, second) == pytest.approx(expected, abs=1e-12)
    assert spearman(first, second.float()) == spearman(first, second)


def test_scores_of_special_kinds() -> None:
    score, _ = alike((20, 30))
    assert spearman(score, score.exp()) == pytest.approx(1)
    assert spearman(score, -score) == pytest.approx(-1)
    assert spearman(score.T, (2 * score).T.contiguous().requires_grad_()) == pytest.approx(1)
    assert spearman(torch.tensor([0.0, 1.0, INF]), torch.tensor([-INF, 0.0, 5.0])) == pytest.approx(1)
    assert spearman(torch.tensor([0.0, -0.0, 1.0]), torch.tensor([3.0, 3.0, 4.0])) == pytest.approx(1)


def test_a_large_matrix_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(metrics._sample(10**9, seed=0)) == 1_000_000
    monkeypatch.setattr(metrics, "_SAMPLE", 50_000)
    first, second = alike((300, 500))
    state = torch.random.get_rng_state()
    found = [spearman(first, second, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found == pytest.approx([spearmanr(first.flatten(), second.flatten()).statistic] * 3, abs=0.01)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("numel", [7, 8, 9, 20, 70, 1000])
def test_a_sample_has_no_entry_twice_and_reaches_every_entry(numel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_SAMPLE", 7)
    samples = [metrics._sample(numel, seed).tolist() for seed in range(1500)]
    assert all(len(set(sample)) == len(sample) == 7 for sample in samples)
    assert set().union(*samples) == set(range(numel))


@pytest.mark.parametrize(
    ("first", "second", "problem"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"must have one shape, got \(2, 3\) and \(3, 2\)\. Scores are compared"),
        (torch.ones(0, 3), torch.ones(0, 3), r"no entries to rank: their shape is \(0, 3\)\."),
        (torch.tensor([1.0, NAN]), torch.arange(2.0), r"first has 1 entries that are NaN, which have no rank\."),
        (torch.arange(2.0), torch.tensor([NAN, NAN]), "second has 2 entries that are NaN"),
        (torch.ones(4), torch.arange(4.0), "first is constant over the 4 entries that are ranked, so .* is undefined"),
        (torch.arange(4.0), torch.zeros(4), "second is constant over the 4 entries"),
    ],
)
def test_scores_without_a_correlation_are_refused(first: Tensor, second: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        spearman(first, second)
