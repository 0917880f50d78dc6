"""Does it forget less? The paper's comparison on a small model, by one command:

    python examples/forgetting/study.py --output FOLDER [--quick]

Fine-tunes with every method, scores what was learned and what was lost, and writes `runs.jsonl`, `agreement.json`,
plots and `report.md`. An interrupted study continues where it stopped. `--quick` is the part on one model and one
task with two seeds.

For a real model and data sets with the columns image, question and answer (from the Hub, or folders):

    python examples/forgetting/study.py --output FOLDER --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 \
        --upstream lmms-lab/textvqa --downstream my/captions --columns image question answer --rates 2e-5
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import grids
import torch
import transformers
from agreement import agreement
from fine_tune import Record, Run, base_record, run_all
from grids import Scope, post_merges
from methods import AFTERWARDS, DENSE, PEERS, SPARSE
from report import write_report
from sources import TINY_LLAVA, Source, hub, tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from measure import machine
from records import Records

SECOND_SEED = 2  # of the second pretrained model; the one that is shipped has seed 1


class Study:
    """The records of a study so far, and how its runs are carried out.

    Attributes:
        records: what was measured.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.records = Records(options.output / "runs.jsonl", Run)

    def do(self, title: str, runs: Iterable[Run]) -> None:
        """Carry out the runs that have no record yet."""
        self.records.do(title, runs, partial(_work, self.options), self.options.workers, self.options.threads)


def _work(options: argparse.Namespace, run: Run) -> list[Record]:
    sources = [_source(options, run.model, task) for task in run.task.split("+")]
    verbosity = transformers.logging.get_verbosity()
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # the Trainer prints
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        logging.disable(logging.WARNING)
        try:
            return run_all(run, sources, _post_merges(options, run))
        finally:
            logging.disable(logging.NOTSET)
            transformers.logging.set_verbosity(verbosity)
            transformers.logging.enable_progress_bar()


def _post_merges(options: argparse.Namespace, run: Run) -> Mapping[str, Sequence[float]]:
    """What to make of a full fine-tuning: everything of the small model, what was asked for of a user's."""
    if options.model is None or run.method != "full":
        return post_merges(run)
    return {method: options.ratios for method in AFTERWARDS if method in options.methods}


def _source(options: argparse.Namespace, model: str, task: str) -> Source:
    if options.model is None:
        return tiny(model, task, options.examples)
    return hub(model, options.upstream, task, options.examples, options.columns, options.dtype)


def _second_model(folder: Path) -> str:
    """Pretrain the small LLaVA once more, from another seed."""
    if not (folder / "model.safetensors").exists():
        command = [sys.executable, str(TINY_LLAVA / "pretrain.py"), "--seed", str(SECOND_SEED), "--out", str(folder)]
        subprocess.run(command, check=True)
    return str(folder)


def _scope(options: argparse.Namespace) -> Scope:
    if options.model is not None:
        return Scope([options.model], options.downstream, options.seeds or [0, 1, 2, 3, 4], options.steps)
    if options.quick:
        return Scope([str(TINY_LLAVA)], ["style"], options.seeds or [0, 1], options.steps)
    models = [str(TINY_LLAVA), _second_model(options.output / "second_tiny_llava")]
    return Scope(models, ["style", "desc"], options.seeds or [0, 1, 2, 3, 4], options.steps)


def small_study(study: Study, scope: Scope, quick: bool) -> None:
    """All tables on the small model."""
    study.do("one rate, rho 0.5", grids.common(scope))
    if not quick:
        study.do("sweep, rho 0.1", grids.sweep(scope, 0.1))
        study.do("tuned, rho 0.1", grids.tuned(scope, 0.1, study.records))
        study.do("sweep, rho 0.5", grids.sweep(scope, 0.5))
        study.do("sequence", grids.sequence(scope))
        study.do("depth", grids.depth(scope))
        study.do("curve", grids.curve(scope))
        study.do("tuned, rho 0.5", grids.tuned(scope, 0.5, study.records))


def large_study(study: Study, scope: Scope, options: argparse.Namespace) -> None:
    """The comparison on a model and data sets of the user's."""
    for method in (name for name in options.methods if name not in AFTERWARDS):
        for ratio in options.ratios:
            for rate in options.rates:
                study.do(f"{method} {ratio} {rate}", scope.runs(method, ratio, rate))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Compare what fine-tuning methods learn and what they forget.")
    parser.add_argument("--output", type=Path, required=True, help="folder for records, plots and report")
    parser.add_argument("--quick", action="store_true", help="one model, one task, two seeds, one table")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a fine-tuning")
    parser.add_argument("--examples", type=int, default=200, help="test examples of a task, at most")
    parser.add_argument("--workers", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    parser.add_argument("--threads", type=int, default=1, help="threads of a worker")
    parser.add_argument("--model", help="folder or Hub id; the rest of the options belong to it")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--upstream", nargs="+", default=[], help="data sets that the model knows")
    parser.add_argument("--downstream", nargs="+", default=[], help="data sets to learn, one run each")
    parser.add_argument("--columns", nargs=3, default=["image", "question", "answer"])
    known = (*SPARSE, *PEERS, *DENSE, *AFTERWARDS)
    parser.add_argument("--methods", nargs="+", choices=known, default=["dowser", "random", "magnitude", "full"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5])
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5])
    options = parser.parse_args(arguments)
    if options.model is not None and not (options.upstream and options.downstream):
        parser.error("--model needs --upstream and --downstream data sets")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
    study, scope = Study(options), _scope(options)
    if not any(record["method"] == "base" for record in study.records):
        for model in scope.models:
            study.records.add(base_record(_source(options, model, task)) | {"task": task} for task in scope.tasks)
    if options.model is None:
        small_study(study, scope, options.quick)
        agreement(options.output / "agreement.json", quick=options.quick)
    else:
        large_study(study, scope, options)
    print(write_report(study.records, options.output))


if __name__ == "__main__":
    main()
