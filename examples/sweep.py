"""Which ratio and which learning rate? Try some on your text, with one probe:

    python examples/sweep.py --text FILE --model Qwen/Qwen3-0.6B

Each row of the table is a training from the same start. "learned" is the fall of the loss on the last tenth of the
text, which is not trained on, "forgot" the rise of the loss on texts that the base wrote itself, both in nats per
token. Of the rows that learned at least 90 % of the most, the one that forgot least is the best; the command that
repeats its training is printed. The output folder gets the probe.
"""

import argparse
import shlex
from itertools import product
from pathlib import Path
from typing import Any

from peft import get_peft_model
from recipe import (
    EXAMPLES,
    LEARNING_RATE,
    SCALE,
    Defaults,
    add_model,
    add_ranking,
    add_text,
    config,
    fit,
    forgetting,
    load,
    needs_probe,
    packed,
    parse,
    start,
    text_of,
    training,
    values,
)
from trl import SFTConfig, SFTTrainer

from peft_dowser import probe

ENOUGH = 0.9  # of the most that a row has learned


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compare ratios and learning rates on a text file.", formatter_class=Defaults
    )
    add_text(parser)
    add_model(parser)
    parser.add_argument("--output", default="my-sweep", help="folder for the probe")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.03, 0.1], help="update ratios")
    rates = [LEARNING_RATE, 1e-3, 3e-3]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="learning rates")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=int, default=8, help="pieces of the text per step and device")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a piece of the text")
    add_ranking(parser)
    parser.set_defaults(channels=None, measure=True)
    return parse(parser, "model", "text")


def measure(model: Any, options: argparse.Namespace) -> tuple[float, float]:
    """Train an adapter; returns what was learned and what was forgotten."""
    quiet = {"save_strategy": "no", "logging_strategy": "no"}
    trainer = SFTTrainer(
        model,
        SFTConfig(**training(options) | packed(options) | quiet),
        **text_of(options),
        callbacks=forgetting(options),
    )
    fit(trainer)
    history = trainer.state.log_history
    losses = values(history, "eval_loss")
    return losses[0] - losses[-1], values(history, "forgetting")[-1]


def further(name: str, tried: list[float], best: float) -> str:
    """What to try next, if the best of several values is the least or the largest of them."""
    factors = [factor for edge, factor in ((min(tried), 1 / 3), (max(tried), 3)) if best == edge]
    if len(factors) != 1:  # in the middle, or the only one
        return ""
    steps = [best, best * factors[0], best * factors[0] ** 2]
    more = [f"{value:.2g}" for value in sorted(steps) if name == "rates" or value <= 1]
    if len(more) == 1:  # a ratio of 1 is all there is
        return ""
    edge = "largest" if factors[0] > 1 else "least"
    return f"The best of the {name}, {best:g}, is the {edge} that was tried. Next: --{name} {' '.join(more)}"


def command(options: argparse.Namespace, score: str | None) -> str:
    """The command that repeats a training."""
    given = {
        "text": options.text,
        "model": options.model,
        "output": "my-adapter",
        "granularity": options.granularity,
        "score": score,
        "statistics": options.statistics,
        "update-ratio": f"{options.update_ratio:g}",
        "learning-rate": f"{options.learning_rate:g}",
        "steps": options.steps,
        "batch-size": options.batch_size,
        "max-length": options.max_length,
    }
    named = [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]
    return shlex.join(["python", str(EXAMPLES / "text_sft.py"), *named])


def main() -> None:
    options = read_options()
    base, rows = load(options.model), []
    for ratio, rate in product(options.ratios, options.rates):
        options.update_ratio, options.learning_rate = ratio, rate
        print(f"\nratio {ratio:g}, rate {rate:g}")
        chosen = config(options)
        if needs_probe(chosen):
            options.statistics = chosen.statistics = f"{options.output}/statistics.safetensors"
            Path(options.output).mkdir(parents=True, exist_ok=True)
            probe(base, chosen).save(chosen.statistics)
        model = get_peft_model(base, chosen)
        rows.append((ratio, rate, *measure(model, options)))
        base = model.unload()

    most = max(learned for _, _, learned, _ in rows)
    best = min((row for row in rows if row[2] >= ENOUGH * most > 0), key=lambda row: row[3], default=None)
    print(f"\n{'ratio':>6} {'rate':>8} {'learned':>8} {'forgot':>8}")
    for row in rows:
        print(f"{row[0]:>6g} {row[1]:>8g} {row[2]:>8.3f} {row[3]:>8.3f}{'  <- best' if row == best else ''}")
    print("\nlearned: fall of the loss on the last tenth of the text, which was held out")
    print(f"forgot:  rise of the loss on texts that the base wrote; both in nats per token ({SCALE})")
    if best is None:
        print("No row has learned anything: try more --steps, or larger --rates.")
        return
    print(f"best:    of the rows that learned at least {ENOUGH:.0%} of the most, the one that forgot least")
    for name, tried, found in (("ratios", options.ratios, best[0]), ("rates", options.rates, best[1])):
        if advice := further(name, tried, found):
            print(advice)
    options.update_ratio, options.learning_rate = best[:2]
    print(f"\nIts training again, with the adapter saved:\n{command(options, chosen.score)}")


if __name__ == "__main__":
    start(main)
