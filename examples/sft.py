"""Fine-tune a language model on your own texts with TRL, from a YAML file:

    python examples/sft.py --config examples/sft.yaml

Every key of the file can also be an argument, which overrides the file. `--help` lists the options of TRL's `SFTConfig`
and of `DowserConfig`. Data sets are Hub ids or folders with JSON lines that have a `text`, or `messages`:

    python examples/sft.py --config examples/sft.yaml --dataset_name my_texts --model_name_or_path my_model
"""

from dataclasses import dataclass, field, fields, make_dataclass
from itertools import takewhile
from typing import Any, get_type_hints

from datasets import load_dataset
from recipe import Question, train
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
class RehearsalArguments:
    """Whether the model is held to its base."""

    rehearse: float = field(
        default=0.0, metadata={"help": "weight of KL(base || adapted) on texts that the base writes"}
    )


def beginning(row: dict[str, Any]) -> Question:
    """What an example begins with, to be answered or continued."""
    if "messages" in row:
        return list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))
    return row["prompt"] if "prompt" in row else row["text"][:40]


def main(arguments: list[str] | None = None) -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DowserArguments, RehearsalArguments))
    script, training, model, dowser, rehearsal = parser.parse_args_and_config(arguments)
    training.model_init_kwargs = {"dtype": model.dtype, "revision": model.model_revision}
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    rows = data[script.dataset_train_split]
    evaluated = training.eval_strategy != "no"
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows,
        eval_dataset=data[script.dataset_test_split] if evaluated else None,
        peft_config=DowserConfig(task_type="CAUSAL_LM", seed=training.seed, **vars(dowser)),
    )
    # What the model forgets, on prompts that it writes itself: needs no data.
    own = DowserConfig(num_probes=dowser.num_probes, probe_length=dowser.probe_length, seed=training.seed)
    trainer.add_callback(ForgettingCallback(config=own, trainer=trainer))
    if rehearsal.rehearse:  # on other texts than those that forgetting is measured on
        others = DowserConfig(num_probes=32, probe_length=dowser.probe_length, seed=training.seed + 1)
        trainer.add_callback(RehearsalCallback(weight=rehearsal.rehearse, config=others))
    train(trainer, beginning(rows[0]), training.resume_from_checkpoint)


if __name__ == "__main__":
    main()
