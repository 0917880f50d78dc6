"""Two adapters of one base: switch between them, combine them, and write a folder that any server loads:

    python examples/merge_and_serve.py --adapters FIRST SECOND --output FOLDER
    vllm serve FOLDER/merged

Every step checks that its outputs have the same bits as those of PEFT's model. Without `--adapters` two small adapters
are made first, for the model in `examples/tiny_llava` or the model of `--model`.
"""

import argparse
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from peft_dowser import DowserConfig, Patch, hotswap, merge

TINY_LLAVA = Path(__file__).parent / "tiny_llava"
TEXTS = {"dawn": "The sun rises in the east.", "dusk": "The sun sets in the west."}


def load(name: str) -> PreTrainedModel:
    """A model of the class that its config names."""
    (architecture,) = AutoConfig.from_pretrained(name).architectures
    return getattr(transformers, architecture).from_pretrained(name, dtype="auto")


def make(name: str, text: str, folder: Path) -> str:
    """An adapter to try this with: a few steps on one sentence."""
    model = get_peft_model(load(name), DowserConfig(score="magnitude", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")
    for _ in range(5):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    print(f"{what}: {'bit-identical' if torch.equal(found, expected) else 'DIFFERENT'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Switch, combine and merge two adapters of one base.")
    parser.add_argument("--adapters", nargs=2, metavar=("FIRST", "SECOND"), help="folders or Hub ids of adapters")
    parser.add_argument("--model", default=str(TINY_LLAVA), help="base of the adapters that are made here")
    parser.add_argument("--output", required=True, type=Path, help="folder for the results")
    options = parser.parse_args()
    first, second = options.adapters or [make(options.model, t, options.output / n) for n, t in TEXTS.items()]
    base = PeftConfig.from_pretrained(first).base_model_name_or_path
    batch = AutoTokenizer.from_pretrained(base)("The sun", return_tensors="pt")

    @torch.no_grad()
    def logits(model: torch.nn.Module) -> Tensor:
        return model(**batch).logits

    # Both in one model of PEFT, switched by name.
    model = PeftModel.from_pretrained(load(base), first, adapter_name="first")
    model.load_adapter(second, "second")
    of_first = logits(model)
    model.set_adapter("second")
    of_second = logits(model)

    # One in the place of the other, which `torch.compile` need not compile again.
    single = PeftModel.from_pretrained(load(base), first)
    hotswap(single, second)
    compare("hotswap == adapter", logits(single), of_second)
    compare("merged == adapter", logits(single.merge_and_unload()), of_second)

    # In the weights of a plain model while they are needed, at the speed of the base.
    plain = load(base)
    for adapter, expected in ((first, of_first), (second, of_second)):
        with Patch(plain, adapter):
            compare("patch == adapter", logits(plain), expected)

    # The mean of both is an adapter too. A negative weight takes away what an adapter has learned.
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("mean")
    model.save_pretrained(options.output, selected_adapters=["mean"])

    # The whole model, written shard by shard; `peft-dowser merge` does the same from a shell.
    merge(options.output / "mean", options.output / "merged", base=base)
    compare("merged folder == adapter", logits(load(str(options.output / "merged"))), logits(model))


if __name__ == "__main__":
    main()
