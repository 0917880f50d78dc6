"""How SHiRA, Super-Tuning and Dowser save an adapter of a small model, and which of their files are well-formed.

Also how a model was, to tell whether a damaged file has changed it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, ShiraConfig, SupertuningConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_dowser import DowserConfig

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TARGETS = ["up", "down"]
# Entries before and after every weight that belong to nobody.
MARGIN = 64
WIDTHS = {"up": 12, "down": 20}
NUMEL = 240
# How the methods call what they put into a module.
PARTS = ("dowser_", "shira_", "supertuning_")


class Small(nn.Module):
    """Two linear layers that are adapted and one that is not; their weights lie in the middle of larger memory."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 4)
        generator = torch.Generator().manual_seed(0)
        self.memory = []
        for layer in (self.up, self.down, self.head):
            memory = torch.randn(layer.weight.numel() + 2 * MARGIN, generator=generator)
            self.memory.append(memory)
            layer.weight = nn.Parameter(memory[MARGIN:-MARGIN].view(layer.weight.shape))
            layer.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


class Worded(Small):
    """`Small` after embeddings, and a layer that nothing ever trains."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fixed = nn.Embedding(10, 12), nn.Linear(12, 12, bias=False)
        generator = torch.Generator().manual_seed(2)
        for layer in (self.words, self.fixed):
            memory = torch.randn(layer.weight.numel() + 2 * MARGIN, generator=generator)
            self.memory.append(memory)
            layer.weight = nn.Parameter(memory[MARGIN:-MARGIN].view(layer.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.fixed(x) + self.words(torch.arange(len(x))))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> None:
        return None


class Before:
    """A model, and whether it is what it was."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.modules = [(name, type(module)) for name, module in base.named_modules()]
        self.trainable = [parameter.requires_grad for parameter in base.parameters()]
        self.bits = _tensors(base)
        self.margins = self._margins()

    def margins_hold(self) -> bool:
        return all(torch.equal(now, then) for now, then in zip(self._margins(), self.margins, strict=True))

    def weights_hold(self, besides: Sequence[str] = ()) -> bool:
        now = _tensors(self.base)
        return all(name in now and torch.equal(now[name], self.bits[name]) for name in self.bits.keys() - set(besides))

    def holds(self) -> bool:
        modules = [(name, type(module)) for name, module in self.base.named_modules()]
        trainable = [parameter.requires_grad for parameter in self.base.parameters()]
        return modules == self.modules and trainable == self.trainable and self.weights_hold() and self.margins_hold()

    def _margins(self) -> list[Tensor]:
        return [
            part.clone() for memory in getattr(self.base, "memory", []) for part in (memory[:MARGIN], memory[-MARGIN:])
        ]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".base_layer", ""): tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Format:
    """How a method saves its adapters.

    Attributes:
        config: makes a config of it, for about a tenth of the weights.
        values: end of the names of its values.
        index: end of the names of its positions.
        write: the tensor of positions of a weight of so many columns, also of impossible ones.
        read: its inverse; None where a tensor holds no positions. Whole numbers of any dtype are positions.
        ordered: whether positions must increase.
        unordered: whether positions are a set, whose tensor cannot say in which order they come.
        channels: whether positions are numbers of input channels.
        digests: whether the config holds digests of the positions, and a damaged file keeps them.
        base: makes the base.
        whole: whether the adapter has whole tensors besides its deltas, and digests are made anew for a damaged file.
        low_cpu_mem_usage: how it is loaded.
    """

    config: Callable[[], PeftConfig]
    values: str
    index: str
    write: Callable[[list[int], int], Tensor]
    read: Callable[[Tensor, int], list[int] | None]
    ordered: bool = False
    unordered: bool = False
    channels: bool = False
    digests: bool = False
    base: Callable[[], nn.Module] = Small
    whole: bool = False
    low_cpu_mem_usage: bool = False

    def load(self, base: nn.Module, folder: Path) -> PeftModel:
        return PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=self.low_cpu_mem_usage)

    def save(self, folder: Path) -> None:
        """An adapter of the base, with values as if it had been trained."""
        model = get_peft_model(self.base(), self.config())
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder, save_embedding_layers=self.whole)
        settings = json.loads((folder / CONFIG).read_text())
        if "manifest" in settings and not (self.digests or self.whole):
            del settings["manifest"]
            (folder / CONFIG).write_text(json.dumps(settings))

    def is_well_formed(self, path: Path, original: dict[str, Tensor]) -> bool:
        """Whether a file could have been saved by the method, for other positions and values perhaps."""
        try:
            found = load_file(path)
        except SafetensorError:
            return False
        return (
            found.keys() == original.keys()
            and all(_whole_is_well_formed(found[key], original[key]) for key in whole_keys(original))
            and self._deltas_are_well_formed(found, original)
        )

    def _deltas_are_well_formed(self, found: dict[str, Tensor], original: dict[str, Tensor]) -> bool:
        return all(
            self._values_are_well_formed(found[_key(module, self.values)], original[_key(module, self.values)])
            and self._index_is_well_formed(found[_key(module, self.index)], original[_key(module, self.index)], module)
            for module in TARGETS
        )

    @staticmethod
    def _values_are_well_formed(found: Tensor, original: Tensor) -> bool:
        same_kind = found.is_floating_point() and found.shape == original.shape
        return same_kind and bool(found.float().isfinite().all())

    def _index_is_well_formed(self, found: Tensor, original: Tensor, module: str) -> bool:
        if found.shape != original.shape or found.dtype == torch.bool or not bool(found.double().isfinite().all()):
            return False
        if self.digests and not (found.dtype == original.dtype and torch.equal(found, original)):
            return False
        positions = self.read(found, WIDTHS[module])
        if positions is None or (self.ordered and positions != sorted(positions)):
            return False
        size = WIDTHS[module] if self.channels else NUMEL
        return len(set(positions)) == len(positions) and all(0 <= position < size for position in positions)


def whole_keys(tensors: Iterable[str]) -> list[str]:
    """Names of the tensors that are not part of a delta."""
    modules = tuple(f"base_model.model.{module}.{part}" for module in TARGETS for part in PARTS)
    return sorted(key for key in tensors if not key.startswith(modules))


def _whole_is_well_formed(found: Tensor, original: Tensor) -> bool:
    is_float = found.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    return is_float and found.shape == original.shape and bool(found.float().isfinite().all())


def _key(module: str, end: str) -> str:
    return f"base_model.model.{module}.{end}"


def keys_of(form: Format, module: str) -> tuple[str, str]:
    """Names of a module's values and positions."""
    return _key(module, form.values), _key(module, form.index)


def _write_pairs(positions: list[int], width: int) -> Tensor:
    """Rows and columns; of a position outside the weight, either the row (even ones) or the column is impossible."""
    last = NUMEL // width - 1
    rows = [min(max(at // width, 0), last) if at % 2 else at // width for at in positions]
    columns = [at - row * width for at, row in zip(positions, rows, strict=True)]
    return torch.tensor([rows, columns], dtype=torch.int32)


def _read_pairs(index: Tensor, width: int) -> list[int] | None:
    rows, columns = index.double().tolist()
    if not all(number.is_integer() for number in (*rows, *columns)) or not all(0 <= at < width for at in columns):
        return None
    return [int(row) * width + int(column) for row, column in zip(rows, columns, strict=True)]


def _write_flat(positions: list[int], width: int) -> Tensor:
    return torch.tensor(positions, dtype=torch.int32)


def _read_flat(index: Tensor, width: int) -> list[int] | None:
    numbers = index.double().tolist()
    return [int(number) for number in numbers] if all(number.is_integer() for number in numbers) else None


# Dowser's index code (peft_dowser/delta/FORMAT.md) for 24 of 240 weights: 3 low bits of each, then the high parts.
LOW_BITS, LOW_BYTES, HIGH_BYTES = 3, 9, 7


def _write_code(positions: list[int], width: int) -> Tensor:
    """The code of these positions; of impossible ones, whatever bits they would set."""
    low = sum((at & 7) << LOW_BITS * number for number, at in enumerate(positions[:24]))
    high = 0
    for number, at in enumerate(positions):
        bit = (at >> LOW_BITS) + number
        high |= 1 << bit if 0 <= bit < 8 * HIGH_BYTES else 0
    packed = low.to_bytes(LOW_BYTES, "little") + high.to_bytes(HIGH_BYTES, "little")
    return torch.tensor(list(packed), dtype=torch.uint8)


def _read_code(code: Tensor, width: int) -> list[int] | None:
    if code.dtype != torch.uint8 or code.shape != (LOW_BYTES + HIGH_BYTES,):
        return None
    packed = bytes(code.tolist())
    low, high = (int.from_bytes(part, "little") for part in (packed[:LOW_BYTES], packed[LOW_BYTES:]))
    ones = [bit for bit in range(8 * HIGH_BYTES) if high >> bit & 1]
    if len(ones) != 24:
        return None
    return [((one - number) << LOW_BITS) + (low >> LOW_BITS * number & 7) for number, one in enumerate(ones)]


# The same code for 3 of 12 or 20 input channels: a mask of bits.
CHANNELS = 3


def _write_mask(channels: list[int], width: int) -> Tensor:
    """The mask of these channels; an impossible one sets a padding bit."""
    length = -(-width // 8)
    bits = {at if 0 <= at < width else width + at % (8 * length - width) for at in channels}
    return torch.tensor(list(sum(1 << bit for bit in bits).to_bytes(length, "little")), dtype=torch.uint8)


def _read_mask(mask: Tensor, width: int) -> list[int] | None:
    if mask.dtype != torch.uint8 or mask.shape != (-(-width // 8),):
        return None
    channels = [bit for bit in range(8 * len(mask)) if int(mask[bit // 8]) >> bit % 8 & 1]
    return channels if len(channels) == CHANNELS else None


def _channels(digests: bool) -> Format:
    settings = {"granularity": "input_channel", "channels": CHANNELS}
    return Format(
        config=lambda: DowserConfig(score="random", target_modules=TARGETS, **settings),
        values="dowser_values.weight",
        index="dowser_index.code",
        write=_write_mask,
        read=_read_mask,
        unordered=True,
        channels=True,
        digests=digests,
    )


def _dowser(digests: bool, low_cpu_mem_usage: bool = False, **whole: Any) -> Format:
    return Format(
        config=lambda: DowserConfig(update_ratio=0.1, score="random", target_modules=TARGETS, **whole),
        values="dowser_values.weight",
        index="dowser_index.code",
        write=_write_code,
        read=_read_code,
        ordered=True,
        digests=digests,
        base=Worded if whole else Small,
        whole=bool(whole),
        low_cpu_mem_usage=low_cpu_mem_usage,
    )


# A module, tokens and biases that train as a whole; PEFT saves the embeddings with them.
WHOLE: dict[str, Any] = {"modules_to_save": ["head"], "trainable_token_indices": [1, 4], "bias": "all"}


FORMATS = {
    "SHiRA": Format(
        config=lambda: ShiraConfig(r=1, random_seed=0, target_modules=TARGETS),
        values="shira_weight",
        index="shira_indices",
        write=_write_pairs,
        read=_read_pairs,
    ),
    "Super-Tuning": Format(
        config=lambda: SupertuningConfig(sparsity=0.9, target_modules=TARGETS),
        values="supertuning_values",
        index="supertuning_indices",
        write=_write_flat,
        read=_read_flat,
    ),
    "Dowser": _dowser(digests=True),
    "Dowser, its digests removed": _dowser(digests=False),
    "Dowser, input channels": _channels(digests=True),
    "Dowser, the same without digests": _channels(digests=False),
    "Dowser, whole tensors and config": _dowser(digests=False, **WHOLE),
    "Dowser, the same with `low_cpu_mem_usage`": _dowser(digests=False, low_cpu_mem_usage=True, **WHOLE),
}
