"""Two adapters of one base: switch between them, combine them, and write folders that any server loads:

    python examples/merge_and_serve.py --adapters FIRST SECOND
    vllm serve merged-adapters/merged

Every step compares its outputs with those of PEFT's model: they have the same bits, and those of input channels, which
are also written as LoRA adapters for servers of LoRA, agree up to the rounding of one addition. Without `--adapters`
two small adapters are made first, for the model in `examples/tiny_llava` or the model of `--model`.
"""

import argparse
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from recipe import Defaults, add_model, folder_or_id, load, parse, refuse_used, start
from torch import Tensor
from transformers import AutoTokenizer

from peft_dowser import DowserConfig, Patch, export_lora, hotswap, merge

TEXTS = {"dawn": "The sun rises in the east.", "dusk": "The sun sets in the west."}


def adapter_name(name: str) -> str:
    """The type of an option that names an adapter."""
    return folder_or_id(name, "adapter_config.json")


def make(name: str, text: str, folder: Path, granularity: str) -> str:
    """An adapter to try this with: a few steps on one sentence."""
    config = DowserConfig(granularity=granularity, score="magnitude", task_type="CAUSAL_LM")
    model = get_peft_model(load(name), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = AutoTokenizer.from_pretrained(name)(text, return_tensors="pt")
    for _ in range(5):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def compare(what: str, found: Tensor, expected: Tensor) -> None:
    distance = float((found - expected).abs().max())
    rounded = distance < torch.finfo(expected.dtype).eps ** 0.5 * float(expected.abs().max())
    print(f"{what}: {'bit-identical' if distance == 0 else 'equal up to rounding' if rounded else 'DIFFERENT'}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Switch, combine and merge two adapters of one base.", formatter_class=Defaults
    )
    parser.add_argument(
        "--adapters", type=adapter_name, nargs=2, metavar=("FIRST", "SECOND"), help="folders or Hub ids of adapters"
    )
    add_model(parser)
    parser.add_argument(
        "--granularity", choices=["weight", "input_channel"], default="input_channel", help="of adapters made here"
    )
    parser.add_argument("--output", default=Path("merged-adapters"), type=Path, help="folder for the results")
    options = parse(parser, "adapters")
    for part in ("merged", "lora"):
        refuse_used(parser, options.output / part)
    first, second = options.adapters or [
        make(options.model, text, options.output / name, options.granularity) for name, text in TEXTS.items()
    ]
    config = PeftConfig.from_pretrained(first)
    base = config.base_model_name_or_path
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
    print(
        f"\n{options.output}/merged is a plain model:\n"
        f"    vllm serve {options.output}/merged\n"
        f"    python convert_hf_to_gguf.py {options.output}/merged --outtype q8_0 --outfile merged.gguf  # llama.cpp's"
    )

    # Input channels are a LoRA adapter whose A picks the channels, so a server of LoRA can switch between many.
    if config.granularity == "input_channel":
        lora = options.output / "lora"
        rank = max(export_lora(first, lora).values())
        limit = max(8, 1 << (rank - 1).bit_length())  # vLLM takes powers of 2
        compare("\nexported LoRA == adapter", logits(PeftModel.from_pretrained(load(base), lora)), of_first)
        print(
            f"    vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules first={lora}\n"
            f"    python convert_lora_to_gguf.py {lora} --base {base} --outfile first.gguf  # llama.cpp's"
        )


if __name__ == "__main__":
    start(main)
