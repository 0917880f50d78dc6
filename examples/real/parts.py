"""Which runs answer which question. A part of the study gives lists of runs, one after the other: the later ones depend
on what the earlier ones found, for rates are chosen on a seed of their own and judged on the others."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from curves import Record, base_of, trajectory
from fine_tuning import SWEEP_SEED, Run
from learners import FIXED_SIZE, METHODS

RATIO = 0.1
# The first rate of a method at rho = 0.1, in steps of a factor of 2 from 1e-4. The second one is twice as large.
FIRST = {"full": 0, "lora r=64": 1, "lora r=16": 2, "oft": 3, "dowser, high": 2, "shift, high": 2}
FIRST |= {"random": 3, "magnitude": 3, "magnitude, high": 3, "columns, random": 3, "shift": 5, "shift, model": 5}
FIRST |= {"columns, activity, 16": 5, "lora-fa r=16": 3}
OTHERS = 4
LEVEL = 0.6  # of what the best run learned: where the rates of a method are compared

LEAD = ("lora r=16", "random", "dowser", "columns, activity", "full")
SCORES = ("shift", "wanda", "magnitude", "magnitude, high", "dowser, model", "shift, model")
ENDS = ("magnitude", "magnitude, high", "dowser", "dowser, high", "shift", "shift, high", "random")
CHANNELS = ("columns, activity", "columns, activity, 16", "columns, shift", "columns, dowser", "columns, random")
RATIOS = (0.01, 0.03, 0.5)


@dataclass(frozen=True)
class Scope:
    """How much is done.

    Attributes:
        model: folder of the base.
        seeds: of the runs that are judged.
        steps: of a training.
        widened: how often a sweep of rates is widened, at most.
    """

    model: str
    seeds: Sequence[int]
    steps: int
    widened: int = 3

    def run(self, lesson: str, method: str, rate: float, seed: int, ratio: float = RATIO, **others: object) -> Run:
        ratio = 1.0 if method in FIXED_SIZE else ratio
        return Run(self.model, lesson, method, ratio, rate, seed, self.steps, **others)


Batches = Iterator[list[Run]]


def first_rate(method: str, ratio: float) -> float:
    """The smaller of the first two rates: fewer trained weights need larger steps."""
    power = FIRST.get(method, OTHERS)
    while method not in FIXED_SIZE and ratio < RATIO:
        ratio, power = ratio * 3, power + 1
    while method not in FIXED_SIZE and ratio > RATIO:
        ratio, power = ratio / 3, power - 1
    return 1e-4 * 2.0**power


def tuned(
    scope: Scope,
    records: Sequence[Record],
    methods: Sequence[str],
    lesson: str = "tongue",
    ratio: float = RATIO,
    dtype: str = "bfloat16",
) -> Batches:
    """Every method at the rate that a sweep chose, seed by seed, so that a study that is cut short has pairs."""
    cells = [scope.run(lesson, method, first_rate(method, ratio), SWEEP_SEED, ratio, dtype=dtype) for method in methods]
    yield [replace(cell, learning_rate=cell.learning_rate * factor) for cell in cells for factor in (1, 2)]
    for _ in range(scope.widened):
        yield [run for cell in cells for run in _wider(cell, records)]
    chosen = [(cell, best_rate(cell, records)) for cell in cells]
    for seed in scope.seeds:
        yield [replace(cell, learning_rate=rate, seed=seed) for cell, rate in chosen if rate is not None]


def rates(cell: Run, records: Sequence[Record]) -> dict[float, float | None]:
    """The rates of a sweep, with the rise of the loss on the base's own answers at a common level of learning.

    None stands for a rate that does not learn so much.
    """
    same = ("lesson", "dtype", "seed", "steps")
    swept = [
        record
        for record in records
        if record["method"] != "base" and not record["rehearsal"] and all(record[k] == getattr(cell, k) for k in same)
    ]
    curves = [trajectory(record, base_of(record, records)) for record in swept]
    level = LEVEL * max((found.learned.max() for found in curves), default=0.0)
    costs = {}
    for record, found in zip(swept, curves, strict=True):
        if (record["method"], record["update_ratio"]) == (cell.method, cell.update_ratio):
            cost = found.at(level, "own loss")
            costs[record["learning_rate"]] = None if cost is None else float(cost.mean())
    return costs


def best_rate(cell: Run, records: Sequence[Record]) -> float | None:
    """The rate that harms least at equal learning; the largest one if none learns so much, None if none was tried."""
    costs = rates(cell, records)
    able = {rate: cost for rate, cost in costs.items() if cost is not None}
    return min(able, key=lambda rate: able[rate]) if able else max(costs, default=None)


def _wider(cell: Run, records: Sequence[Record]) -> list[Run]:
    """The next rate, if the best one is the smallest or the largest that was tried."""
    tried, best = rates(cell, records), best_rate(cell, records)
    if best is None or min(tried) < best < max(tried):
        return []
    return [replace(cell, learning_rate=best * (2 if best == max(tried) else 0.5))]


# The parts


def quick(scope: Scope, records: Sequence[Record]) -> Batches:
    methods = LEAD[:4]
    yield [scope.run("tongue", method, first_rate(method, RATIO), 0) for method in methods]


def lead(scope: Scope, records: Sequence[Record]) -> Batches:
    yield from tuned(scope, records, LEAD[:-1])
    yield from tuned(scope, records, LEAD[-1:])  # the dearest one


def hard(scope: Scope, records: Sequence[Record]) -> Batches:
    """Twice and four times the best rate: there is more to forget."""
    for method in LEAD:
        cell = scope.run("tongue", method, 0.0, SWEEP_SEED)
        if rate := best_rate(cell, records):
            yield [replace(cell, learning_rate=factor * rate, seed=seed) for factor in (2, 4) for seed in scope.seeds]


def answers(scope: Scope, records: Sequence[Record]) -> Batches:
    yield from tuned(scope, records, LEAD, "records")


def everything(scope: Scope, records: Sequence[Record]) -> Batches:
    yield from tuned(scope, records, METHODS)


def ends(scope: Scope, records: Sequence[Record]) -> Batches:
    for dtype in ("bfloat16", "float32"):
        for ratio in (RATIO, *RATIOS):
            yield from tuned(scope, records, ENDS, ratio=ratio, dtype=dtype)


def scores(scope: Scope, records: Sequence[Record]) -> Batches:
    yield from tuned(scope, records, SCORES)


def channels(scope: Scope, records: Sequence[Record]) -> Batches:
    yield from tuned(scope, records, CHANNELS)


def ratios(scope: Scope, records: Sequence[Record]) -> Batches:
    for ratio in RATIOS:
        yield from tuned(scope, records, ("random", "dowser", "columns, activity", "shift"), ratio=ratio)


def rehearsal(scope: Scope, records: Sequence[Record]) -> Batches:
    """Every leading method beside rehearsal, at its rate without; and how much and how often, for two of them."""
    swept = [scope.run("tongue", method, 0.0, SWEEP_SEED) for method in LEAD]
    cells = [replace(cell, learning_rate=rate) for cell in swept if (rate := best_rate(cell, records))]
    for seed in scope.seeds:
        yield [replace(cell, rehearsal=1.0, seed=seed) for cell in cells]
    for weight, every in ((0.3, 1), (3.0, 1), (2.0, 2), (4.0, 4)):
        for cell in cells:
            if cell.method in ("lora r=16", "columns, activity"):
                yield [replace(cell, rehearsal=weight, every=every, seed=seed) for seed in scope.seeds]


PARTS: dict[str, Callable[[Scope, Sequence[Record]], Batches]] = {
    "lead": lead,
    "hard": hard,
    "answers": answers,
    "scores": scores,
    "channels": channels,
    "rehearsal": rehearsal,
    "ratios": ratios,
    "ends": ends,
    "everything": everything,
}
