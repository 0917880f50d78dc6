"""What a KL term on the base's own texts keeps and costs in learning, on the small model, by one command:

    nice python examples/forgetting/rehearsal.py --output FOLDER

Every method is trained on one new task without rehearsal, with texts that the base wrote, with noise images before such
texts, and with these at every 2nd, 4th and 8th step at the same total weight. `rehearsal.jsonl` has one line per
training: the accuracy on what the base could do ("kept") and on the new task ("learned") along the way. `rehearsal.md`
compares them at equal learning and at the end. An interrupted run continues where it stopped.

The time of a step is measured by `examples/benchmarks/run.py --only rehearsing`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from fine_tune import Record, Run, score, train
from methods import DENSE, adapt
from sources import TINY_LLAVA, Source, tiny
from tqdm.auto import tqdm
from transformers import ProcessorMixin, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_dowser import DowserConfig, RehearsalCallback

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from measure import machine

RATIO = 0.1
# Of AdamW: those that the study has chosen at this ratio, at which every method has something to forget.
RATES = {"full": 5e-4, "lora": 2e-3, "dowser": 4e-3, "channels": 4e-3}
TEXTS = {"num_probes": 64, "probe_length": 24}
BATCH = 8  # texts of a rehearsal, 32 examples in a batch of the training
IMAGES = {"none": 0.0, "text": 0.0, "images": 1.0}
# Texts, weight of the KL, steps from one rehearsal to the next.
REHEARSALS = (("none", 0.0, 1), ("text", 1.0, 1), ("images", 1.0, 1))
RARER = tuple(("images", float(every), every) for every in (2, 4, 8))
POINTS = (30, 40, 50, 60, 70, 80, 100)  # of a curve, in percent of the steps: the task is learned between these
LEVELS = (60.0, 80.0, 90.0)  # percent learned, at which methods are compared


@dataclass(frozen=True, kw_only=True)
class Rehearsed(Run):
    """A fine-tuning with rehearsal.

    Attributes:
        texts: what is rehearsed, a key of `IMAGES`.
        weight: of the KL.
        every: steps from one rehearsal to the next.
    """

    texts: str
    weight: float
    every: int


class Curve(TrainerCallback):
    """Percent kept and learned along a training, in pairs, at `POINTS`."""

    def __init__(self, source: Source, processor: ProcessorMixin) -> None:
        self.source, self.processor = source, processor
        self.points: list[tuple[float, float]] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if 100 * state.global_step in [point * state.max_steps for point in POINTS]:
            known = [score(model, self.processor, examples, self.source) for examples in self.source.upstream.values()]
            learned = score(model, self.processor, self.source.test, self.source)
            self.points.append((statistics.fmean(known), learned))


def run_one(run: Rehearsed, source: Source) -> Record:
    """The fields of a run, and its curve: [kept, learned] at `POINTS`, in percent."""
    model, processor = source.load()
    adapted, callbacks = adapt(model, run.method, run.update_ratio, run.seed, lambda: [])
    curve = Curve(source, processor)
    base = source.load()[0] if run.method in DENSE else None
    own = DowserConfig(**TEXTS, probe_images=IMAGES[run.texts], seed=1000 + run.seed)
    held = RehearsalCallback(weight=run.weight, every_n_steps=run.every, batch_size=BATCH, config=own, base=base)
    train(adapted, processor, source, run, [*callbacks, held, curve])
    return asdict(run) | {"model": Path(run.model).name, "curve": curve.points}


def plan(seeds: Sequence[int], methods: Sequence[str], steps: int) -> Iterator[Rehearsed]:
    for rehearsals in (REHEARSALS, RARER):
        for seed in seeds:
            for method in methods:
                for texts, weight, every in rehearsals:
                    ratio = 1.0 if method in DENSE else RATIO
                    yield Rehearsed(
                        str(TINY_LLAVA),
                        "style",
                        method,
                        ratio,
                        RATES[method],
                        seed,
                        steps,
                        texts=texts,
                        weight=weight,
                        every=every,
                    )


def kept_at(curve: Sequence[Sequence[float]], level: float) -> float | None:
    """What is kept when a share of the new task is learned first, on the line between two points."""
    for (kept, learned), (next_kept, next_learned) in pairwise(curve):
        if learned <= level <= next_learned and next_learned > learned:
            return kept + (next_kept - kept) * (level - learned) / (next_learned - learned)
    return None


def table(records: Sequence[Record]) -> str:
    """A row per method and rehearsal: kept at equal learning, kept and learned at the end, over the seeds."""
    groups: dict[tuple[str, str, float, int], list[Record]] = {}
    for record in records:
        key = (record["method"], record["texts"], record["weight"], record["every"])
        groups.setdefault(key, []).append(record)
    order = list(RATES)
    lines = [
        ["method", "rehearsed", "weight", "every", "seeds", *(f"kept at {level:.0f} % learned" for level in LEVELS)],
    ]
    lines[0] += ["kept at the end", "learned at the end"]
    lines.append(["---"] * len(lines[0]))
    for key in sorted(groups, key=lambda key: (order.index(key[0]), list(IMAGES).index(key[1]), key[3])):
        method, texts, weight, every = key
        curves = [record["curve"] for record in groups[key]]
        at = [[kept_at(curve, level) for curve in curves] for level in LEVELS]
        ends = list(zip(*(curve[-1] for curve in curves), strict=True))
        lines.append([method, texts, f"{weight:g}", str(every), str(len(curves)), *map(spread, [*at, *ends])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Sequence[float | None]) -> str:
    """Mean and sample standard deviation, if every seed has a value."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return "-"
    return f"{statistics.fmean(found):.1f}" + (f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What rehearsal keeps and costs in learning, on the small model.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the records and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--examples", type=int, default=100, help="test examples of a task")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rehearsal.jsonl"
    records: list[Record] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {json.dumps({key: value for key, value in record.items() if key != "curve"}) for record in records}
    transformers.logging.set_verbosity_error()
    source = tiny(str(TINY_LLAVA), "style", options.examples)
    for run in tqdm(list(plan(options.seeds, options.methods, options.steps))):
        if json.dumps(asdict(run) | {"model": Path(run.model).name}) in done:
            continue
        records.append(run_one(run, source))
        with path.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
    (options.output / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
    (options.output / "rehearsal.md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
