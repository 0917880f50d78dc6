"""Which ratio and which learning rate? Try some on your text, with one probe:

    python examples/sweep.py --text FILE --model Qwen/Qwen3-0.6B --output sweep

Each row of the table is a training from the same start. "learned" is the fall of the loss on the last tenth of the
text, which is not trained on, "forgot" the rise of the loss on texts that the base wrote itself, both in nats per
token. Of the rows that learned at least 90 % of the most, the one that forgot least is the best; the command that
trains so is printed. The output folder gets the probe.
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import get_peft_model
from recipe import EXAMPLES, LEARNING_RATE, TINY_LLAVA, add_ranking, config, load, max_length, needs_probe, training
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, ForgettingCallback, probe


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare ratios and learning rates on a text file.")
    parser.add_argument("--text", default=str(EXAMPLES.parent / "README.md"), help="text file, UTF-8")
    parser.add_argument("--model", default=TINY_LLAVA, help="folder or Hub id of the base model")
    parser.add_argument("--output", required=True, help="folder for the probe")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.03, 0.1], help="update ratios")
    rates = [LEARNING_RATE, 1e-3, 3e-3]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="learning rates")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a piece of the text")
    add_ranking(parser)
    return parser.parse_args()


def measure(model: Any, options: argparse.Namespace) -> tuple[float, float]:
    """Train an adapter; returns what was learned and what was forgotten."""
    text = Path(options.text).read_text("utf-8")
    cut = len(text) * 9 // 10
    form = {"packing": True, "packing_strategy": "wrapped", "max_length": max_length(options)}
    trainer = SFTTrainer(
        model,
        SFTConfig(**training(options) | form | {"save_strategy": "no", "logging_strategy": "no"}),
        train_dataset=Dataset.from_dict({"text": [text[:cut]]}),
        eval_dataset=Dataset.from_dict({"text": [text[cut:]]}),
        callbacks=[ForgettingCallback(config=DowserConfig(num_probes=16, seed=1))],  # other texts than the probe's
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    return before - after["eval_loss"], after["eval_forgetting"]


def main() -> None:
    options = parse()
    options.channels = None
    base, rows = load(options.model), []
    for ratio, rate in product(options.ratios, options.rates):
        options.update_ratio, options.learning_rate = ratio, rate
        chosen = config(options)
        if needs_probe(chosen):
            options.statistics = chosen.statistics = f"{options.output}/statistics.safetensors"
            Path(options.output).mkdir(parents=True, exist_ok=True)
            probe(base, chosen).save(chosen.statistics)
        model = get_peft_model(base, chosen)
        rows.append((ratio, rate, *measure(model, options)))
        base = model.unload()

    most = max(learned for _, _, learned, _ in rows)
    best = min((row for row in rows if row[2] >= 0.9 * most), key=lambda row: row[3], default=rows[0])
    print(f"\n{'ratio':>6} {'rate':>8} {'learned':>8} {'forgot':>8}")
    for row in rows:
        print(f"{row[0]:>6g} {row[1]:>8g} {row[2]:>8.3f} {row[3]:>8.3f}{'  <- best' if row == best else ''}")
    probed = f" --statistics {options.statistics}" if options.statistics else ""
    print(
        f"\npython {EXAMPLES / 'text_sft.py'} --text {options.text} --model {options.model} --output my-adapter "
        f"--granularity {options.granularity} --score {chosen.score}{probed} --update-ratio {best[0]:g} "
        f"--learning-rate {best[1]:g}"
    )


if __name__ == "__main__":
    main()
