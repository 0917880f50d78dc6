# %% [markdown]
# # Quickstart: fine-tune an image-text model and see what it forgets
#
# Probe the model without data, train the half of its weights that matters least, save the difference, load it again,
# merge it - and compare with full fine-tuning on the same batches. About a minute on two CPU cores:
#
#     python examples/quickstart.py
#
# The same file opens as a notebook in VS Code, and in Jupyter with Jupytext.
#
# The default is the small LLaVA in `examples/tiny_llava`, which is really pretrained: it reads digits, adds numbers and
# reverses words. `--model` takes any other LLaVA-type model with a chat template from the Hub, which learns the same
# image task; its upstream tasks are unknown here, so only the new task is scored, by the same teacher forcing.

# %%
import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from recipe import TINY_LLAVA, Defaults, add_model, show_log, start
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from trl import SFTConfig, SFTTrainer

from peft_dowser import DowserConfig, DowserLayer

sys.path.insert(0, TINY_LLAVA)
from chat import collate_chat
from tasks import DOWNSTREAM, accuracy, trl_records, upstream_accuracy

TASK = DOWNSTREAM["style"]  # a pale digit, and the invented word that names it


# %% The two ways of fine-tuning share everything but what trains.
@dataclass
class Options:
    """What the command line decides."""

    model: str
    update_ratio: float
    steps: int
    learning_rate: float
    seed: int
    output: Path


def load(options: Options) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(options.model)


def fine_tune(
    model: PreTrainedModel, processor: ProcessorMixin, options: Options, peft_config: DowserConfig | None
) -> torch.nn.Module:
    """Train on the task with TRL; with a `peft_config` only what that chooses."""
    batch = 32
    records = trl_records(TASK.sample(batch * options.steps, seed=options.seed, split="train"))
    arguments = SFTConfig(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.0,
        max_length=None,
        completion_only_loss=True,
        gradient_checkpointing=None,
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),  # a warning without
        save_strategy="no",
        report_to=[],
        seed=options.seed,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.model


def only_decoder_trains(model: PreTrainedModel) -> PreTrainedModel:
    """Full fine-tuning as in the paper: the linears of the language decoder, everything else frozen."""
    model.requires_grad_(False)
    decoder = model.get_decoder().layers
    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.requires_grad_(True)
    return model


# %% What the table shows.
@dataclass
class Row:
    """One line of the table; accuracies in percent, sizes in bytes."""

    name: str
    upstream: float | None
    downstream: float
    trained: int
    size: int

    def __str__(self) -> str:
        upstream = "     -" if self.upstream is None else f"{self.upstream:6.1f}"
        trained, size = f"{self.trained:,}", f"{self.size:,}"
        return f"{self.name:<18} {upstream} {self.downstream:10.1f} {trained:>15} {size:>15}"


HEADER = f"{'':<18} {'kept %':>6} {'learned %':>10} {'trained weights':>15} {'bytes on disk':>15}"


def measure(name: str, model: torch.nn.Module, processor: ProcessorMixin, options: Options, folder: Path) -> Row:
    examples = TASK.sample(200, seed=0, split="test")
    is_tiny = options.model == TINY_LLAVA
    return Row(
        name=name,
        upstream=upstream_accuracy(model, processor)["mean"] if is_tiny else None,
        downstream=accuracy(model, processor, examples, batch_size=16, make_batch=collate_chat),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad) if name != "before" else 0,
        size=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


@torch.no_grad()
def logits(model: torch.nn.Module, processor: ProcessorMixin) -> torch.Tensor:
    batch = collate_chat(TASK.sample(16, seed=1, split="test"), processor)
    del batch["labels"]
    device = next(model.parameters()).device
    return model.eval()(**{key: value.to(device) for key, value in batch.items()}).logits


# %% The run.
def run(options: Options) -> None:
    processor = AutoProcessor.from_pretrained(options.model)
    base_folder, full_folder, adapter_folder = (options.output / name for name in ("base", "full", "adapter"))

    base = load(options)
    base.save_pretrained(base_folder)
    rows = [measure("before", base, processor, options, base_folder)]

    full = fine_tune(only_decoder_trains(load(options)), processor, options, peft_config=None)
    full.save_pretrained(full_folder)
    rows.append(measure("full fine-tuning", full, processor, options, full_folder))

    config = DowserConfig(update_ratio=options.update_ratio, probe_length=24, seed=options.seed, task_type="CAUSAL_LM")
    adapted = fine_tune(load(options), processor, options, peft_config=config)
    adapted.save_pretrained(adapter_folder)
    rows.append(measure("Dowser", adapted, processor, options, adapter_folder))

    reloaded = PeftModel.from_pretrained(load(options).to(adapted.device), adapter_folder)
    expected = logits(reloaded, processor)
    same_as_trained = torch.equal(expected, logits(adapted, processor))
    merged = reloaded.merge_and_unload()
    same_as_merged = torch.equal(expected, logits(merged, processor))
    if any(isinstance(module, DowserLayer) for module in merged.modules()):
        raise RuntimeError("the merged model still has adapter layers")

    print("\n" + HEADER)
    print(*rows, sep="\n")
    print(f"\nreloaded == trained: {'bit-identical' if same_as_trained else 'DIFFERENT'}")
    print(f"merged == adapter: {'bit-identical' if same_as_merged else 'DIFFERENT'}")
    if not (same_as_trained and same_as_merged):
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare Dowser with full fine-tuning.", formatter_class=Defaults)
    add_model(parser)
    parser.add_argument("--update-ratio", type=float, default=0.5, help="fraction of each matrix that trains")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each training")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of AdamW's rate")
    parser.add_argument("--seed", type=int, default=0, help="of the data, the prompts and the training")
    parser.add_argument("--output", type=Path, help="folder to keep the saved models in (default: a temporary one)")
    given = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line
    show_log()
    with tempfile.TemporaryDirectory() as temporary:
        run(Options(**vars(given) | {"output": given.output or Path(temporary)}))


if __name__ == "__main__":
    start(main)
