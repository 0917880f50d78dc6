"""Masks: exactly the entries that a stable argsort of numpy would choose, in bounded memory."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from peft_dowser.delta import masks
from peft_dowser.delta.masks import (
    frozen_reason,
    select,
    select_jointly,
    select_rows,
    shared_positions,
    trained_count,
    transpose_positions,
)

ROWS, COLUMNS = 37, 29
NUMEL = ROWS * COLUMNS
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def from_bits(lowest: int, highest: int, generator: torch.Generator) -> Tensor:
    """Floats whose bits, read as integers, lie in `[lowest, highest)`."""
    return torch.randint(lowest, highest, (NUMEL,), generator=generator, dtype=torch.int32).view(torch.float32)


KINDS = {
    "uniform": lambda g: torch.rand(NUMEL, generator=g),
    "all the same": lambda g: torch.full((NUMEL,), 0.5),
    "many ties": lambda g: torch.randint(4, (NUMEL,), generator=g).float(),
    "mostly zero": lambda g: torch.rand(NUMEL, generator=g) * (torch.rand(NUMEL, generator=g) < 0.1),
    "subnormal": lambda g: from_bits(0, 300, g),
    "around the smallest normal": lambda g: from_bits(0x7FFFF0, 0x800010, g),
    "differing in the last bits": lambda g: from_bits(0x3F800000, 0x3F800200, g),
    "around a carry of the low half": lambda g: from_bits(0x3F80FFF0, 0x3F810010, g),
    "differing in the first bits": lambda g: (from_bits(0, 0x7F80, g).view(torch.int32) << 16).view(torch.float32),
    "every finite float": lambda g: from_bits(0, 0x7F800000, g),
    "extremes": lambda g: torch.tensor([0.0, 2.0**-149, TINY, 1.0, HUGE])[torch.randint(5, (NUMEL,), generator=g)],
}
COUNTS = [0, 1, 2, NUMEL // 10, NUMEL // 2, NUMEL - 1, NUMEL]


def scores(kind: str, seed: int = 0) -> Tensor:
    return KINDS[kind](torch.Generator().manual_seed(seed)).view(ROWS, COLUMNS)


def chosen(score: np.ndarray, count: int, largest: bool) -> np.ndarray:
    """Positions of the `count` lowest (or highest) of a row, sorted; ties go to the lowest position."""
    return np.sort(np.argsort(-score if largest else score, kind="stable")[:count])


def assert_positions(found: Tensor, expected: np.ndarray) -> None:
    assert found.dtype == torch.int32
    assert found.tolist() == expected.tolist()


def peak_bytes(work, folder: Path) -> int:
    """Most bytes that `work` holds at a time, by the allocator's own count."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    trace.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    sizes = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return int(np.cumsum(sizes).max())


# One matrix


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_lowest_or_highest_scores_are_selected(kind: str, count: int, largest: bool) -> None:
    score = scores(kind)
    before = score.clone()
    assert_positions(select(score, count, largest), chosen(score.numpy().ravel(), count, largest))
    assert torch.equal(score, before)


def test_low_scores_are_the_default() -> None:
    score = torch.tensor([[3.0, 1.0], [0.0, 2.0]])
    assert select(score, 2).tolist() == select_jointly([lambda: score], 2)[0].tolist() == [1, 2]
    assert select_rows(score, 1).tolist() == [1, 2]


@pytest.mark.parametrize("largest", [False, True])
def test_ties_go_to_the_lowest_positions(largest: bool) -> None:
    assert select(torch.tensor([5.0, 5, 5, 5]), 2, largest).tolist() == [0, 1]
    assert select_rows(torch.tensor([[5.0, 5, 5, 5], [0, 0, 0, 0]]), 2, largest).tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (NUMEL,), (1, NUMEL), (NUMEL, 1), (29, 37)])
def test_positions_are_flat_for_any_shape(shape: tuple[int, ...], largest: bool) -> None:
    score = scores("many ties").view(-1)[: np.prod(shape)].view(shape)
    count = (score.numel() + 1) // 2
    assert_positions(select(score, count, largest), chosen(score.numpy().ravel(), count, largest))


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("view", [lambda score: score.T, lambda score: score[::2, 1::3]], ids=["transposed", "strided"])
def test_a_view_is_numbered_in_its_own_order(view, largest: bool) -> None:
    score = view(scores("uniform"))
    assert not score.is_contiguous()
    assert_positions(select(score, 100, largest), chosen(score.numpy().ravel(), 100, largest))
    assert torch.equal(select_rows(score, 3, largest), select_rows(score.contiguous(), 3, largest))


# Several matrices

SHAPES = [(5, 7), (1, 1), (40, 3), (13, 11)]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("ratio", [0, 0.003, 0.1, 0.5, 0.99, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_several_matrices_share_one_ranking(kind: str, ratio: float, largest: bool) -> None:
    several = [
        scores(kind, seed).view(-1)[: rows * columns].view(rows, columns) for seed, (rows, columns) in enumerate(SHAPES)
    ]
    flat = np.concatenate([score.numpy().ravel() for score in several])
    together = chosen(flat, round(ratio * len(flat)), largest)
    found = select_jointly([score.clone for score in several], round(ratio * len(flat)), largest)
    first = 0
    for positions, score in zip(found, several, strict=True):
        inside = together[(together >= first) & (together < first + score.numel())]
        assert_positions(positions, inside - first)
        first += score.numel()


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("count", "expected"), [(0, [0, 0, 0]), (3, [3, 0, 0]), (5, [4, 1, 0]), (12, [4, 4, 4])])
def test_ties_go_to_the_earlier_matrix(count: int, expected: list[int], largest: bool) -> None:
    found = select_jointly([partial(torch.ones, 2, 2)] * 3, count, largest)
    assert [positions.tolist() for positions in found] == [list(range(number)) for number in expected]


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("matrices", "calls"), [(1, 1), (2, 3), (4, 3)])
def test_each_matrix_is_scored_at_most_three_times(matrices: int, calls: int, largest: bool) -> None:
    called = [0] * matrices

    def score(number: int) -> Tensor:
        called[number] += 1
        return scores("many ties", number)

    select_jointly([partial(score, number) for number in range(matrices)], NUMEL // 2, largest)
    assert called == [calls] * matrices


@pytest.mark.parametrize("largest", [False, True])
def test_one_score_matrix_exists_at_a_time(largest: bool) -> None:
    made: list[StorageWeakRef] = []

    def score() -> Tensor:
        assert all(earlier.expired() for earlier in made)
        fresh = scores("uniform", len(made))
        made.append(StorageWeakRef(fresh.untyped_storage()))
        return fresh

    select_jointly([score] * 3, NUMEL, largest)
    assert len(made) == 9


# Rows


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, COLUMNS - 1, COLUMNS])
@pytest.mark.parametrize("kind", KINDS)
def test_every_row_selects_its_own(kind: str, count: int, largest: bool) -> None:
    score = scores(kind)
    rows = [chosen(row, count, largest) + number * COLUMNS for number, row in enumerate(score.numpy())]
    assert_positions(select_rows(score, count, largest), np.concatenate(rows))


# Blocks and memory


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("block", [1, 7, 64, NUMEL - 1, NUMEL])
@pytest.mark.parametrize("kind", ["uniform", "many ties"])
def test_a_mask_does_not_depend_on_the_block(
    kind: str, block: int, largest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masks, "_BLOCK", block)
    flat = scores(kind).numpy().ravel()
    assert_positions(select(scores(kind), 400, largest), chosen(flat, 400, largest))
    rows = [chosen(row, 5, largest) + number * COLUMNS for number, row in enumerate(scores(kind).numpy())]
    assert_positions(select_rows(scores(kind), 5, largest), np.concatenate(rows))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # as torch said before 2.13
@pytest.mark.parametrize(("largest", "bound"), [(False, 0.5), (True, 1.5)])
def test_selecting_takes_no_sort_and_no_array_of_64_bit_integers(largest: bool, bound: float, tmp_path: Path) -> None:
    score = torch.rand(4096, 4096, generator=torch.Generator().manual_seed(0))
    found = []
    size = peak_bytes(lambda: found.append(select(score, score.numel() // 10, largest)), tmp_path)
    assert len(found[0]) == score.numel() // 10
    assert found[0].nbytes < size < bound * score.nbytes


@pytest.mark.parametrize("work", [select, select_rows])
def test_temporaries_are_bounded_by_the_block(work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "_BLOCK", 1 << 14)
    score = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    count = score.numel() // 100 if work is select else 10
    assert peak_bytes(lambda: work(score, count), tmp_path) < 0.35 * score.nbytes


# Two masks


@pytest.mark.parametrize("ratios", [(0.5, 0.2), (0.1, 0.9), (0, 0.5), (0.5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int32), (torch.int64, torch.int32)])
def test_shared_positions_are_found_in_both(ratios: tuple[float, float], dtypes: tuple[torch.dtype, ...]) -> None:
    generator = np.random.default_rng(0)
    one, other = (np.flatnonzero(generator.random(50) < ratio) for ratio in ratios)
    found = shared_positions(torch.from_numpy(one).to(dtypes[0]), torch.from_numpy(other).to(dtypes[1]))
    both, *expected = np.intersect1d(one, other, return_indices=True)
    assert [indices.tolist() for indices in found] == [indices.tolist() for indices in expected]
    assert {indices.dtype for indices in found} == {torch.int64}
    assert one[found[0]].tolist() == both.tolist()


# Counts, frozen matrices, transposes


@pytest.mark.parametrize(
    ("ratio", "numel", "expected"),
    [
        (0.1, 4096, 410),
        (0.1, 1, 0),
        (0.1, 5, 0),
        (0.1, 6, 1),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.25, 10, 2),
        (0.25, 14, 4),
        (0.001, 499, 0),
        (0.0, 100, 0),
        (1.0, 7, 7),
        (0.1, 2**33, 858_993_459),
    ],
)
def test_the_count_is_rounded_halves_to_even(ratio: float, numel: int, expected: int) -> None:
    assert trained_count(ratio, numel) == expected


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([0.0, 1.0, 0.0], None),
        ([1.0, 1.0000001, 1.0], None),
        ([0.0, 2.0**-149], None),
        ([HUGE, 0.0], None),
        ([0.0, 0.0], "all scores are equal"),
        ([3.5, 3.5, 3.5], "all scores are equal"),
        ([7.0], "all scores are equal"),
        ([1.0, NAN, 2.0], "scores are not finite"),
        ([NAN, NAN], "scores are not finite"),
        ([1.0, INF, 2.0], "scores are not finite"),
        ([INF, INF], "scores are not finite"),
        ([1.0, 2.0, -INF], "scores are not finite"),
        ([INF, NAN], "scores are not finite"),
    ],
)
def test_scores_that_cannot_be_ranked_have_a_reason(values: list[float], reason: str | None) -> None:
    assert frozen_reason(torch.tensor(values)) == frozen_reason(torch.tensor([values, values])) == reason


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 5), (64, 33)])
@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_a_mask_is_transposed(shape: tuple[int, int], ratio: float, dtype: torch.dtype) -> None:
    mask = np.random.default_rng(0).random(shape) < ratio
    found = transpose_positions(torch.from_numpy(np.flatnonzero(mask)).to(dtype), shape)
    assert found.dtype == dtype
    assert found.tolist() == np.flatnonzero(mask.T).tolist()


@pytest.mark.parametrize(("shape", "dtype"), [((46_340, 46_341), torch.int32), ((70_000, 40_000), torch.int64)])
def test_positions_of_a_huge_matrix_are_transposed_without_overflow(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = np.array([0, 0, 1, shape[0] - 1, shape[0] - 1]), np.array([0, shape[1] - 1, 5, 0, shape[1] - 1])
    given = torch.from_numpy(np.ravel_multi_index((rows, columns), shape)).to(dtype)
    found = transpose_positions(given, shape)
    assert found.dtype == dtype
    assert found.tolist() == np.sort(np.ravel_multi_index((columns, rows), shape[::-1])).tolist()
