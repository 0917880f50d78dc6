"""Train a model on a reward of your own, with TRL's GRPO:

    python examples/grpo.py --prompts FILE --model Qwen/Qwen3-0.6B --output my-adapter

The reward is a function of the texts that the model writes, here `without_e`: like the novel "Gadsby", they should
avoid the letter e. FILE has one prompt per line. Without `--model` it trains the small model in
`examples/tiny_llava`, which continues English text letter by letter. In the log, `reward` shows the progress.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from peft_dowser import DowserConfig

TINY_LLAVA = Path(__file__).parent / "tiny_llava"
PROMPTS = ["Return the ", "If the ", "This function ", "A list of ", "The file ", "When an object ", "Note that "]


def without_e(completions: list[str], **columns: list) -> list[float]:
    """One reward per text: the share of its characters other than e, from 0 to 1."""
    return [1 - text.lower().count("e") / max(1, len(text)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model on a reward.")
    parser.add_argument("--prompts", help="text file, one prompt per line")
    parser.add_argument("--model", default=str(TINY_LLAVA), help="folder or Hub id of the base model")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()

    prompts = Path(options.prompts).read_text("utf-8").splitlines() if options.prompts else PROMPTS
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=without_e,
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            # Eight texts for each prompt are compared with one another.
            per_device_train_batch_size=8,
            num_generations=8,
            max_completion_length=32,
            model_init_kwargs={"dtype": "auto"},
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        peft_config=DowserConfig(update_ratio=0.1, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
