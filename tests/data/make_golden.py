"""Write the golden adapter of the current format: python tests/data/make_golden.py

Every later release must read it and give the logits beside it. Run once per format version, on a release.
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
    """Write the adapter, unless the code that writes it is in no commit."""
    if subprocess.run(["git", "status", "--porcelain"], cwd=FOLDER, capture_output=True, text=True, check=True).stdout:
        sys.exit("The tree has uncommitted changes: commit them first, so that a commit can be named that wrote this.")
    folder = FOLDER / f"format_{FORMAT}"
    if folder.exists():
        sys.exit(f"'{folder}' exists: a golden adapter is never written anew.")
    # Elias-Fano in "up" and "down", a mask of bits in "out".
    config = DowserConfig(score="magnitude", target_modules=list(SHAPES), ratio_pattern={"out": 0.5})
    model = get_peft_model(Base(), config).eval()
    for layer in model.modules():
        if isinstance(layer, peft_dowser.DowserLayer):
            values = layer.values("default")
            values.data = numbers(values.numel()) / 8
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    with torch.no_grad():
        save_file({"logits": model(inputs())}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
