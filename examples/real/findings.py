"""The report: what was kept at equal learning, at the end, by scale and by rate, from the records alone."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from curves import MEASURES, Curve, Record, accuracy, interval, scaled, trajectory
from fine_tuning import SCALES, SWEEP_SEED

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RIVAL = "random"  # which the other methods are compared with
# Of the level that the slowest method reaches with its worst seed; there all are compared.
REACHED = 0.98
# The questions of the study: does the first keep more than the second?
PAIRS = (
    ("dowser", "random"),
    ("dowser", "magnitude"),
    ("dowser", "wanda"),
    ("dowser", "full"),
    ("dowser", "lora r=16"),
    ("columns, activity", "random"),
    ("columns, activity", "dowser"),
    ("columns, activity", "lora r=16"),
    ("columns, activity", "full"),
    ("columns, activity", "columns, random"),
    ("columns, shift", "columns, activity"),
    ("shift", "dowser"),
    ("shift", "random"),
    ("full", "lora r=16"),
    ("magnitude, high", "magnitude"),
)

Cells = dict[str, dict[int, Record]]  # by what was done, and by seed


def write_report(records: Sequence[Record], folder: Path) -> str:
    """Write `report.md` and the plots into a folder.

    Returns:
        The text of the report.
    """
    parts = [_head(folder)]
    bases = [record for record in records if record["method"] == "base"]
    for base in bases:
        same = [
            record
            for record in records
            if record["method"] != "base" and all(record[key] == base[key] for key in ("model", "lesson", "dtype"))
        ]
        for steps in sorted({record["steps"] for record in same}):
            here = [record for record in same if record["steps"] == steps]
            parts += _lesson(here, base, steps, folder)
        if not same:
            parts.append(_before(base))
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text)
    return text


def _lesson(records: Sequence[Record], base: Record, steps: int, folder: Path) -> list[str]:
    """Everything about one task, at one length of the trainings and one dtype of the base."""
    title = f"# {base['lesson']}: {base['model']} in {base['dtype']}, {steps} steps"
    cells = _cells(record for record in records if record["seed"] != SWEEP_SEED)
    parts = [title, _before(base)]
    if cells:
        parts += [
            _at_equal_learning(cells, base),
            _pairs(cells, base),
            _at_the_end(cells, base),
            _by_scale(cells, base),
        ]
        chart = f"{base['lesson']}-{base['dtype']}-{steps}.png"
        _plot(cells, base, folder / chart)
        parts.append(f"![What was kept against what was learned]({chart})")
    return [*parts, _rates([record for record in records if record["seed"] == SWEEP_SEED], base)]


def _name(record: Record) -> str:
    """What was done, but for the seed; the ratio where it is not a tenth, and what goes beyond plain training."""
    name = record["method"]
    if record["update_ratio"] not in (0.1, 1.0):
        name += f", rho {record['update_ratio']:g}"
    if record["rehearsal"]:
        every = f" every {record['every']} steps" if record["every"] > 1 else ""
        name += f", rehearsal {record['rehearsal']:g}{every}"
    return name


def _cells(records: Iterable[Record]) -> Cells:
    """Where a method was trained at several rates, the name says which."""
    found: dict[tuple[str, float], dict[int, Record]] = {}
    for record in records:
        found.setdefault((_name(record), record["learning_rate"]), {})[record["seed"]] = record
    rates: dict[str, set[float]] = {}
    for name, rate in found:
        rates.setdefault(name, set()).add(rate)
    return {
        name if len(rates[name]) == 1 or rate == min(rates[name]) else f"{name}, {rate:g}": by_seed
        for (name, rate), by_seed in sorted(found.items())
    }


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _head(folder: Path) -> str:
    machine = json.loads((folder / "machine.json").read_text()) if (folder / "machine.json").exists() else {}
    versions = machine.pop("versions", {})
    described = ", ".join(f"{key} {value}" for key, value in (machine | versions).items())
    return (
        f"Made by `examples/real/study.py`{f' ({described})' if described else ''}. Losses and KL are in nats per "
        "token. *Learned* is the fall of the loss on held-out texts of the new task. *Own* is the base's own answers "
        "to ordinary questions, *text* general texts of three kinds: the rise of their loss is harm, KL(base || "
        "model) on them is drift. A ± gives a 95 % interval over seeds and texts, both taken as samples; differences "
        "are paired, so both methods saw the same batches. Rates were chosen on a seed that is not judged."
    )


def _before(base: Record) -> str:
    point = base["points"][0]
    losses = ", ".join(f"{kind} {statistics.fmean(values):.2f}" for kind, values in point["loss"].items())
    right = ", ".join(
        f"{kind} {statistics.fmean(map(int, found)):.0%} of {len(found)}" for kind, found in point["choices"].items()
    )
    return (
        f"Before: loss on the new task {statistics.fmean(point['new']):.2f}, {losses}. Items right: {right}. Of its "
        f"answers {point['ended']:.0%} end, and {point['odd']:.0%} look like the new task."
    )


# At equal learning


def _curves(cells: Cells, base: Record) -> dict[str, dict[int, Curve]]:
    return {name: {seed: trajectory(r, base) for seed, r in by_seed.items()} for name, by_seed in cells.items()}


def _values(curves: dict[int, Curve], seeds: Iterable[int], level: float, measure: str) -> np.ndarray:
    """`(seeds, texts)` at a level that all of them reach."""
    return np.stack([found for seed in seeds if (found := curves[seed].at(level, measure)) is not None])


def _level(curves: dict[str, dict[int, Curve]]) -> float:
    return REACHED * min(one.learned.max() for by_seed in curves.values() for one in by_seed.values())


def _at_equal_learning(cells: Cells, base: Record) -> str:
    curves = _curves(cells, base)
    level = _level(curves)
    if level <= 0:
        return "A method has learned nothing, so there is no equal learning to compare at."
    rows = []
    for name, by_seed in curves.items():
        values = {measure: _values(by_seed, by_seed, level, measure) for measure in MEASURES}
        row = [name, f"{next(iter(cells[name].values()))['learning_rate']:g}", str(len(by_seed))]
        row += [_with_interval(*interval(values[measure])) for measure in MEASURES]
        row.append(_difference(curves, name, RIVAL, level, "own loss"))
        rows.append((values["own loss"].mean(), row))
    header = ["method", "rate", "seeds", *MEASURES, f"own loss less that of {RIVAL}"]
    ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
    return f"## What was kept when {level:.2f} was learned\n\n{_table(header, ordered)}"


def _difference(curves: dict[str, dict[int, Curve]], first: str, second: str, level: float, measure: str) -> str:
    seeds = sorted(curves[first].keys() & curves.get(second, {}).keys())
    if first == second or not seeds:
        return "-"
    pair = [_values(curves[name], seeds, level, measure) for name in (first, second)]
    return _with_interval(*interval(pair[0] - pair[1]), sign="+")


def _with_interval(mean: float, half: float, digits: int = 3, sign: str = "") -> str:
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half < float("inf") else "")


def _pairs(cells: Cells, base: Record) -> str:
    """Each question at the level that both of its methods reach."""
    curves = _curves(cells, base)
    rows = []
    for first, second in PAIRS:
        if first not in curves or second not in curves:
            continue
        two = {name: curves[name] for name in (first, second)}
        level = _level(two)
        seeds = sorted(curves[first].keys() & curves[second].keys())
        if level <= 0 or not seeds:
            continue
        row = [f"{first} against {second}", str(len(seeds)), f"{level:.2f}"]
        for measure in MEASURES:
            means = [_values(curves[name], seeds, level, measure).mean() for name in (first, second)]
            ratio = f" (x {means[0] / means[1]:.2f})" if min(means) > 0 else ""
            row.append(_difference(curves, first, second, level, measure) + ratio)
        rows.append(row)
    header = [
        "does the first keep more?",
        "seeds",
        "learned",
        *(f"{measure}: first less second" for measure in MEASURES),
    ]
    return f"## The questions, two by two\n\n{_table(header, rows)}" if rows else ""


# At the end


def _at_the_end(cells: Cells, base: Record) -> str:
    before = accuracy(base["points"][0])
    assert before is not None
    rows = []
    for name, by_seed in cells.items():
        ends = [next(p for p in r["points"] if p["step"] == r["steps"] and p["scale"] == 1) for r in by_seed.values()]
        curves = [trajectory(record, base) for record in by_seed.values()]
        right = np.stack([accuracy(point) for point in ends]) * 100.0 - before * 100.0
        records = list(by_seed.values())
        rows.append(
            [
                name,
                f"{records[0]['learning_rate']:g}",
                str(len(records)),
                f"{statistics.fmean(found.learned[-1] for found in curves):.2f}",
                *(f"{statistics.fmean(found.kept[m][-1].mean() for found in curves):.3f}" for m in MEASURES),
                _with_interval(*interval(right), digits=1, sign="+"),
                f"{statistics.fmean(point['ended'] for point in ends):.0%}",
                f"{statistics.fmean(point['odd'] for point in ends):.0%}",
                f"{records[0]['trained']:,}",
                f"{statistics.median(record['seconds'] for record in records):.2f}",
            ]
        )
    header = ["method", "rate", "seeds", "learned", *MEASURES, "items right, points", "answers that end", "odd answers"]
    return f"## At the end\n\n{_table([*header, 'trained', 'seconds a step'], rows)}"


def _by_scale(cells: Cells, base: Record) -> str:
    """What WiSE-FT adds: a trained adapter, scaled down, against the same training where it had learned as much."""
    rows = []
    for name, by_seed in cells.items():
        for scale in SCALES:
            found = []
            for record in by_seed.values():
                points = [p for p in record["points"] if p["step"] == record["steps"] and p["scale"] == scale]
                if points:
                    at = scaled(record, base)
                    number = sorted({p["scale"] for p in record["points"] if p["step"] == record["steps"]}).index(scale)
                    learned = at.learned[1 + number]
                    earlier = trajectory(record, base).at(learned, "own loss")
                    if earlier is not None:
                        found.append((learned, at.kept["own loss"][1 + number].mean(), earlier.mean()))
            if found:
                means = [statistics.fmean(column) for column in zip(*found, strict=True)]
                rows.append([name, f"{scale:g}", str(len(found)), *(f"{mean:.3f}" for mean in means)])
    header = ["method", "scale", "seeds", "learned", "own loss", "own loss of the training when it had learned as much"]
    return f"## Scaled down after the training\n\n{_table(header, rows)}" if rows else ""


def _rates(swept: Sequence[Record], base: Record) -> str:
    """All rates of the sweep, at the end of each training."""
    rows = []
    key: Callable[[Record], tuple] = lambda record: (_name(record), record["learning_rate"])  # noqa: E731
    for record in sorted(swept, key=key):
        found = trajectory(record, base)
        kept = [f"{found.kept[measure][-1].mean():.3f}" for measure in MEASURES]
        rows.append([_name(record), f"{record['learning_rate']:g}", f"{found.learned[-1]:.2f}", *kept])
    if not rows:
        return ""
    return f"## The sweep of the rates, at the end\n\n{_table(['method', 'rate', 'learned', *MEASURES], rows)}"


def _plot(cells: Cells, base: Record, path: Path) -> None:
    """Harm and drift against learning, means over seeds; dotted: the trained adapter, scaled down."""
    figure, panels = plt.subplots(1, len(MEASURES), figsize=(4 * len(MEASURES), 4))
    for number, (name, by_seed) in enumerate(cells.items()):
        style = {"color": f"C{number % 10}", "marker": "os^Dv"[number // 10 % 5], "markersize": 4}
        for curve_of, line in ((trajectory, "-"), (scaled, ":")):
            curves = [curve_of(record, base) for record in by_seed.values()]
            learned = np.mean([found.learned for found in curves], 0)
            for axes, measure in zip(panels, MEASURES, strict=True):
                kept = np.mean([found.kept[measure].mean(1) for found in curves], 0)
                axes.plot(learned, kept, line, label=name if line == "-" else None, **style)
    for axes, measure in zip(panels, MEASURES, strict=True):
        axes.set_xlabel("learned: fall of the loss, nats per token")
        axes.set_title(measure)
    panels[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
