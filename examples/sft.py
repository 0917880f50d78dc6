"""Fine-tune a language model on your own texts with TRL, from a YAML file:

    python examples/sft.py --config examples/sft.yaml

Every key of the file can also be an argument, which overrides the file. `--help` lists the options of TRL's `SFTConfig`
and of `DowserConfig`. Data sets are Hub ids or folders with JSON lines that have a `text`, or `messages`:

    python examples/sft.py --config examples/sft.yaml --dataset_name my_texts --model_name_or_path my_model

The test split of the data is held out, or the last tenth of the training split where there is none. A line at the end
says what was learned of it, and what was forgotten; `--no_measure` leaves that out.
"""

import argparse
from dataclasses import dataclass, field, fields, make_dataclass
from itertools import takewhile
from typing import Any, get_type_hints

import torch
from datasets import DatasetDict, load_dataset
from recipe import Question, folder_or_id, model_name, rows_of, show_log, start, train
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from peft_dowser import DowserConfig, ForgettingCallback, RehearsalCallback

# The fields of `DowserConfig` that fit a command line, with its types, defaults and help.
OPTIONS = (
    "update_ratio",
    "granularity",
    "channels",
    "score",
    "last_layers",
    "num_probes",
    "num_rademacher",
    "probe_length",
    "statistics",
)
TYPES = get_type_hints(DowserConfig)
DowserArguments = make_dataclass(
    "DowserArguments",
    [
        (option.name, TYPES[option.name], field(default=option.default, metadata=option.metadata))
        for option in fields(DowserConfig)
        if option.name in OPTIONS
    ],
)


@dataclass
class RecipeArguments:
    """What this recipe adds."""

    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in the output folder"})
    measure: bool = field(default=True, metadata={"help": "measure what is learned and what is forgotten"})
    rehearse: float = field(
        default=0.0, metadata={"help": "weight of KL(base || adapted) on texts that the base writes"}
    )


def beginning(row: dict[str, Any]) -> Question:
    """What an example begins with, to be answered or continued."""
    if "messages" in row:
        return list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))
    return row["prompt"] if "prompt" in row else row["text"][:40]


def read_arguments() -> tuple[Any, ...]:
    """The arguments and the file; names of nothing that exists are refused here."""
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DowserArguments, RecipeArguments))
    try:
        found = script, _, model, *_ = parser.parse_args_and_config()
        if model.model_name_or_path is None or script.dataset_name is None:
            parser.error("--model_name_or_path and --dataset_name are needed, or a --config that has them")
        model_name(model.model_name_or_path)
        folder_or_id(script.dataset_name)
    except FileNotFoundError as error:
        parser.error(f"there is no file '{error.filename}'")
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return found


def parts(data: DatasetDict, script: ScriptArguments, recipe: RecipeArguments) -> dict[str, Any]:
    """The data of the trainer."""
    rows = data[script.dataset_train_split]
    if script.dataset_test_split in data:
        return {"train_dataset": rows, "eval_dataset": data[script.dataset_test_split]}
    return rows_of(rows, recipe)


def main() -> None:
    script, training, model, dowser, recipe = read_arguments()
    show_log()
    training.model_init_kwargs = {"dtype": model.dtype, "revision": model.model_revision}
    training.dataloader_pin_memory &= torch.cuda.is_available()  # a warning without
    if recipe.measure:
        training.eval_on_start = True
        training.eval_strategy = "epoch" if training.eval_strategy == "no" else training.eval_strategy
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        **parts(data, script, recipe),
        peft_config=DowserConfig(task_type="CAUSAL_LM", seed=training.seed, **vars(dowser)),
    )
    # What the model forgets, on prompts that it writes itself: needs no data.
    own = DowserConfig(num_probes=dowser.num_probes, probe_length=dowser.probe_length, seed=training.seed)
    if recipe.measure:
        trainer.add_callback(ForgettingCallback(config=own, trainer=trainer))
    if recipe.rehearse:  # on other texts than those that forgetting is measured on
        others = DowserConfig(num_probes=32, probe_length=dowser.probe_length, seed=training.seed + 1)
        trainer.add_callback(RehearsalCallback(weight=recipe.rehearse, config=others))
    train(trainer, beginning(data[script.dataset_train_split][0]), recipe.resume or training.resume_from_checkpoint)


if __name__ == "__main__":
    start(main)
