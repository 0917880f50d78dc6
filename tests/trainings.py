"""Short trainings of a tiny model by the Trainer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

QUIET = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


class State:
    global_step = 0


# What a Trainer hands to each of its hooks before the model.
HOOK: Any = (None, State(), None)


def rows(count: int = 16, seed: int = 0) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 64, (count, 10), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


class Recorder:
    """A collator that remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, samples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        batch = torch.tensor([sample["input_ids"] for sample in samples])
        self.batches.append(batch)
        return {"input_ids": batch, "labels": batch}


def trained(
    model: nn.Module, folder: Path, callbacks: list[TrainerCallback], resume: str | None = None, **options: Any
) -> tuple[Trainer, Recorder]:
    recorder = Recorder()
    arguments = {"max_steps": 4, "per_device_train_batch_size": 2} | QUIET | options
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        data_collator=recorder,
        train_dataset=rows(),
        eval_dataset=rows(4, seed=2) if "eval_strategy" in options else None,
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
