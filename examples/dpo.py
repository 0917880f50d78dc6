"""Teach a model which of two answers is better, with TRL's DPO:

    python examples/dpo.py --preferences FILE --model Qwen/Qwen3-0.6B --output my-adapter

FILE has one line of JSON per example, with texts or with messages:

    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "Five."}

Without `--model` it trains the small model in `examples/tiny_llava`, which reverses words; without `--preferences` it
learns to do so in capitals. DPO's reference is the base with the adapter switched off, so no second model is loaded. In
the log, `rewards/accuracies` is how often the better answer has gained more.
"""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer

from peft_dowser import DowserConfig

TINY_LLAVA = Path(__file__).parent / "tiny_llava"


def capitals(count: int) -> Dataset:
    rng = random.Random(0)
    words = ["".join(rng.sample("abcdefghijklmnop", 3)) for _ in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"rev {word}?"}],
                "chosen": [{"role": "assistant", "content": word[::-1].upper()}],
                "rejected": [{"role": "assistant", "content": word[::-1]}],
            }
            for word in words
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach a model which of two answers is the better one.")
    parser.add_argument("--preferences", help="file of JSON lines with prompt, chosen and rejected")
    parser.add_argument("--model", default=str(TINY_LLAVA), help="folder or Hub id of the base model")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    options = parser.parse_args()

    given = options.preferences
    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            model_init_kwargs={"dtype": "auto"},
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=given, split="train") if given else capitals(1000),
        peft_config=DowserConfig(update_ratio=0.1, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
