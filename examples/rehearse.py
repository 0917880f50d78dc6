"""What a KL term on the base's own texts does to what is learned and what is forgotten, and what it costs:

    python examples/rehearse.py --text FILE --model Qwen/Qwen3-0.6B
    python examples/rehearse.py --images  # image-text: noise images begin half of the texts

Each row of the table is one training from the same start: an adapter (Dowser or LoRA) without rehearsal, and with one
every 1, 2, 4 or 8 steps at the same total weight. "learned" is the fall of the loss on text that was held out, "forgot"
the rise of the loss on other texts that the base wrote, both in nats per token; "step" is the time of a training step
compared with the first row. Without `--model` it is the small one in `examples/tiny_llava`.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from recipe import SCALE, Defaults, add_model, add_text, fit, parse, start, values
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_dowser import DowserConfig, ForgettingCallback, RehearsalCallback


class Timer(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def pieces(path: str, tokenizer: Any, length: int) -> list[list[int]]:
    """The tokens of a text file, in pieces of equal length."""
    ids = tokenizer(Path(path).read_text(), verbose=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, len(ids) - length, length)]


def run(model: Any, adapter: PeftConfig, train: list, held_out: list, rehearsal: dict | None, options: Any) -> dict:
    """Train once; returns a row of the table."""
    torch.manual_seed(options.seed)
    model = get_peft_model(model, adapter)
    other = DowserConfig(num_probes=16, probe_length=options.length, seed=options.seed + 1)
    # The timer is first and last, so that a step has its rehearsal and not what is measured.
    timer, forgetting = Timer(), ForgettingCallback(config=other)
    images = {"probe_images": 0.5} if options.images else {}
    own = DowserConfig(num_probes=32, probe_length=options.length, seed=options.seed, **images)
    callbacks = [timer, *([RehearsalCallback(config=own, **rehearsal)] if rehearsal else []), forgetting]
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=5,
                save_strategy="no",
                eval_strategy="steps",  # before and after
                eval_steps=options.steps,
                eval_on_start=True,
                logging_steps=10,
                report_to="none",
                disable_tqdm=True,
                seed=options.seed,
                use_cpu=not torch.cuda.is_available(),
                dataloader_pin_memory=torch.cuda.is_available(),  # a warning without
            ),
            train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in train]),
            eval_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in held_out]),
            callbacks=callbacks,
        )
        fit(trainer)
    losses, forgot = (values(trainer.state.log_history, name) for name in ("eval_loss", "forgetting"))
    seconds = statistics.mean(timer.seconds[2:])
    return {"learned": losses[0] - losses[-1], "forgot": forgot[-1], "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Measure rehearsal: learned, forgotten, seconds.", formatter_class=Defaults
    )
    add_text(parser)
    add_model(parser)
    parser.add_argument("--images", action="store_true", help="an image-text model: begin half of the texts with noise")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each training")
    parser.add_argument("--batch-size", type=int, default=4, help="texts per step and device")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's")
    parser.add_argument("--weight", type=float, default=1.0, help="weight of the KL at one rehearsal per step")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 2, 4, 8], help="steps between rehearsals")
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the texts")
    parser.add_argument("--output", help="file for the rows, as JSON")
    options = parse(parser, "model", "text")

    sees = hasattr(AutoConfig.from_pretrained(options.model), "vision_config")
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    found = pieces(options.text, AutoTokenizer.from_pretrained(options.model), options.length)
    held_out, train = found[::5], [piece for number, piece in enumerate(found) if number % 5]
    rows: list[dict[str, Any]] = []
    print(f"{'adapter':<8} {'every':>6} {'weight':>7} {'learned':>8} {'forgot':>8} {'step':>6}")
    for name, adapter in (
        ("dowser", lambda: DowserConfig(score="magnitude", seed=options.seed)),
        ("lora", lambda: LoraConfig(r=16, target_modules="all-linear")),
    ):
        for every in [None, *options.every]:
            rehearsal = None if every is None else {"every_n_steps": every, "weight": options.weight * every}
            model = kind.from_pretrained(options.model, dtype="auto")
            row = run(model, adapter(), train, held_out, rehearsal, options)
            first = next((other["seconds"] for other in rows if other["adapter"] == name), row["seconds"])
            rows.append({"adapter": name, "every": every, "weight": (rehearsal or {}).get("weight", 0.0)} | row)
            print(
                f"{name:<8} {every or '-':>6} {rows[-1]['weight']:>7g} {row['learned']:>8.3f} {row['forgot']:>8.3f} "
                f"{row['seconds'] / first:>6.2f}"
            )
    print(f"learned and forgot: in nats per token ({SCALE}); step: time, compared with the first row of an adapter")
    if options.output:
        machine = {"machine": platform.processor() or platform.machine(), "date": str(date.today())}
        Path(options.output).write_text(json.dumps(machine | {"options": vars(options), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    start(main)
