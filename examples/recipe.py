"""What the recipes share: their options, what follows from the options, and what they say before and after."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer, TrainerCallback

from peft_dowser import DowserConfig, ForgettingCallback

EXAMPLES = Path(__file__).parent
TINY_LLAVA = str(EXAMPLES / "tiny_llava")
README = str(EXAMPLES.parent / "README.md")
LEARNING_RATE = 3e-4
# The score that is recommended for what is chosen.
SCORES = {"weight": "dowser", "input_channel": "activity"}
SCALE = "0.01 is little, 0.1 is clearly visible"

# A text to be continued, or messages to be answered.
Question = str | list[dict[str, Any]]


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help that shows the defaults, where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False
        return action.help if says_nothing else super()._get_help_string(action)


def start(main: Callable[[], None]) -> None:
    """Run a recipe. Ctrl-C ends it with one line."""
    try:
        main()
    except KeyboardInterrupt as stop:
        where = str(stop) or "Stopped while nothing was trained: the same command starts from the beginning."
        print(f"\n{where}", file=sys.stderr)
        sys.exit(130)


def parser(
    description: str,
    output: str = "my-adapter",
    steps: int = 200,
    batch_size: int = 8,
    max_length: int | None = 512,
    measures: bool = True,
) -> argparse.ArgumentParser:
    """The options of every recipe that saves an adapter.

    Args:
        description: for the help.
        output: where the adapter goes by default.
        steps, batch_size, max_length: defaults; a `max_length` of None leaves out that option.
        measures: whether there is a `--measure`.
    """
    found = argparse.ArgumentParser(description=description, formatter_class=Defaults)
    add_model(found)
    found.add_argument("--output", default=output, help="folder for the adapter")
    found.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add_training(found, steps, batch_size, LEARNING_RATE)
    if max_length is not None:
        found.add_argument("--max-length", type=int, default=max_length, help="tokens; longer texts are cut")
    found.set_defaults(measure=False)
    if measures:
        found.add_argument(
            "--measure",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="hold the last tenth of the data out, and measure what is learned and forgotten",
        )
    add_dowser(found)
    return found


def parse(arguments: argparse.ArgumentParser, *examples: str) -> argparse.Namespace:
    """The options of a command line, with a line for whatever is not as it may be expected.

    Args:
        arguments: the parser.
        examples: the options in whose place an example of this project stands when they are not given.
    """
    options = arguments.parse_args()
    for name in examples:
        if (value := getattr(options, name)) == arguments.get_default(name):
            print(f"--{name} is not given: this uses the example of the project{f', {value}' if value else ''}.")
    output = getattr(options, "output", None)
    if output and Path(output, "adapter_config.json").is_file() and not getattr(options, "resume", False):
        print(f"There is an adapter in '{output}'. The new one will replace it; --output names another folder.")
    show_log()
    return options


def refuse_used(arguments: argparse.ArgumentParser, folder: str | Path) -> None:
    """Say before the work, and not after it, that a merge writes into new or empty folders only."""
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        arguments.error(f"there are files in '{folder}' already; --output names another folder")


def show_log() -> None:
    """Let the package say, in a line each, whether a probe was read from the cache, and how many weights train."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("peft_dowser").setLevel(logging.INFO)


def existing_file(path: str) -> str:
    """The type of an option that names a file."""
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"there is no file '{path}'")
    return path


def model_name(name: str) -> str:
    """The type of an option that names a model: a folder, or what may be a Hub id."""
    return folder_or_id(name, "config.json")


def folder_or_id(name: str, holds: str = "") -> str:
    """A folder, which must hold a file if one is named, or what may be a Hub id.

    Raises:
        argparse.ArgumentTypeError: it is neither.
    """
    path = Path(name)
    if path.is_dir() and not (path / holds).exists():
        raise argparse.ArgumentTypeError(f"the folder '{name}' has no {holds}")
    looks_like_path = path.exists() or name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1
    if looks_like_path and not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{name}'")
    return name


def add_model(found: argparse.ArgumentParser) -> None:
    """The option that names the base."""
    found.add_argument("--model", type=model_name, default=TINY_LLAVA, help="folder or Hub id of the base model")


def add_text(found: argparse.ArgumentParser) -> None:
    """The option that names the text."""
    found.add_argument("--text", type=existing_file, default=README, help="text file, UTF-8")


def add_training(found: argparse.ArgumentParser, steps: int, batch_size: int, rate: float) -> None:
    """The options of the training itself."""
    found.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    found.add_argument("--batch-size", type=int, default=batch_size, help="examples per step and device")
    found.add_argument("--learning-rate", type=float, default=rate, help="peak of AdamW's rate")


def add_dowser(found: argparse.ArgumentParser, update_ratio: float = 0.1, granularity: str = "input_channel") -> None:
    """The options that choose what trains."""
    found.add_argument("--update-ratio", type=float, default=update_ratio, help="rho, the share of a matrix to train")
    found.add_argument("--channels", type=int, help="input channels per matrix, as LoRA's r; replaces --update-ratio")
    add_ranking(found, granularity)


def add_ranking(found: argparse.ArgumentParser, granularity: str = "input_channel") -> None:
    """The options that say what is ranked, and by what."""
    found.add_argument(
        "--granularity",
        choices=["weight", "input_channel"],
        default=granularity,
        help="train single weights, as in the paper, or whole input channels, which can be served as LoRA",
    )
    found.add_argument(
        "--score", help="what ranks the weights (default: activity for input channels, dowser for single weights)"
    )
    found.add_argument(
        "--statistics", type=existing_file, help="file of `peft-dowser probe`; without it the model is probed, once"
    )


def config(options: argparse.Namespace, task_type: str = "CAUSAL_LM") -> DowserConfig:
    """The choice of what trains."""
    size = {"channels": options.channels} if options.channels else {"update_ratio": options.update_ratio}
    return DowserConfig(
        **size,
        granularity=options.granularity,
        score=options.score or SCORES[options.granularity],
        statistics=options.statistics,
        task_type=task_type,
    )


def needs_probe(chosen: DowserConfig) -> bool:
    """Whether the weights are chosen by statistics that are not there yet."""
    return chosen.statistics is None and chosen.score not in ("random", "magnitude")


def load(name: str) -> PreTrainedModel:
    """A model of the class that its config names."""
    (architecture,) = AutoConfig.from_pretrained(name).architectures
    return getattr(transformers, architecture).from_pretrained(name, dtype="auto")


def training(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a Trainer that all recipes have in common."""
    on_gpu = torch.cuda.is_available()
    measured = {"eval_strategy": "steps", "eval_steps": options.steps, "eval_on_start": True}  # before and after
    return {
        "output_dir": options.output,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "save_steps": 0.25,  # four checkpoints; --resume goes on from the last one
        "save_total_limit": 1,
        "logging_steps": 10,
        "bf16": on_gpu,
        "dataloader_pin_memory": on_gpu,  # a warning without
        "report_to": "none",
        **(measured if options.measure else {}),
    }


def packed(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of TRL's trainer that cut a text into pieces of --max-length tokens."""
    return {"packing": True, "packing_strategy": "wrapped", "max_length": max_length(options)}


def text_of(options: argparse.Namespace) -> dict[str, Dataset | None]:
    """The data of a trainer from --text."""
    text = Path(options.text).read_text("utf-8")
    cut = len(text) * 9 // 10 if options.measure else len(text)
    return {
        "train_dataset": Dataset.from_dict({"text": [text[:cut]]}),
        "eval_dataset": Dataset.from_dict({"text": [text[cut:]]}) if options.measure else None,
    }


def rows_of(data: Dataset, options: argparse.Namespace) -> dict[str, Dataset | None]:
    """The data of a trainer from rows; with --measure the last tenth of them is held out, one at least."""
    if not options.measure:
        return {"train_dataset": data, "eval_dataset": None}
    if len(data) == 1:
        print("There is one example only, which cannot be held out: it is trained on and measured.")
        return {"train_dataset": data, "eval_dataset": data}
    cut = len(data) - max(1, len(data) // 10)
    return {"train_dataset": data.select(range(cut)), "eval_dataset": data.select(range(cut, len(data)))}


def forgetting(options: argparse.Namespace, images: float = 0.0) -> list[TrainerCallback]:
    """With --measure, what measures the forgetting on texts that the base writes, and that the probe does not use.

    Args:
        options: of the command line.
        images: share of the texts that begin with a noise image.
    """
    own = DowserConfig(num_probes=16, seed=1, probe_images=images)
    return [ForgettingCallback(config=own)] if options.measure else []


def max_length(options: argparse.Namespace) -> int:
    """--max-length, or what the model can read, if that is less."""
    return min(options.max_length, AutoTokenizer.from_pretrained(options.model).model_max_length)


def read(processing: Any, messages: list[dict[str, Any]], is_prompt: bool) -> Any:
    """What a model is given for messages; a prompt ends where the model is to answer."""
    return processing.apply_chat_template(
        messages, add_generation_prompt=is_prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )


@torch.no_grad()
def answer(model: Any, processing: Any, question: Question, tokens: int = 40) -> str:
    """What a model writes, taking the likeliest token each time.

    Args:
        model: a causal language model, or an image-text model.
        processing: its tokenizer, or its processor.
        question: a text or messages; a message may hold an image.
        tokens: how many at most.
    """
    text = isinstance(question, str)
    inputs = processing(text=question, return_tensors="pt") if text else read(processing, question, is_prompt=True)
    was_training = model.training
    written = model.eval().generate(**inputs.to(model.device), max_new_tokens=tokens, do_sample=False)
    model.train(was_training)
    return processing.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


class Saved(TrainerCallback):
    """Knows the last whole checkpoint of a training."""

    def __init__(self, folder: str | None) -> None:
        self.folder = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.folder = f"{args.output_dir}/checkpoint-{state.global_step}"


def last_checkpoint(folder: str) -> str | None:
    """The last whole checkpoint in a folder; the state of the trainer is written last."""
    found = [path.parent for path in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def fit(trainer: Trainer, resume: bool | str | None = None) -> None:
    """Train.

    Args:
        trainer: a trainer.
        resume: go on from a checkpoint, or with True from the last one in the output folder, if there is one.

    Raises:
        KeyboardInterrupt: with the step where it stopped, and how to go on.
    """
    folder = str(trainer.args.output_dir)
    found = last_checkpoint(folder) if resume is True else resume or None
    if resume:
        none = f"There is no checkpoint in '{folder}': the training starts from the beginning."
        print(f"The training goes on from {found}." if found else none)
    saved = Saved(found)
    trainer.add_callback(saved)
    try:
        trainer.train(resume_from_checkpoint=found)
    except KeyboardInterrupt:
        go_on = f"The last checkpoint is {saved.folder}: the same command with --resume goes on from there."
        anew = "No checkpoint was saved yet: the same command starts from the beginning."
        step = f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps}."
        raise KeyboardInterrupt(f"{step} {go_on if saved.folder else anew}") from None


def save(trainer: Trainer) -> None:
    """Save the adapter, with the card of PEFT and of this package.

    The card that TRL writes with a checkpoint would stand in its place otherwise. For a base in a local folder, with
    any adapter, it says "a fine-tuned version of None".
    """
    if trainer.is_world_process_zero():
        Path(str(trainer.args.output_dir), "README.md").unlink(missing_ok=True)
    trainer.save_model()


def train(
    trainer: Trainer,
    question: Question,
    resume: bool | str | None = None,
    score: str = "loss",
    unit: str = "nats per token",
) -> None:
    """Train and save; show an answer and what was measured before and after, and what can be done next.

    Args:
        trainer: a trainer of an adapter.
        question: what the model answers before and after.
        resume: as `fit` takes it.
        score, unit: how the trainer's log calls what is measured on the data that are held out, and its unit.
    """
    before = answer(trainer.model, trainer.processing_class, question)
    fit(trainer, resume)
    save(trainer)
    after = answer(trainer.model, trainer.processing_class, question)
    folder = str(trainer.args.output_dir)
    print(f"\nquestion: {words(question)}\nbefore:   {before}\nafter:    {after}\n")
    if trainer.args.eval_strategy != "no":
        print(f"measured: {measured(trainer.state.log_history, score, unit)}")
    print(f"saved:    {folder}")
    print("next:     " + "\n          ".join(next_commands(folder, trainer.model.peft_config["default"].granularity)))


def values(history: list[dict[str, float]], name: str) -> list[float]:
    """What a trainer has logged under a name, in its order."""
    return [entry[name] for entry in history if name in entry]


def measured(history: list[dict[str, float]], score: str = "loss", unit: str = "nats per token") -> str:
    """What was learned and what was forgotten, in a line."""
    parts = []
    if found := values(history, f"eval_{score}"):
        parts.append(f"{score} on held-out data {found[0]:.3f} -> {found[-1]:.3f} {unit}")
    if found := values(history, "forgetting"):
        parts.append(f"forgot {found[-1]:.3f} nats per token ({SCALE})")
    return ", ".join(parts)


def words(question: Question) -> str:
    """The text of a question, without its images."""
    if isinstance(question, str):
        return question
    content = question[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def next_commands(folder: str, granularity: str) -> list[str]:
    """What can be done with the adapter in a folder."""
    commands = [f"peft-dowser inspect {folder}", f"peft-dowser merge {folder} -o {folder}/merged"]
    if granularity == "input_channel":
        commands.append(f"peft-dowser export-lora {folder} -o {folder}/lora")
    return [*commands, f"{folder}/README.md says how it is loaded"]
