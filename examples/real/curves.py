"""What was kept, as a function of what was learned: the trajectory of a training, and its value at a given learning."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t

Record = dict[str, Any]
GENERAL = ("prose", "documentation", "code")
MEASURES = ("own loss", "own kl", "text loss", "text kl")


@dataclass(frozen=True)
class Curve:
    """A training, measured at several points that begin with the base.

    Attributes:
        learned: by point, the fall of the mean loss on held-out texts of the task.
        kept: by measure, `(points, texts)`: the rise of the loss ("own loss", "text loss"), or KL(base || model) ("own
            kl", "text kl"), of the base's own answers and of general texts.
    """

    learned: np.ndarray
    kept: dict[str, np.ndarray]

    def at(self, level: float, measure: str) -> np.ndarray | None:
        """By text, the measure where the curve first reaches a level of learning; None if it does not."""
        reached = np.nonzero(self.learned >= level)[0]
        if not len(reached) or level <= 0:
            return None
        after = reached[0]
        share = (level - self.learned[after - 1]) / (self.learned[after] - self.learned[after - 1])
        values = self.kept[measure]
        return values[after - 1] + share * (values[after] - values[after - 1])


def trajectory(record: Record, base: Record) -> Curve:
    """The points of a training in the order of its steps."""
    points = sorted((point for point in record["points"] if point["scale"] == 1), key=lambda point: point["step"])
    return curve(points, base)


def scaled(record: Record, base: Record) -> Curve:
    """The points of a trained adapter by its scale: WiSE-FT."""
    last = [point for point in record["points"] if point["step"] == record["steps"]]
    return curve(sorted(last, key=lambda point: point["scale"]), base)


def curve(points: Sequence[dict[str, Any]], base: Record) -> Curve:
    """Points compared with the base, which is put first."""
    start = base["points"][0]
    learned = [statistics.fmean(start["new"]) - statistics.fmean(point["new"]) for point in (start, *points)]
    kept: dict[str, list[list[float]]] = {measure: [] for measure in MEASURES}
    for point in (start, *points):
        for group, kinds in (("own", ("own",)), ("text", GENERAL)):
            pairs = [
                (now, before)
                for kind in kinds
                for now, before in zip(point["loss"][kind], start["loss"][kind], strict=True)
            ]
            kept[f"{group} loss"].append([now - before for now, before in pairs])
            kept[f"{group} kl"].append([value for kind in kinds for value in point["kl"][kind]])
    return Curve(np.array(learned), {measure: np.array(rows) for measure, rows in kept.items()})


def base_of(record: Record, records: Iterable[Record]) -> Record:
    """The record of the base that a training began with."""
    same = ("model", "lesson", "dtype")
    return next(one for one in records if one["method"] == "base" and all(one[key] == record[key] for key in same))


def accuracy(point: dict[str, Any]) -> np.ndarray | None:
    """Of every item, 1 where it was answered right; None where they were not asked."""
    return (
        np.array([int(right) for kind in sorted(point["choices"]) for right in point["choices"][kind]])
        if ("choices" in point)
        else None
    )


def interval(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences, `(seeds, texts)`, and the half width of its 95 % interval.

    Seeds and texts are both samples: the variance is that of the mean over seeds plus that of the mean over texts, and
    the degrees of freedom are Welch's and Satterthwaite's. One seed alone has no interval: infinity.
    """
    seeds, texts = differences.shape
    if seeds < 2:
        return float(differences.mean()), float("inf")
    parts = [(differences.mean(1).var(ddof=1) / seeds, seeds - 1), (differences.mean(0).var(ddof=1) / texts, texts - 1)]
    variance = sum(part for part, _ in parts)
    if not variance:
        return float(differences.mean()), 0.0
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(differences.mean()), float(t.ppf(0.975, freedom) * variance**0.5)
