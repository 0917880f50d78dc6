"""A small saved adapter, the ways of damaging it, and what must hold after somebody has tried to load it."""

import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from models import config, edit_config, edit_tensors, set_values
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "robustness"))

from formats import CONFIG, FILE, Before, Small  # noqa: F401 - CONFIG is handed on

X = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))


def saved_small(folder: Path, **overrides) -> None:
    """An adapter of `Small`, with values as if it had been trained."""
    settings = {"score": "random", "update_ratio": 0.1, "target_modules": ["up", "down"], "task_type": None}
    model = get_peft_model(Small(), config(**(settings | overrides)))
    set_values(model)
    model.save_pretrained(folder)


def base_holds(before: Before) -> bool:
    """Whether the weights under all adapters, and the memory around them, have the same bits."""
    return before.margins_hold() and before.weights_hold(besides=[name for name in before.bits if ".dowser_" in name])


def edit_file(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a saved adapter."""
    edit_tensors(folder / FILE, change)


# Random damage


def flip_bytes(folder: Path, generator: random.Random) -> None:
    """Other bytes anywhere in the file."""
    content = bytearray((folder / FILE).read_bytes())
    for _ in range(generator.randint(1, 4)):
        content[generator.randrange(len(content))] = generator.randrange(256)
    (folder / FILE).write_bytes(content)


def cut(folder: Path, generator: random.Random) -> None:
    """A file that ends early, or goes on."""
    content = (folder / FILE).read_bytes()
    end = generator.randrange(len(content))
    (folder / FILE).write_bytes(content[:end] if generator.random() < 0.8 else content + content[:end])


def flip_header(folder: Path, generator: random.Random) -> None:
    """Other bytes in the header."""
    content = bytearray((folder / FILE).read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    for _ in range(generator.randint(1, 3)):
        content[generator.randrange(8 + length)] = generator.randrange(256)
    (folder / FILE).write_bytes(content)


def change_code(folder: Path, generator: random.Random) -> None:
    """An index code with other bits, all bits, or of another length."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = generator.choice([key for key in tensors if key.endswith("code")])
        code = tensors[key].clone()
        kind = generator.randrange(4)
        if kind == 0:
            for _ in range(generator.randint(1, 3)):
                code[generator.randrange(len(code))] ^= 1 << generator.randrange(8)
        elif kind == 1:
            code = torch.tensor(list(generator.randbytes(len(code))), dtype=torch.uint8)
        elif kind == 2:
            code = torch.tensor(list(generator.randbytes(generator.randrange(40))), dtype=torch.uint8)
        else:
            code = code.to(generator.choice([torch.int8, torch.int32, torch.float32, torch.bool]))
        tensors[key] = code

    edit_file(folder, change)


def change_values(folder: Path, generator: random.Random) -> None:
    """Values that are not finite, of another number, shape or dtype."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = generator.choice([key for key in tensors if key.endswith("weight")])
        values = tensors[key].clone()
        kind = generator.randrange(4)
        if kind == 0:
            values[generator.randrange(len(values))] = generator.choice([float("nan"), float("inf"), -float("inf")])
        elif kind == 1:
            values = torch.zeros(generator.randrange(60))
        elif kind == 2:
            values = values.view(generator.choice([(-1, 1), (1, -1), (-1, 2)]))
        else:
            values = values.to(generator.choice([torch.int32, torch.uint8, torch.float8_e4m3fn, torch.bool]))
        tensors[key] = values

    edit_file(folder, change)


def change_names(folder: Path, generator: random.Random) -> None:
    """Tensors that are missing, exchanged, or called otherwise."""

    def change(tensors: dict[str, Tensor]) -> None:
        first, second = generator.sample(sorted(tensors), 2)
        kind = generator.randrange(3)
        if kind == 0:
            del tensors[first]
        elif kind == 1:
            tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
        else:
            tensors[first.replace("down", generator.choice(["up", "head", "..", "down\0"])) + "x"] = tensors.pop(first)

    edit_file(folder, change)


def change_counts(folder: Path, generator: random.Random) -> None:
    """Counts that are not those of the file."""

    def change(found: dict) -> None:
        name = generator.choice(sorted(found["nnz_pattern"]))
        found["nnz_pattern"][name] = generator.choice([0, -1, 1, 23, 25, 10**12, 2**70, True, None, "24", 24.0, [24]])
        if generator.random() < 0.5:
            del found["manifest"]

    edit_config(folder, change)


def change_manifest(folder: Path, generator: random.Random) -> None:
    """A manifest that says something else."""

    def change(found: dict) -> None:
        modules = found["manifest"]["modules"]
        entry = modules[generator.choice(sorted(modules))]
        key = generator.choice(sorted(entry.keys() - {"base_sample", "values_sha256"}))
        entry[key] = generator.choice([None, -1, [], [2**40, 2**40], "00", {}, True, 1.5])

    edit_config(folder, change)


DAMAGES = [
    flip_bytes,
    cut,
    flip_header,
    change_code,
    change_values,
    change_names,
    change_counts,
    change_manifest,
]


def load(base: nn.Module, folder: Path) -> PeftModel:
    """Load as most users do."""
    return PeftModel.from_pretrained(base, folder)
