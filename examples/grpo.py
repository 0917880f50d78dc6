"""Train a model on a reward of your own, with TRL's GRPO:

    python examples/grpo.py --prompts FILE --model Qwen/Qwen3-0.6B

The reward is a function of the texts that the model writes, here `without_e`: like the novel "Gadsby", they should
avoid the letter e. FILE has one prompt per line. Without `--model` it trains the small model in
`examples/tiny_llava`, which continues English text letter by letter. In the log, `reward` shows the progress. The
last tenth of the prompts is held out: a line at the end says how their reward rose, and what was forgotten.
"""

from pathlib import Path

from datasets import Dataset
from recipe import config, existing_file, forgetting, parse, parser, rows_of, start, train, training
from trl import GRPOConfig, GRPOTrainer

PROMPTS = ["Return the ", "If the ", "This function ", "A list of ", "The file ", "When an object ", "Note that "]


def without_e(completions: list[str], **columns: list) -> list[float]:
    """One reward per text: the share of its characters other than e, from 0 to 1."""
    return [1 - text.lower().count("e") / max(1, len(text)) for text in completions]


def main() -> None:
    arguments = parser("Train a model on a reward.", "my-grpo-adapter", steps=100, max_length=32)
    arguments.add_argument("--prompts", type=existing_file, help="text file, one prompt per line")
    options = parse(arguments, "model", "prompts")

    prompts = Path(options.prompts).read_text("utf-8").splitlines() if options.prompts else PROMPTS
    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=without_e,
        args=GRPOConfig(
            **training(options),
            num_generations=options.batch_size,  # texts for one prompt, which are compared with one another
            max_completion_length=options.max_length,
            model_init_kwargs={"dtype": "auto"},
        ),
        **rows_of(Dataset.from_dict({"prompt": prompts}), options),
        peft_config=config(options),
        callbacks=forgetting(options),
    )
    train(trainer, prompts[0], options.resume, score="reward", unit="per text")


if __name__ == "__main__":
    start(main)
