"""The report: tables next to the paper's, paired tests, and plots, from the records alone."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

import matplotlib
from fine_tune import Record
from grids import HARSH_RATE, RATE, SEQUENCE, SWEEP_SEED, choose_rates
from methods import AFTERWARDS, DENSE
from scipy.stats import ttest_rel

from peft_dowser.evaluation import metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# H of random selection and of Dowser in the paper (Tables 6 and 7), all layers, for rho = 0.1, 0.25, 0.5, 0.75, 0.9.
PAPER_RATIOS = (0.1, 0.25, 0.5, 0.75, 0.9)
PAPER_CURVES = {
    "NVILA, ImageNet-R": ((68.0, 63.8, 55.0, 40.1, 33.4), (69.7, 67.2, 62.7, 51.3, 39.2)),
    "NVILA, COCO": ((85.2, 80.8, 62.9, 42.5, 32.7), (85.7, 82.1, 72.7, 53.5, 37.1)),
    "LLaVA, ImageNet-R": ((67.6, 58.3, 33.2, 21.2, 17.6), (68.5, 62.7, 42.6, 23.6, 18.3)),
    "LLaVA, COCO": ((79.1, 73.0, 49.8, 19.9, 11.9), (79.3, 74.0, 56.5, 23.7, 12.5)),
}
# LLaVA-1.5-7B, Table 9: A_up, MFT, MFN, MAA; BWT is left out, the paper divides it by T.
PAPER_SEQUENCE = {
    "full": (40.2, 70.2, 54.7, 66.2),
    "tailor": (40.6, 69.1, 55.9, 66.6),
    "MoELoRA": (61.2, 67.9, 60.0, 64.8),
    "dowser": (61.2, 69.1, 66.6, 69.6),
}
# LLaVA-1.5-7B on ImageNet-R, last 20 layers, rho = 0.1, Table 1: A_up, A_down, H.
PAPER_MAIN = {
    "full": (29.2, 89.7, 44.0),
    "graft-learned": (60.7, 67.3, 63.8),
    "dare": (28.0, 89.8, 42.7),
    "tailor": (41.6, 84.3, 55.7),
    "spider": (48.4, 89.3, 62.8),
    "dowser": (57.4, 88.8, 69.7),
}

Cell = tuple[str, str, int]  # model, task, seed


def write_report(records: Sequence[Record], folder: Path) -> str:
    """Write `report.md` and the plots into a folder.

    Returns:
        The text of the report.
    """
    records = [record | {"h": metrics.h_score(record["upstream_mean"], record["downstream"])} for record in records]
    judged = [record for record in records if record["seed"] != SWEEP_SEED]
    plain = [r for r in judged if r["last_layers"] is None and "+" not in r["task"] and r["method"] != "base"]
    parts = [_head(folder), _base(records)]
    rates = sorted({record["learning_rate"] for record in plain})
    compared = [rate for rate in (RATE, HARSH_RATE) if rate in rates] or rates[:1]
    for ratio in sorted({r["update_ratio"] for r in plain if r["method"] not in (*DENSE, "wise-ft")}, reverse=True):
        if ratio in (0.25, 0.75, 0.9):
            continue
        for rate in compared:
            at_one_rate = [r for r in plain if r["learning_rate"] == rate and _at(r, ratio)]
            parts.append(_comparison(f"All methods at rho = {ratio:g} and learning rate {rate:g}", at_one_rate))
            if parts[-1]:
                chart = f"methods_rho{ratio:g}_rate{rate:g}.png"
                _chart(at_one_rate, folder / chart)
                parts.append(f"![H of every method]({chart})")
        chosen = choose_rates(records, ratio)
        tuned = [r for r in plain if chosen.get(r["method"]) == r["learning_rate"] and _at(r, ratio)]
        if tuned:
            parts.append(_comparison(f"All methods at rho = {ratio:g}, each at its own learning rate", tuned, chosen))
    parts += [
        _curve(plain, folder),
        _depth(judged),
        _sequence(judged),
        _agreement(folder),
        _pareto(plain, records, folder),
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(text)
    return text


def _at(record: Record, ratio: float) -> bool:
    return record["update_ratio"] == ratio or record["method"] in (*DENSE, "wise-ft")


# Text


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"


def _head(folder: Path) -> str:
    machine = json.loads((folder / "machine.json").read_text()) if (folder / "machine.json").exists() else {}
    versions = machine.pop("versions", {})
    described = ", ".join(f"{key} {value}" for key, value in (machine | versions).items())
    return (
        f"# What was learned and what was lost\n\nMade by `examples/forgetting/study.py` on {date.today()}"
        f"{f' ({described})' if described else ''}. A_up is the mean accuracy on what the base could do before, A_down "
        "the accuracy on the new task, both in percent; H is their harmonic mean. Means and sample standard deviations "
        "over all models, tasks and seeds of a table; differences are paired by model, task and seed, so both methods "
        "saw the same batches, and p is that of a two-sided paired t-test (cells share their pretrained models, so it "
        "is optimistic). `dowser+images` begins half of the probes with a noise image."
    )


def _base(records: Sequence[Record]) -> str:
    rows = [
        [r["model"], r["task"], f"{r['upstream_mean']:.1f}", f"{r['downstream']:.1f}"]
        for r in records
        if r["method"] == "base"
    ]
    return "## Before\n\n" + _table(["model", "new task", "A_up", "A_down"], rows)


def _by_method(records: Iterable[Record]) -> dict[str, dict[Cell, Record]]:
    found: dict[str, dict[Cell, Record]] = {}
    for r in records:
        found.setdefault(r["method"], {})[(r["model"], r["task"], r["seed"])] = r
    return found


def _comparison(title: str, records: Sequence[Record], rates: dict[str, float] | None = None) -> str:
    methods = _by_method(records)
    if "dowser" not in methods:
        return ""
    dowser = methods["dowser"]
    order = sorted(methods, key=lambda m: -statistics.fmean(r["h"] for r in methods[m].values()))
    rows = []
    for method in order:
        found = list(methods[method].values())
        row = [
            method,
            str(len(found)),
            *(_spread([r[key] for r in found]) for key in ("upstream_mean", "downstream")),
            f"{statistics.fmean(metrics.average(r['upstream_mean'], r['downstream']) for r in found):.1f}",
            _spread([r["h"] for r in found]),
            f"{found[0]['trained']:,}",
            *_paired(dowser, methods[method], "h"),
            " ".join(f"{value:.1f}" for value in PAPER_MAIN.get(method, ())) or "-",
        ]
        rows.append([f"{rates[method]:g}", *row] if rates else row)
    header = ["method", "n", "A_up", "A_down", "Avg", "H", "weights", "dowser - it: H", "won", "p"]
    header.append("paper: A_up A_down H")
    if rates:
        header, rows = ["rate", *header], rows
    return f"## {title}\n\n{_table(header, rows)}\n\n{_verdict(dowser, methods)}\n\n{_cells(methods)}"


def _chart(records: Sequence[Record], path: Path) -> None:
    """Draw H of every cell and its mean, method by method."""
    methods = {method: [r["h"] for r in found.values()] for method, found in _by_method(records).items()}
    order = sorted(methods, key=lambda method: statistics.fmean(methods[method]))
    figure, axes = plt.subplots(figsize=(7, 0.3 * len(order) + 1))
    for row, method in enumerate(order):
        colour = "tab:red" if method.startswith("dowser") else "tab:blue"
        axes.plot(methods[method], [row] * len(methods[method]), "o", markersize=4, alpha=0.35, color=colour)
        axes.plot([statistics.fmean(methods[method])], [row], "|", markersize=14, markeredgewidth=3, color=colour)
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("H: harmonic mean of what was kept and what was learned (dots: model, task, seed; bar: mean)")
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


def _paired(first: dict[Cell, Record], second: dict[Cell, Record], key: str) -> tuple[str, str, str]:
    """Mean difference, wins and p-value over the cells that both have."""
    cells = sorted(first.keys() & second.keys())
    pairs = [(first[cell][key], second[cell][key]) for cell in cells]
    differences = [a - b for a, b in pairs]
    if len(pairs) < 2 or not any(differences):
        return "-", "-", "-"
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    wins = sum(difference > 0 for difference in differences)
    return f"{statistics.fmean(differences):+.1f}", f"{wins}/{len(pairs)}", f"{p:.2g}"


def _verdict(dowser: dict[Cell, Record], methods: dict[str, dict[Cell, Record]]) -> str:
    """Which methods Dowser beats, which it does not; decided by the paired test at 5 percent."""
    beaten, tied, better = [], [], []
    for method, found in methods.items():
        difference, _, p = _paired(dowser, found, "h")
        if difference == "-":
            continue
        group = tied if float(p) >= 0.05 else beaten if float(difference) > 0 else better
        group.append(f"{method} ({difference})")
    lines = [
        f"Dowser's H is higher than that of: {', '.join(beaten) or 'none'}.",
        f"No difference at p < 0.05 from: {', '.join(tied) or 'none'}.",
        f"Better than Dowser: {', '.join(better) or 'none'}.",
    ]
    return " ".join(lines)


def _cells(methods: dict[str, dict[Cell, Record]]) -> str:
    """H of every cell."""
    groups = sorted({cell[:2] for found in methods.values() for cell in found})
    rows = []
    for method, found in methods.items():
        columns = [[r["h"] for cell, r in sorted(found.items()) if cell[:2] == group] for group in groups]
        rows.append([method, *(" ".join(f"{h:.1f}" for h in column) for column in columns)])
    header = ["H by seed", *(f"{model}, {task}" for model, task in groups)]
    return f"<details><summary>Every cell</summary>\n\n{_table(header, rows)}\n\n</details>"


def _curve(records: Sequence[Record], folder: Path) -> str:
    """Figure 4: H against rho."""
    model = next((r["model"] for r in records if r["method"] == "dowser" and r["update_ratio"] == 0.25), None)
    if model is None:
        return ""
    here = [r for r in records if r["model"] == model and r["learning_rate"] == RATE]
    figure, axes = plt.subplots(figsize=(5, 3.5))
    rows = []
    for method in ("random", "dowser"):
        found = [[r for r in here if r["method"] == method and r["update_ratio"] == ratio] for ratio in PAPER_RATIOS]
        means = [statistics.fmean(r["h"] for r in at) if at else float("nan") for at in found]
        axes.plot(PAPER_RATIOS, means, marker="o", label=method)
        rows.append([f"{method}, H", *(_spread([r["h"] for r in at]) for at in found)])
        rows.append([f"{method}, A_down", *(_spread([r["downstream"] for r in at]) for at in found)])
    for name, curves in PAPER_CURVES.items():
        for method, values in zip(("random", "dowser"), curves, strict=True):
            rows.append([f"paper, {name}, {method}, H", *(f"{value:.1f}" for value in values)])
    axes.set_xlabel("rho")
    axes.set_ylabel("H")
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    table = _table(["", *(f"rho {ratio:g}" for ratio in PAPER_RATIOS)], rows)
    title = f"## From few weights to nearly all (learning rate {RATE:g}, {model})"
    return f"{title}\n\n{table}\n\n![H against rho](curve.png)"


def _depth(records: Sequence[Record]) -> str:
    """Figure 3: the last L layers."""
    found = [r for r in records if r["last_layers"] is not None]
    if not found:
        return ""
    model, task = found[0]["model"], found[0]["task"]
    whole = [
        r | {"last_layers": 4}
        for r in records
        if (r["model"], r["task"], r["learning_rate"], r["last_layers"]) == (model, task, RATE, None)
    ]
    methods = ("full", "random", "dowser")
    rows = []
    for layers in (1, 2, 3, 4):
        row = [str(layers)]
        for method in methods:
            ratio = 1.0 if method == "full" else 0.5
            wanted = (layers, method, ratio)
            at = [r for r in found + whole if (r["last_layers"], r["method"], r["update_ratio"]) == wanted]
            row += [_spread([r[key] for r in at]) for key in ("upstream_mean", "downstream", "h")]
        rows.append(row)
    header = ["last L", *(f"{method} {key}" for method in methods for key in ("A_up", "A_down", "H"))]
    return f"## How deep (rho = 0.5, {model}, {task})\n\n{_table(header, rows)}"


def _sequence(records: Sequence[Record]) -> str:
    """Table 9: three tasks in a row."""
    methods = _by_method(r for r in records if r["task"] == SEQUENCE)
    if not methods:
        return ""
    measures: dict[str, Callable[[list[list[float]]], float]] = {
        "MFT": metrics.mean_finetune_accuracy,
        "MFN": metrics.mean_final_accuracy,
        "MAA": metrics.mean_average_accuracy,
        "BWT": metrics.backward_transfer,
    }
    rows = []
    for method, found in methods.items():
        runs = list(found.values())
        values = [_spread([measure(r["scores"]) for r in runs]) for measure in measures.values()]
        rows.append([method, str(len(runs)), _spread([r["upstream_mean"] for r in runs]), *values])
    for method, values in PAPER_SEQUENCE.items():
        rows.append([f"paper: {method}", "1", *(f"{value:.1f}" for value in values), "-"])
    title = f"## Three tasks in a row: {SEQUENCE.replace('+', ', ')} (rho = 0.5)"
    return f"{title}\n\n{_table(['method', 'n', 'A_up', *measures], rows)}"


def _agreement(folder: Path) -> str:
    """Table 8."""
    path = folder / "agreement.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    rows = [
        [row["kind"], str(row["probes"]), str(row["rademacher"])]
        + ["{:.3f} ± {:.3f}".format(*row[key]) for key in ("spearman", "hamming_low", "hamming_high")]
        for row in found["rows"]
    ]
    header = ["score", "N", "R", "Spearman", "Hamming, lowest 10 %", "Hamming, highest 10 %"]
    return (
        f"## Does the data-free score agree with real data?\n\nAgainst the Dowser score on {found['prompts']} upstream "
        f"prompts with images. Independent masks have a Hamming distance of {found['random']:.2f}. Every score with "
        "|W| in it agrees with every other through |W| alone, so the rows without |W| say what the probe knows; they "
        "are compared with the real score without |W|. The paper prints 0.891 and 0.050 (highest 10 %) for N = 64 and "
        "R = 8."
        f"\n\n{_table(header, rows)}\n\n{_when_the_jacobian_pays(found['spread'])}"
    )


def _when_the_jacobian_pays(spread: dict[str, float]) -> str:
    """What the factors' spread says about the room that the probe has to change a ranking by |W|."""
    return (
        "When the Jacobian pays: inside a matrix ln |W| has a standard deviation of "
        f"{spread['strength']:.2f} here (1.11 for normally distributed weights), and the factor that the probe adds, "
        f"ln of ||J|| |h|, one of {spread['gain']:.2f}. The wider the second is against the first, the more a mask by "
        "the full score differs from one by |W|, and the more there is for the Jacobian to get right."
    )


def _pareto(plain: Sequence[Record], records: Sequence[Record], folder: Path) -> str:
    """Retention against plasticity, one point per method and learning rate."""
    base = {(r["model"], r["task"]): r["upstream_mean"] for r in records if r["method"] == "base"}
    ratios = [ratio for ratio in (0.5, 0.1) if any(r["method"] == "dowser" and _at(r, ratio) for r in plain)]
    best = max((statistics.fmean(r["downstream"] for r in at) for at in _points(plain).values()), default=0.0)
    if not ratios or not base or not min(best, *base.values()):
        return ""  # nothing was known, or nothing learned: there are no fractions of it
    figure, panels = plt.subplots(1, len(ratios), figsize=(1.5 + 5 * len(ratios), 4.5), sharey=True, squeeze=False)
    for axes, ratio in zip(panels[0], ratios, strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for (method, _), at in sorted(_points(r for r in plain if _at(r, ratio)).items()):
            kept = statistics.fmean(metrics.retention(r["upstream_mean"], base[r["model"], r["task"]]) for r in at)
            learned = metrics.plasticity(statistics.fmean(r["downstream"] for r in at), best)
            lines.setdefault(method, []).append((learned, kept))
        for number, (method, points) in enumerate(lines.items()):
            style = {"linestyle": ":" if method in AFTERWARDS else "-", "marker": "os^Dv<>"[number // 10]}
            width = 3 if method.startswith("dowser") else 1
            axes.plot(*zip(*points, strict=True), markersize=5, linewidth=width, label=method, **style)
        axes.set_title(f"rho = {ratio:g}")
        axes.set_xlabel("plasticity: A_down / best A_down")
    panels[0][0].set_ylabel("retention: A_up / A_up of the base")
    panels[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "pareto.png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    return (
        "## Retention against plasticity\n\nOne point per method and learning rate, mean over models, tasks and seeds; "
        "up and to the right is better.\n\n![Retention against plasticity](pareto.png)"
    )


def _points(records: Iterable[Record]) -> dict[tuple[str, float], list[Record]]:
    found: dict[tuple[str, float], list[Record]] = {}
    for r in records:
        found.setdefault((r["method"], r["learning_rate"]), []).append(r)
    return found
