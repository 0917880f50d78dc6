"""Write the golden adapters of the current format that are not there yet: python tests/data/make_golden.py

Every later release must read them and give the logits beside them. Run once per format version, on a release.
"""

import subprocess
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_dowser
from peft_dowser import DowserConfig
from peft_dowser.delta.format import FORMAT

FOLDER = Path(__file__).parent
SHAPES = {"up": (48, 16), "down": (16, 48), "out": (24, 16)}
# The configs, by the names of the folders. Both have Elias-Fano in "down" and a mask of bits in "out".
GOLDEN = {
    f"format_{FORMAT}": {"ratio_pattern": {"out": 0.5}},
    f"format_{FORMAT}_input_channel": {"granularity": "input_channel", "channels": 3, "ratio_pattern": {"out": 0.5}},
}


class Base(nn.Module):
    """A model whose weights are written out in integers, so that no release of torch makes them other ones."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in SHAPES.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))
            self.get_submodule(name).weight.data = numbers(rows * columns).view(rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(self.up(x).relu()))


def numbers(count: int) -> Tensor:
    """Float32 numbers in [-0.5, 0.5) that are exact in bfloat16 too."""
    return ((torch.arange(count) * 2654435761 >> 8) % 128 - 64).float() / 128


def inputs() -> Tensor:
    return numbers(5 * 16).view(5, 16)


def main() -> None:
    """Write the adapters, unless the code that writes them is in no commit."""
    if subprocess.run(["git", "status", "--porcelain"], cwd=FOLDER, capture_output=True, text=True, check=True).stdout:
        sys.exit("The tree has uncommitted changes: commit them first, so that a commit can be named that wrote them.")
    missing = [name for name in GOLDEN if not (FOLDER / name).exists()]
    if not missing:
        sys.exit(f"'{FOLDER}' has all of them: a golden adapter is never written anew.")
    for name in missing:
        write(FOLDER / name, DowserConfig(score="magnitude", target_modules=list(SHAPES), **GOLDEN[name]))


def write(folder: Path, config: DowserConfig) -> None:
    """Write an adapter with values as if it had been trained, and what it gives."""
    model = get_peft_model(Base(), config).eval()
    for layer in model.modules():
        if isinstance(layer, peft_dowser.DowserLayer):
            values = layer.values("default")
            values.data = numbers(values.numel()).view(values.shape) / 8
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    with torch.no_grad():
        save_file({"logits": model(inputs())}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
