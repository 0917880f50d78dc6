"""Which runs make which table. Plain lists: every part of the study names its runs, and no run is done twice."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from fine_tune import Record, Run
from methods import AFTERWARDS, DENSE, PEERS, SPARSE

CORE = ("dowser", "dowser+images", "random", "magnitude", "wanda", "full")
RATE = 1e-3  # at which all methods are compared before any rate is tuned
HARSH_RATE = 2e-3  # at which the core is compared too: there is more to forget
SWEEP_SEED = 100  # rates are chosen on this seed and judged on the others
LOW, MIDDLE, HIGH = (2.5e-4, 5e-4, 1e-3), (5e-4, 1e-3, 2e-3), (1e-3, 2e-3, 4e-3)
HIGHEST = (4e-3, 8e-3, 1.6e-2)
SEQUENCE = "style+desc+name"
SEQUENCE_METHODS = ("full", "random", "magnitude", "dowser", "dowser+images", "lora")
# A rate is good enough if it reaches the best downstream accuracy of any method within this many points.
TOLERANCE = 1.5


@dataclass(frozen=True)
class Scope:
    """How much of a study is done.

    Attributes:
        models: folders or Hub ids.
        tasks: new tasks.
        seeds: seeds of the runs that are judged.
        steps: optimizer steps of a run.
    """

    models: Sequence[str]
    tasks: Sequence[str]
    seeds: Sequence[int]
    steps: int

    def runs(self, method: str, ratio: float, rate: float) -> list[Run]:
        ratio = 1.0 if method in DENSE else ratio
        return [
            Run(model, task, method, ratio, rate, seed, self.steps)
            for model in self.models
            for task in self.tasks
            for seed in self.seeds
        ]


def rates(method: str, ratio: float) -> tuple[float, ...]:
    """Learning rates that are tried: fewer trained parameters need larger ones."""
    if method == "osf":
        return HIGHEST
    if method in (*DENSE, *AFTERWARDS):
        return LOW
    if ratio < 0.25:
        return HIGH
    return LOW if method == "lora" else MIDDLE


def common(scope: Scope) -> list[Run]:
    """Tables 1, 4 and 6: every method at rho = 0.5 and one learning rate, the core at a second one too."""
    core = [run for rate in (RATE, HARSH_RATE) for method in CORE for run in scope.runs(method, 0.5, rate)]
    others = [method for method in (*SPARSE, *PEERS, *DENSE) if method not in CORE]
    return core + [run for method in others for run in scope.runs(method, 0.5, RATE)]


def sweep(scope: Scope, ratio: float) -> list[Run]:
    """Every method at several learning rates, on one model and a seed of its own."""
    one = replace(scope, models=scope.models[:1], seeds=[SWEEP_SEED])
    return [run for m in (*SPARSE, *PEERS, *DENSE) for rate in rates(m, ratio) for run in one.runs(m, ratio, rate)]


def tuned(scope: Scope, ratio: float, records: Iterable[Record]) -> list[Run]:
    """Every method at the learning rate that the sweep chose for it."""
    chosen = choose_rates(records, ratio)
    first = [method for method in (*CORE, "lora", "spider", "super-tuning-high", "shira") if method in chosen]
    methods = [*first, *(m for m in (*SPARSE, *PEERS, *DENSE) if m in chosen and m not in first)]
    return [run for method in methods for run in scope.runs(method, ratio, chosen[method])]


def choose_rates(records: Iterable[Record], ratio: float) -> dict[str, float]:
    """The learning rate of every method: among the rates that learn the task, the rate that keeps the most.

    A rate learns the task if its mean downstream accuracy over the sweep is within `TOLERANCE` of the best of any
    method; where no rate of a method does, the one that learns it best is taken.
    """
    found: dict[str, dict[float, list[Record]]] = {}
    for record in records:
        if record["seed"] == SWEEP_SEED and record["update_ratio"] in (ratio, 1.0) and record["last_layers"] is None:
            found.setdefault(record["method"], {}).setdefault(record["learning_rate"], []).append(record)

    def mean(group: list[Record], key: str) -> float:
        return statistics.fmean(record[key] for record in group)

    best = max((mean(group, "downstream") for rated in found.values() for group in rated.values()), default=0.0)
    chosen = {}
    for method, rated in found.items():
        able = [rate for rate, group in rated.items() if mean(group, "downstream") >= best - TOLERANCE]
        chosen[method] = (
            max(able, key=lambda rate: mean(rated[rate], "upstream_mean"))
            if able
            else max(rated, key=lambda rate: mean(rated[rate], "downstream"))
        )
    return chosen


def curve(scope: Scope) -> list[Run]:
    """Figure 4: from few to nearly all weights, on one model."""
    one = replace(scope, models=scope.models[:1])
    ratios = (0.1, 0.25, 0.75, 0.9)
    return [run for ratio in ratios for m in ("dowser", "random") for run in one.runs(m, ratio, RATE)]


def depth(scope: Scope) -> list[Run]:
    """Figure 3: the last L of four layers, on one model and one task."""
    one = replace(scope, models=scope.models[:1], tasks=scope.tasks[:1])
    methods = ("full", "random", "dowser")
    return [replace(r, last_layers=n) for n in (1, 2, 3) for m in methods for r in one.runs(m, 0.5, RATE)]


def sequence(scope: Scope) -> list[Run]:
    """Table 9: three tasks in a row, on one model."""
    one = replace(scope, models=scope.models[:1], tasks=[SEQUENCE])
    return [run for method in SEQUENCE_METHODS for run in one.runs(method, 0.5, RATE)]


def post_merges(run: Run) -> Mapping[str, Sequence[float]]:
    """What to make of a full fine-tuning, and at which ratios."""
    plain = run.method == "full" and run.last_layers is None and "+" not in run.task
    return {m: (1.0,) if m == "wise-ft" else (0.1, 0.5) for m in AFTERWARDS} if plain else {}
