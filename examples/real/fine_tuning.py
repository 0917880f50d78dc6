"""One training: put an adapter on the base, train it with the Hugging Face Trainer, and measure on the way."""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from learners import UNSCALED, config, is_probed, optimizer
from lessons import LESSONS
from measures import Row, Sizes, check_base, check_start, load, make_reference, measure, read_reference, row_of
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_dowser import DowserConfig, RehearsalCallback, probe

BATCH = 4
STOPS = (0.3, 0.6, 1.0)  # of a training, where it is measured
SCALES = (0.5,)  # of the trained delta, measured after the training
PROBE_SEED = 100
SWEEP_SEED = 100  # rates are chosen on this seed, where less is measured, and judged on the others


@dataclass(frozen=True)
class Run:
    """What decides a training; equal runs give equal records.

    Attributes:
        model: folder of the base.
        lesson: name of the new task.
        method: name of a method, see `learners`.
        update_ratio: rho; 1 for methods with a size of their own.
        learning_rate: of AdamW; it rises over 5 % of the steps and falls in a line to 0.
        seed: of examples and random masks. One seed gives all methods the same batches.
        steps: optimizer steps.
        rehearsal: weight of the KL of `RehearsalCallback`; 0 trains without.
        every: steps from one rehearsal to the next.
        dtype: of the base; the adapter is in float32.
    """

    model: str
    lesson: str
    method: str
    update_ratio: float
    learning_rate: float
    seed: int
    steps: int
    rehearsal: float = 0.0
    every: int = 1
    dtype: str = "bfloat16"


class Watch(TrainerCallback):
    """Measure at some steps, and take the time of every step, with its rehearsal and without the measurements."""

    def __init__(self, steps: Sequence[int], look: Callable[[Any, int], None]) -> None:
        self.steps, self.look, self.seconds = steps, look, []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        if state.global_step in self.steps:
            self.look(model, state.global_step)


def run_one(run: Run, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Carry out a run.

    Args:
        run: what to do, and has been prepared for.
        folder: of the study, where the reference and the probe are kept.
        sizes: how much is measured.

    Returns:
        The fields of `Run`; `points`, with `step`, `scale` and what `measures.measure` found there; `trained` weights;
        `seconds` of a step (median).

    Raises:
        TypeError, ValueError: there is no such method, lesson or setting.
        RuntimeError: the base is not that of the reference.
    """
    base, tokenizer = load(run.model, run.dtype)
    reference = read_reference(_reference(folder, run))
    check_base(base, reference)
    statistics_file = _statistics(folder, run) if is_probed(run.method) else None
    adapter = config(run.method, run.update_ratio, run.seed, statistics_file)
    torch.manual_seed(run.seed)
    model = get_peft_model(base, adapter)
    check_start(model, reference)
    lesson = LESSONS[run.lesson]
    points = []

    def look(model: Any, step: int, scale: float = 1.0) -> None:
        complete = step == run.steps and scale == 1 and run.seed != SWEEP_SEED
        found = measure(model, tokenizer, lesson, reference, sizes, complete)
        points.append({"step": step, "scale": scale, **found})

    watch = Watch([max(1, round(stop * run.steps)) for stop in STOPS], look)
    rows = [row_of(example, tokenizer) for example in lesson.training(run.seed, BATCH * run.steps)]
    _train(model, rows, run, watch)
    for scale in SCALES if run.method not in UNSCALED else ():
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_scale("default", scale)
        look(model, run.steps, scale)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {**asdict(run), "points": points, "trained": trained, "seconds": statistics.median(watch.seconds)}


def base_record(run: Run, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """The measures of the base itself, as the record of a run of no steps that has been prepared for."""
    base, tokenizer = load(run.model, run.dtype)
    reference = read_reference(_reference(folder, run))
    found = measure(base, tokenizer, LESSONS[run.lesson], reference, sizes, complete=True)
    return {**asdict(run), "points": [{"step": 0, "scale": 1.0, **found}], "trained": 0, "seconds": 0.0}


def _train(model: Any, rows: Sequence[Row], run: Run, watch: Watch) -> None:
    rehearsal = RehearsalCallback(weight=run.rehearsal, every_n_steps=run.every, config=_own_texts(run))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=run.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=max(1, run.steps // 20),
            weight_decay=0.0,
            seed=run.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        callbacks = [watch, *([rehearsal] if run.rehearsal else [])]
        Trainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=_batch,
            callbacks=callbacks,
            optimizers=(optimizer(run.method, model, run.learning_rate), None),
        ).train()


def _batch(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Rows with labels, padded on the right."""
    width = max(len(row.ids) for row in rows)
    padded = [width - len(row.ids) for row in rows]
    return {
        "input_ids": torch.tensor([[*row.ids, *[0] * more] for row, more in zip(rows, padded, strict=True)]),
        "attention_mask": torch.tensor(
            [[1] * len(row.ids) + [0] * more for row, more in zip(rows, padded, strict=True)]
        ),
        "labels": torch.tensor(
            [
                [-100] * row.first + list(row.ids[row.first :]) + [-100] * more
                for row, more in zip(rows, padded, strict=True)
            ]
        ),
    }


def prepare(run: Run, folder: Path, sizes: Sizes) -> None:
    """Make what a run needs and shares with all others on its base, if it is not there: the reference and the probe."""
    if not (path := _reference(folder, run)).exists():
        make_reference(path, *load(run.model, run.dtype), sizes)
    if is_probed(run.method) and not (path := _statistics(folder, run)).exists():
        part = path.with_suffix(".part")
        base, _ = load(run.model, run.dtype)
        probe(base, DowserConfig(seed=PROBE_SEED)).save(part)
        part.rename(path)


def _reference(folder: Path, run: Run) -> Path:
    return folder / f"reference-{run.dtype}.safetensors"


def _statistics(folder: Path, run: Run) -> Path:
    return folder / f"probe-{run.dtype}.safetensors"


def _own_texts(run: Run) -> DowserConfig:
    return DowserConfig(num_probes=32, seed=10_000 + run.seed)
