"""Fine-tune an image-text model on questions and answers about images of your own:

    python examples/vision_sft.py --images FOLDER --model llava-hf/llava-1.5-7b-hf --output my-adapter

FOLDER has the images and a `metadata.jsonl` with one line per example:

    {"file_name": "cat.png", "question": "What is this?", "answer": "A cat."}

Without `--model` it is the small LLaVA in `examples/tiny_llava`, without `--images` a task that it cannot do yet: pale
digits and the invented words that name them. Only the language model trains; vision tower and connector stay.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, RehearsalCallback

TINY_LLAVA = Path(__file__).parent / "tiny_llava"


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
    sys.path.insert(0, str(TINY_LLAVA))
    from tasks import DOWNSTREAM, trl_records

    return Dataset.from_list(trl_records(DOWNSTREAM["style"].sample(count, seed=0, split="train")))


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune an image-text model on questions about images.")
    parser.add_argument("--images", help="folder with images and a metadata.jsonl")
    parser.add_argument("--model", default=str(TINY_LLAVA), help="folder or Hub id of an image-text model")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rehearse", type=float, default=0.0, help="weight of the KL to the base on its own texts")
    options = parser.parse_args()

    # The base's own texts, after noise images.
    texts = DowserConfig(probe_images=1.0)

    trainer = SFTTrainer(
        model=options.model,  # brings its processor along
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            max_length=None,  # a cut could fall into the tokens of an image
            model_init_kwargs={"dtype": "auto"},
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=conversations(options.images) if options.images else pale_digits(1000),
        # Half of the probes begin with a noise image, which protects the way from the images to the answers too.
        peft_config=DowserConfig(update_ratio=0.1, probe_images=0.5, task_type="CAUSAL_LM"),
        callbacks=[RehearsalCallback(weight=options.rehearse, config=texts)] if options.rehearse else None,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
