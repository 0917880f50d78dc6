"""Every benchmark: Dowser compared with its peers and its limits, each measurement in a process of its own.

    python examples/benchmarks/run.py --only step probing --output FOLDER

Writes PART.json with the machine and the versions, PART.md with a table, and for the training step a plot. Runs on the
GPU where torch has one. On two CPU cores: step 15 minutes, ratios (steps at rho = 0.01 and 0.5) 30, variants (steps
with checkpointing, compiled) 20, channels 20, generation 60, launches 2, probing 5, files 6, switching 5,
rehearsing 5, billion 3.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import channels
import files
import generation
import launches
import one_billion
import probing
import rehearsing
import switching
import training_step
from measure import report

PARTS: dict[str, Callable[[int], Any]] = {
    "step": partial(training_step.measure, settings=training_step.USUAL),
    "ratios": partial(training_step.measure, settings=training_step.RATIOS),
    "variants": partial(training_step.measure, settings=training_step.VARIANTS),
    "channels": channels.measure,
    "generation": generation.measure,
    "launches": launches.measure,
    "probing": probing.measure,
    "files": files.measure,
    "switching": switching.measure,
    "rehearsing": rehearsing.measure,
    "billion": one_billion.measure,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks of peft-dowser.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions, whose median counts (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks"), help="folder (default: benchmarks)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.only:
        rows = PARTS[part](options.rounds)
        report(part, rows, options.output / f"{part}.json")
        (options.output / f"{part}.md").write_text(table(rows))
        if part == "step":
            plot(rows, options.output / "step.png")


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows, with three significant digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(row.get(column, "")) for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time against memory of a step at rho = 0.1, one mark per method, for every dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(1, len(dtypes), figsize=(5 * len(dtypes), 4), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for row in rows:
            if row["dtype"] == dtype:
                axis.plot(row["seconds"], row["bytes_per_weight"], "o")
                axis.annotate(row["method"], (row["seconds"], row["bytes_per_weight"]))
        axis.set(title=f"{dtype}, rho = 0.1", xlabel="seconds per step", ylabel="bytes per base weight at the peak")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
