"""Teach a model which of two answers is better, with TRL's DPO:

    python examples/dpo.py --preferences FILE --model Qwen/Qwen3-0.6B

FILE has one line of JSON per example, with texts or with messages:

    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "Five."}

Without `--model` it trains the small model in `examples/tiny_llava`, which reverses words; without `--preferences` it
learns to do so in capitals. DPO's reference is the base with the adapter switched off, so no second model is loaded. In
the log, `rewards/accuracies` is how often the better answer has gained more. The last tenth of the pairs is held out: a
line at the end says how their loss fell, which begins at log 2 = 0.693, and what was forgotten.
"""

import random

from datasets import Dataset, load_dataset
from recipe import config, existing_file, forgetting, max_length, parse, parser, rows_of, start, train, training
from trl import DPOConfig, DPOTrainer


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
    arguments = parser("Teach a model which of two answers is the better one.", "my-dpo-adapter", steps=100)
    arguments.add_argument(
        "--preferences", type=existing_file, help="file of JSON lines with prompt, chosen and rejected"
    )
    options = parse(arguments, "model", "preferences")

    given = options.preferences
    data = load_dataset("json", data_files=given, split="train") if given else capitals(1000)
    trainer = DPOTrainer(
        model=options.model,
        args=DPOConfig(
            **training(options),
            max_length=max_length(options),
            model_init_kwargs={"dtype": "auto"},
        ),
        **rows_of(data, options),
        peft_config=config(options),
        callbacks=forgetting(options),
    )
    train(trainer, data[0]["prompt"], options.resume, unit="nats per pair")


if __name__ == "__main__":
    start(main)
