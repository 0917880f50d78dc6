"""Fine-tune a language model on a text file of your own:

    python examples/text_sft.py --text FILE --model Qwen/Qwen3-0.6B

Without `--model` it trains the small model in `examples/tiny_llava`, without `--text` on the project's README: less
than a minute on a CPU. At the end the model continues the beginning of the text, as it did before and as it does now,
and a line says what it learned of the last tenth of the text, which is held out, and what it forgot.
"""

from pathlib import Path

from recipe import add_text, config, forgetting, packed, parse, parser, start, text_of, train, training
from trl import SFTConfig, SFTTrainer

from peft_dowser import RehearsalCallback


def main() -> None:
    arguments = parser("Fine-tune a language model on a text file.")
    add_text(arguments)
    arguments.add_argument("--rehearse", type=float, default=0.0, help="weight of the KL to the base on its own texts")
    options = parse(arguments, "model", "text")

    rehearsal = [RehearsalCallback(weight=options.rehearse)] if options.rehearse else []
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(**training(options), **packed(options), model_init_kwargs={"dtype": "auto"}),
        **text_of(options),
        peft_config=config(options),
        callbacks=[*forgetting(options), *rehearsal],
    )
    train(trainer, Path(options.text).read_text("utf-8")[:40], options.resume)


if __name__ == "__main__":
    start(main)
