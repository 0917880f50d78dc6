"""Fine-tune a language model on a text file of your own:

    python examples/text_sft.py --text FILE --model Qwen/Qwen3-0.6B --output my-adapter

Without `--model` it trains the small model in `examples/tiny_llava`, without `--text` on the project's README: less
than a minute on a CPU. The README.md in the output folder says how the adapter is loaded.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, RehearsalCallback

EXAMPLES = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a language model on a text file.")
    parser.add_argument("--text", default=str(EXAMPLES.parent / "README.md"), help="text file, UTF-8")
    parser.add_argument("--model", default=str(EXAMPLES / "tiny_llava"), help="folder or Hub id of the base model")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--rehearse", type=float, default=0.0, help="weight of the KL to the base on its own texts")
    options = parser.parse_args()

    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            # Cut the text into pieces of this many tokens.
            packing=True,
            packing_strategy="wrapped",
            max_length=min(512, AutoTokenizer.from_pretrained(options.model).model_max_length),
            model_init_kwargs={"dtype": "auto"},
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=load_dataset("text", data_files=options.text, sample_by="document", split="train"),
        peft_config=DowserConfig(update_ratio=0.1, task_type="CAUSAL_LM"),
        callbacks=[RehearsalCallback(weight=options.rehearse)] if options.rehearse else None,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
