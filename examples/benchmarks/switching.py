"""Switching a loaded model from one adapter to another: seconds, and the share of weights that do not come back.

A Llama of about 100 million parameters, all linears of its layers, rho = 0.1 (LoRA: r = 16, and as many parameters).
PEFT's methods hold both adapters, and a switch unmerges one and merges the other; a `Patch` does the same on the plain
model. `hotswap` reads the other adapter from disk and leaves it unmerged. "load" reads the base again, and merges.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import device, in_fresh_process, llama, seconds
from peers import adapted
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from peft_dowser import Patch, hotswap

# How a benchmark calls a way of switching, and the method whose adapters it switches.
WAYS = {
    "load": "dowser",
    "lora": "lora",
    "lora r=16": "lora r=16",
    "shira": "shira",
    "super-tuning": "super-tuning",
    "dowser, merge": "dowser",
    "dowser, hotswap": "dowser",
    "dowser, Patch": "dowser",
}


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        for way in WAYS:
            found = [in_fresh_process(measure_switch, way, 0.1, 768, 13, dtype) for _ in range(rounds)]
            rows.append(
                {"dtype": dtype, "way": way} | {key: statistics.median(one[key] for one in found) for key in found[0]}
            )
        loading = next(row["seconds"] for row in rows if (row["dtype"], row["way"]) == (dtype, "load"))
        for row in rows:
            row.setdefault("faster_than_loading", loading / row["seconds"])
    return rows


def measure_switch(way: str, update_ratio: float, hidden: int, layers: int, dtype: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        llama(hidden, layers, dtype, vocabulary=10_000).save_pretrained(folder / "base")
        adapters = [_saved(WAYS[way], update_ratio, folder, seed) for seed in (0, 1)]
        base = _base(folder)
        before = _weights(base)
        switch, restore = _switcher(way, folder, base, adapters)
        found = seconds(switch, 8)
        after = _weights(restore())
    changed = sum(int((now != then).sum()) for now, then in zip(after, before, strict=True))
    return {"seconds": found, "share_of_weights_changed": changed / sum(weight.numel() for weight in before)}


def _switcher(
    way: str, folder: Path, base: nn.Module, adapters: list[Path]
) -> tuple[Callable[[], None], Callable[[], nn.Module]]:
    """What switches to the next adapter, and what gives the base back."""
    turns = itertools.cycle(adapters)
    if way == "load":
        return lambda: PeftModel.from_pretrained(_base(folder), next(turns)).merge_and_unload(), lambda: _base(folder)
    if way == "dowser, Patch":
        return _patches(base, adapters)
    model = PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    if way == "dowser, hotswap":
        return lambda: hotswap(model, next(turns), "0"), model.unload
    model.load_adapter(adapters[1], adapter_name="1")
    names = itertools.cycle(["1", "0"])

    def switch() -> None:
        model.unmerge_adapter()
        model.merge_adapter([next(names)])

    def restore() -> nn.Module:
        model.unmerge_adapter()
        return model.unload()

    model.merge_adapter(["0"])
    return switch, restore


def _patches(base: nn.Module, adapters: list[Path]) -> tuple[Callable[[], None], Callable[[], nn.Module]]:
    patches = [Patch(base, adapter) for adapter in adapters]
    patches[0].apply()

    def switch() -> None:
        patches[0].remove()
        patches.reverse()
        patches[0].apply()

    def restore() -> nn.Module:
        patches[0].remove()
        return base

    return switch, restore


def _saved(method: str, update_ratio: float, folder: Path, seed: int) -> Path:
    """An adapter whose values are as large as a short training makes them."""
    model = adapted(method, update_ratio, _base(folder))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=1e-3)
    model.save_pretrained(folder / str(seed))
    return folder / str(seed)


def _base(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto", device_map=device())


def _weights(model: nn.Module) -> list[torch.Tensor]:
    """Copies of the adapted weights."""
    return [module.weight.detach().clone() for name, module in model.named_modules() if "proj" in name.split(".")[-1]]
