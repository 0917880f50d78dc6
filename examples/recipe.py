"""What the recipes share: their options, what follows from the options, and an answer before and after the training."""

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, Trainer

from peft_dowser import DowserConfig

EXAMPLES = Path(__file__).parent
TINY_LLAVA = str(EXAMPLES / "tiny_llava")
LEARNING_RATE = 3e-4
# The score that is recommended for what is chosen.
SCORES = {"weight": "dowser", "input_channel": "activity"}

# A text to be continued, or messages to be answered.
Question = str | list[dict[str, Any]]


def parser(
    description: str, steps: int = 200, batch_size: int = 8, max_length: int | None = 512, rate: float = LEARNING_RATE
) -> argparse.ArgumentParser:
    """The options of every recipe. A `max_length` of None leaves out that option."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    found.add_argument("--model", default=TINY_LLAVA, help="folder or Hub id of the base model")
    found.add_argument("--output", required=True, help="folder for the adapter")
    found.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    add_training(found, steps, batch_size, rate)
    if max_length is not None:
        found.add_argument("--max-length", type=int, default=max_length, help="tokens; longer texts are cut")
    add_dowser(found)
    return found


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
    found.add_argument("--statistics", help="file of `peft-dowser probe`; without it the model is probed, once")


def config(options: argparse.Namespace, task_type: str = "CAUSAL_LM") -> DowserConfig:
    """The choice of what trains."""
    return DowserConfig(
        update_ratio=options.update_ratio,
        granularity=options.granularity,
        channels=options.channels,
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
    return {
        "output_dir": options.output,
        "max_steps": options.steps,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.batch_size,
        "save_steps": 0.25,  # four checkpoints; --resume goes on from the last one
        "save_total_limit": 1,
        "logging_steps": 10,
        "bf16": torch.cuda.is_available(),
        "report_to": "none",
    }


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


def train(trainer: Trainer, question: Question, resume: bool | str | None = None) -> None:
    """Train and save; show an answer before and after, and what can be done next."""
    before = answer(trainer.model, trainer.processing_class, question)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model()
    after = answer(trainer.model, trainer.processing_class, question)
    folder = str(trainer.args.output_dir)
    print(f"\nquestion: {words(question)}\nbefore:   {before}\nafter:    {after}\n\nsaved:    {folder}")
    print("next:     " + "\n          ".join(next_commands(folder, trainer.model.peft_config["default"].granularity)))


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
