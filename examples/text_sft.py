"""Fine-tune a language model on a text file of your own:

    python examples/text_sft.py --text FILE --model Qwen/Qwen3-0.6B --output my-adapter

Without `--model` it trains the small model in `examples/tiny_llava`, without `--text` on the project's README: less
than a minute on a CPU. At the end the model continues the beginning of the text, as it did before and as it does now.
"""

from pathlib import Path

from datasets import load_dataset
from recipe import EXAMPLES, config, max_length, parser, train, training
from trl import SFTConfig, SFTTrainer

from peft_dowser import RehearsalCallback


def main() -> None:
    arguments = parser("Fine-tune a language model on a text file.")
    arguments.add_argument("--text", default=str(EXAMPLES.parent / "README.md"), help="text file, UTF-8")
    arguments.add_argument("--rehearse", type=float, default=0.0, help="weight of the KL to the base on its own texts")
    options = arguments.parse_args()

    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            **training(options),
            # Cut the text into pieces of this many tokens.
            packing=True,
            packing_strategy="wrapped",
            max_length=max_length(options),
            model_init_kwargs={"dtype": "auto"},
        ),
        train_dataset=load_dataset("text", data_files=options.text, sample_by="document", split="train"),
        peft_config=config(options),
        callbacks=[RehearsalCallback(weight=options.rehearse)] if options.rehearse else None,
    )
    train(trainer, Path(options.text).read_text("utf-8")[:40], options.resume)


if __name__ == "__main__":
    main()
