"""One fine-tuning: adapt, train with the Hugging Face Trainer, and score what was learned and what was lost."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from methods import adapt, after_training, decoder_linears
from sources import Batch, Example, Source
from tasks import accuracy
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments

from peft_dowser.delta.apply import add_delta_

BATCH = 32
CALIBRATION = 64  # examples of the task, for the methods that need data


@dataclass(frozen=True)
class Run:
    """What decides a fine-tuning; equal runs give equal records.

    Attributes:
        model: folder or Hub id of the base.
        task: the new task, or several in a row, joined by "+".
        method: a name of `methods`.
        update_ratio: rho.
        learning_rate: of AdamW, with a cosine schedule.
        seed: of batches, probes and masks. One seed gives all methods the same batches.
        steps: optimizer steps per task.
        last_layers: adapt only the last layers of the decoder.
    """

    model: str
    task: str
    method: str
    update_ratio: float
    learning_rate: float
    seed: int
    steps: int = 150
    last_layers: int | None = None


Record = dict[str, Any]


def run_all(
    run: Run, sources: Sequence[Source], afterwards: Mapping[str, Sequence[float]] | None = None
) -> list[Record]:
    """Carry out a run.

    Args:
        run: what to do.
        sources: the model with each new task, in the order of training.
        afterwards: for a full fine-tuning, the post-merge methods to make of it, and the ratios of each.

    Returns:
        One record for the run, and one for every post-merge: the fields of `Run`, and what was measured, in percent:
        `upstream` by task, `upstream_mean`, `downstream` (the last task), `scores` (a row per trained task with the
        accuracy on each task so far), `trained` (weights), `seconds` (of preparation and training).
    """
    model, processor = sources[0].load()
    started = time.perf_counter()
    examples = sources[0].train(10_000 + run.seed, CALIBRATION)
    device = model.device

    def calibration() -> list[Batch]:
        return [_on(device, sources[0].collate([example], processor)) for example in examples]

    adapted, callbacks = adapt(model, run.method, run.update_ratio, run.seed, calibration, run.last_layers)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    scores = []
    for number, source in enumerate(sources):
        train(adapted, processor, source, run, callbacks)
        scores.append([score(adapted, processor, seen.test, seen) for seen in sources[: number + 1]])
    seconds = time.perf_counter() - started
    records = [_record(run, adapted, processor, sources[0], scores, trained, seconds)]
    for method, ratios in (afterwards or {}).items():
        for ratio in ratios:
            records.append(_merged_record(run, method, ratio, adapted, processor, sources[0], seconds))
    return records


def train(model: nn.Module, processor: ProcessorMixin, source: Source, run: Run, callbacks: list) -> None:
    """Train on the source's new task; the order of the examples is a function of the seed."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=run.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=run.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=5,
            weight_decay=0.0,
            seed=run.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=source.train(run.seed, BATCH * run.steps),
            data_collator=lambda examples: source.collate(examples, processor),
            callbacks=callbacks,
        )
        trainer.train()


def score(model: nn.Module, processor: ProcessorMixin, examples: Sequence[Example], source: Source) -> float:
    """Percent of the examples answered right, under teacher forcing."""
    return accuracy(model, processor, examples, source.batch_size, source.collate)


def _record(
    run: Run,
    model: nn.Module,
    processor: ProcessorMixin,
    source: Source,
    scores: list[list[float]],
    trained: int,
    seconds: float,
) -> Record:
    upstream = {name: score(model, processor, examples, source) for name, examples in source.upstream.items()}
    return {
        **asdict(run),
        "upstream": upstream,
        "upstream_mean": statistics.fmean(upstream.values()),
        "downstream": scores[-1][-1],
        "scores": scores,
        "trained": trained,
        "seconds": seconds,
    }


def _merged_record(
    run: Run,
    method: str,
    ratio: float,
    tuned: PreTrainedModel,
    processor: ProcessorMixin,
    source: Source,
    seconds: float,
) -> Record:
    """Score what a post-merge method makes of a full fine-tuning."""
    started = time.perf_counter()
    base, _ = source.load()
    examples = source.train(10_000 + run.seed, CALIBRATION)
    batches = [_on(base.device, source.collate(examples[i : i + 16], processor)) for i in range(0, CALIBRATION, 16)]
    weights = {name: linear.weight.detach() for name, linear in decoder_linears(tuned, run.last_layers).items()}
    deltas = after_training(method, base, weights, ratio, run.seed, batches, run.last_layers)
    for name, delta in deltas.items():
        add_delta_(base.get_submodule(name).weight.data, delta.positions, delta.values)
    kept = sum(delta.positions.numel() for delta in deltas.values())
    seconds += time.perf_counter() - started
    made = Run(**{**asdict(run), "method": method, "update_ratio": ratio})
    scores = [[score(base, processor, source.test, source)]]
    return _record(made, base, processor, source, scores, kept, seconds)


def base_record(source: Source) -> Record:
    """Scores of the base itself."""
    model, processor = source.load()
    run = Run(source.model, "", "base", 0.0, 0.0, 0, 0)
    return _record(run, model, processor, source, [[score(model, processor, source.test, source)]], 0, 0.0)


def _on(device: torch.device, batch: Batch) -> Batch:
    return {key: value.to(device) for key, value in batch.items()}
