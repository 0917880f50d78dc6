"""Fine-tune an image-text model on questions and answers about images of your own:

    python examples/vision_sft.py --images FOLDER --model llava-hf/llava-1.5-7b-hf

FOLDER has the images and a `metadata.jsonl` with one line per example:

    {"file_name": "cat.png", "question": "What is this?", "answer": "A cat."}

Without `--model` it is the small LLaVA in `examples/tiny_llava`, without `--images` a task that it cannot do yet: pale
digits and the invented words that name them. Only the language model trains; vision tower and connector stay. The last
tenth of the examples is held out: a line at the end says what was learned of it, and what was forgotten.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from recipe import TINY_LLAVA, config, forgetting, parse, parser, rows_of, start, train, training
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, RehearsalCallback


def image_folder(name: str) -> str:
    """The type of an option that names a folder of images."""
    if not any(Path(name).rglob("metadata.*")):
        raise argparse.ArgumentTypeError(f"there is no folder '{name}' with a metadata.jsonl")
    return name


def conversations(folder: str) -> Dataset:
    """The examples of a folder as TRL takes them; only the answers count in the loss."""
    rows = load_dataset("imagefolder", data_dir=folder, split="train")
    return rows.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=["question", "answer"],
    )


def pale_digits(count: int) -> Dataset:
    sys.path.insert(0, TINY_LLAVA)
    from tasks import DOWNSTREAM, trl_records

    records = trl_records(DOWNSTREAM["style"].sample(count, seed=0, split="train"))
    return Dataset.from_list([record | {"image": record.pop("images")[0]} for record in records])


def question(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The image and the question of an example."""
    text = {"type": "text", "text": row["prompt"][0]["content"]}
    return [{"role": "user", "content": [{"type": "image", "image": row["image"]}, text]}]


def main() -> None:
    arguments = parser("Fine-tune an image-text model on questions about images.", "my-vision-adapter", max_length=None)
    arguments.add_argument("--images", type=image_folder, help="folder with images and a metadata.jsonl")
    arguments.add_argument("--rehearse", type=float, default=0.0, help="weight of the KL to the base on its own texts")
    arguments.set_defaults(granularity="weight")  # which kept more of an image-text model in the study
    options = parse(arguments, "model", "images")

    data = conversations(options.images) if options.images else pale_digits(1000)
    chosen = config(options)
    # Half of the probes begin with a noise image, which protects the way from the images to the answers too.
    chosen.probe_images = 0.5
    # The base's own texts, after noise images.
    texts = DowserConfig(probe_images=1.0)
    rehearsal = [RehearsalCallback(weight=options.rehearse, config=texts)] if options.rehearse else []
    trainer = SFTTrainer(
        model=options.model,  # brings its processor along
        args=SFTConfig(
            **training(options),
            max_length=None,  # a cut could fall into the tokens of an image
            model_init_kwargs={"dtype": "auto"},
        ),
        **rows_of(data, options),
        peft_config=chosen,
        callbacks=[*forgetting(options, images=1.0), *rehearsal],
    )
    train(trainer, question(data[0]), options.resume)


if __name__ == "__main__":
    start(main)
