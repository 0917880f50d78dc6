"""Learn one task after another, and see what is left of the earlier tasks:

    python examples/continual.py
    python examples/continual.py --model llava-hf/llava-1.5-7b-hf

The model is probed once. Then it learns three tasks with images, first with an adapter per task, then with one adapter
for all tasks in turn: a minute on a CPU. A table has a row per stage and a column per task, in percent of
right answers; `read`, `rev` and `add` are what the small LLaVA in `examples/tiny_llava`, the default, could do before.
A task that has its own adapter is tested with it; the old tasks are tested with the newest adapter.
"""

import argparse
import sys
import tempfile

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from recipe import TINY_LLAVA, Defaults, add_dowser, add_model, add_training, config, parse, start
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from peft_dowser import probe
from peft_dowser.evaluation import metrics

sys.path.insert(0, TINY_LLAVA)
from chat import collate_chat
from tasks import DOWNSTREAM, UPSTREAM, accuracy, trl_records

OLD = {name: UPSTREAM[name] for name in ("read", "rev", "add")}
NEW = DOWNSTREAM
ALL = OLD | NEW


def learn(model: PeftModel, task: str, options: argparse.Namespace) -> None:
    """Train the active adapter on one task."""
    arguments = SFTConfig(
        output_dir=options.folder,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=options.batch_size,
        max_length=None,
        gradient_checkpointing=False,  # faster; a large model wants True
        bf16=torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),  # a warning without
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
    )
    examples = NEW[task].sample(options.batch_size * options.steps, seed=0, split="train")
    data = Dataset.from_list(trl_records(examples))
    SFTTrainer(model, arguments, train_dataset=data, processing_class=options.processor).train()


def ask(model: PeftModel, options: argparse.Namespace) -> dict[str, float]:
    """Percent of right answers; a task that has its own adapter is tested with it."""
    active, found = model.active_adapter, {}
    for name, task in ALL.items():
        model.set_adapter(name if name in model.peft_config else active)
        examples = task.sample(options.examples, seed=0, split="test")
        found[name] = accuracy(model, options.processor, examples, batch_size=32, make_batch=collate_chat)
    model.set_adapter(active)
    return found


def show(title: str, stages: list[dict[str, float]]) -> None:
    print(f"\n{title:<20}" + "".join(f"{task:>7}" for task in ALL))
    for stage, row in zip(["before", *NEW], stages, strict=True):
        print(f"{stage:<20}" + "".join(f"{row[task]:7.1f}" for task in ALL))
    learned = [[row[task] for task in NEW] for row in stages[1:]]
    print(f"backward transfer: {metrics.backward_transfer(learned):+.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Learn one task after another.", formatter_class=Defaults)
    add_model(parser)
    parser.add_argument("--examples", type=int, default=100, help="for the test of a task")
    add_training(parser, steps=80, batch_size=16, rate=1e-3)
    add_dowser(parser, update_ratio=0.5, granularity="weight")
    options = parse(parser, "model")
    options.processor = AutoProcessor.from_pretrained(options.model)

    base = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    chosen = config(options)
    with tempfile.TemporaryDirectory() as options.folder:
        if chosen.statistics is None:
            chosen.statistics = f"{options.folder}/statistics.safetensors"
            probe(base, chosen).save(chosen.statistics)
        for title, adapters in (("an adapter per task", list(NEW)), ("one adapter", ["all"] * len(NEW))):
            model = get_peft_model(base, chosen, adapter_name=adapters[0])
            stages = [ask(model, options)]
            for task, adapter in zip(NEW, adapters, strict=True):
                if adapter not in model.peft_config:
                    model.add_adapter(adapter, chosen)
                model.set_adapter(adapter)
                learn(model, task, options)
                stages.append(ask(model, options))
            show(title, stages)
            base = model.unload()


if __name__ == "__main__":
    start(main)
