"""What a saved adapter trains and how far it moves each module (`inspect`), and how two of them compare (`diff`)."""

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..delta.apply import Delta, merged_entries
from ..delta.codec import DeltaFormatError
from ..delta.format import quoted
from ..delta.layout import Layout
from ..delta.masks import shared_positions
from .adapter import SavedAdapter, open_adapter
from .checkpoint import Checkpoint, open_checkpoint
from .grouping import groups, in_order

# Fields of the configuration that say how the mask was chosen.
_CHOICES = ("base_model_name_or_path", "update_ratio", "granularity", "channels", "score", "select", "scope", "seed")

# Weights that share a scale in GGUF's Q4_0 and Q8_0.
_BLOCK = 32


def inspect(adapter: str | Path, base: str | Path | None = None, bits: int | None = None) -> dict[str, Any]:
    """Describe a saved adapter, without a model.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        base: folder or Hub id of its base model, a safetensors checkpoint. With it each module also tells what fraction
            of its values vanishes when they are merged into this base in bfloat16, whatever dtype the base is in.
        bits: 4 or 8: count those that vanish when the merged weight is rounded to integers of so many bits, as GGUF's
            Q4_0 and Q8_0 do, in blocks of 32 weights that share a scale.

    Returns:
        How the mask was chosen, what all modules are together, "bytes" of the file, under "measured" what the model
        card says that `ForgettingCallback` measured, and under "modules" a dict for each, in the order of the layers:
        the "module", "shape" of its weight as stored, number of "trained" weights and their "ratio" (shape and ratio
        are None without a manifest), "dtype" of the values in the file, "index_bits" of their positions, "bytes" of
        both, L2 norm "delta_norm", and "vanished", a fraction (None without a base). Under "groups" the same facts of
        all modules of a kind, and of a layer, with the "group" and how many "modules" it has.

    Raises:
        ValueError: a file is damaged, this is not a Dowser adapter, or it does not fit the base.
        OSError: the adapter or the base cannot be found.
    """
    if bits is not None and (bits not in (4, 8) or base is None):
        raise ValueError(f"bits must be 4 or 8 and needs a base, got bits={bits} and base={base}.")
    with ExitStack() as files:
        saved = open_adapter(str(adapter), files)
        saved.check_complete()
        layouts = {} if saved.config.manifest is None else saved.layouts
        vanished = {} if base is None else _vanished(saved, open_checkpoint(str(base), files), bits)
        modules = [_facts(saved, name, layouts.get(name), vanished.get(name)) for name in in_order(saved.counts)]
    chosen = {field: getattr(saved.config, field) for field in _CHOICES}
    rows = {row["module"]: row for row in modules}
    grouped = [_group(name, [rows[one] for one in members]) for name, members in groups(rows).items()]
    together = _together(modules) | {"bytes": saved.size, "measured": saved.measured}
    return chosen | together | {"groups": grouped, "modules": modules}


def _facts(adapter: SavedAdapter, module: str, layout: Layout | None, vanished: int | None) -> dict[str, Any]:
    values, code = adapter.values(module), adapter.code(module)
    shape = None if layout is None else layout.shape
    return {
        "module": module,
        "shape": shape,
        "trained": values.numel(),
        "ratio": None if shape is None else values.numel() / math.prod(shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "index_bits": 8 * code.nbytes,
        "bytes": values.nbytes + code.nbytes,
        "delta_norm": float(values.float().norm()),
        "vanished": None if vanished is None else vanished / values.numel(),
    }


def _together(modules: list[dict[str, Any]]) -> dict[str, Any]:
    trained = sum(row["trained"] for row in modules)
    sizes = [math.prod(row["shape"]) for row in modules if row["shape"] is not None]
    vanished = [row["vanished"] * row["trained"] for row in modules if row["vanished"] is not None]
    return {
        "trained": trained,
        "ratio": trained / sum(sizes) if sizes else None,
        "delta_norm": math.hypot(*(row["delta_norm"] for row in modules)),
        "vanished": sum(vanished) / trained if vanished else None,
    }


def _group(name: str, modules: list[dict[str, Any]]) -> dict[str, Any]:
    """The facts of several modules as if they were one."""
    return _together(modules) | {
        "group": name,
        "modules": len(modules),
        "dtype": ", ".join(sorted({row["dtype"] for row in modules})),
        "index_bits": sum(row["index_bits"] for row in modules),
        "bytes": sum(row["bytes"] for row in modules),
    }


def _vanished(adapter: SavedAdapter, base: Checkpoint, bits: int | None) -> dict[str, int]:
    """By module, how many values other than 0 change no weight of the base in bfloat16, or in some bits."""
    targets = adapter.targets_in(base.model)
    for problem in adapter.problems(base, targets):
        raise DeltaFormatError(problem)
    found = {}
    for module, target in targets.items():
        delta = adapter.delta(module, target.layout(adapter.config.granularity))
        parts = [base.tensor(key).view(-1) for key in base.pieces_of(target.tensor_name)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        if bits is not None:
            found[module] = _vanished_in_blocks(weight.float(), delta, bits)
            continue
        entries = weight.index_select(0, delta.positions).to(torch.bfloat16)
        there = Delta(torch.arange(len(entries), device="cpu"), delta.values)
        found[module] = merged_entries(entries, there).vanished()
    return found


def _vanished_in_blocks(weight: Tensor, delta: Delta, bits: int) -> int:
    """How many values other than 0 leave a weight at the same integer, in the scale of its block once it is merged."""
    positions, values = delta.positions.long(), delta.values.float()
    merged = weight.index_add(0, positions, values)
    blocks = F.pad(merged, (0, -len(merged) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    scale = (largest / low)[positions // _BLOCK]  # the largest weight of a block becomes the integer -8, or -127
    before, after = ((entries[positions] / scale).round().clamp(low, high) for entries in (weight, merged))
    return int(((before == after) & (values != 0)).sum())


@dataclass(frozen=True)
class Overlap:
    """How two deltas A and B of the same weights overlap.

    Attributes:
        shared: number of positions that both have.
        only_a: number of positions that A alone has.
        only_b: number of positions that B alone has.
        conflicts: number of shared positions that A and B move in opposite directions.
        product: sum of A B over the shared positions.
        square_a: sum of A squared over the shared positions.
        square_b: sum of B squared over the shared positions.
    """

    shared: int = 0
    only_a: int = 0
    only_b: int = 0
    conflicts: int = 0
    product: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0

    @property
    def cosine(self) -> float | None:
        """Cosine of the values at the shared positions; None where all values of A or of B are 0, or there are none."""
        length = math.sqrt(self.square_a) * math.sqrt(self.square_b)
        return max(-1.0, min(1.0, self.product / length)) if length else None

    def summary(self) -> dict[str, float | None]:
        counts = {name: getattr(self, name) for name in ("shared", "only_a", "only_b", "conflicts")}
        return counts | {"cosine": self.cosine}


def overlap(a: Delta, b: Delta) -> Overlap:
    """Compare two deltas of one weight, on one device; counts and dtypes may differ."""
    own, other = shared_positions(a.positions, b.positions)
    left, right = a.values[own].double(), b.values[other].double()
    return Overlap(
        shared=len(left),
        only_a=len(a.positions) - len(left),
        only_b=len(b.positions) - len(left),
        conflicts=int((left.sign() * right.sign() < 0).sum()),
        product=float(left @ right),
        square_a=float(left @ left),
        square_b=float(right @ right),
    )


def total_overlap(overlaps: Iterable[Overlap]) -> Overlap:
    every = list(overlaps)
    return Overlap(**{field.name: sum(getattr(one, field.name) for one in every) for field in fields(Overlap)})


def diff(a: str | Path, b: str | Path) -> dict[str, Overlap]:
    """Compare two saved adapters, one module at a time and without their base.

    Args:
        a: folder or Hub id of a saved Dowser adapter.
        b: folder or Hub id of another one, for weights of the same shapes.

    Returns:
        The overlap by module, for every module that either adapts.

    Raises:
        DeltaFormatError: a file is damaged, or has no manifest, which alone tells the shapes.
        ValueError: one of them is not a Dowser adapter, or they are for weights of other shapes.
        OSError: an adapter cannot be found.
    """
    with ExitStack() as files:
        first, second = open_adapter(str(a), files), open_adapter(str(b), files)
        _check_same(first, second)
        return {name: _compare(name, first, second) for name in in_order(first.layouts | second.layouts)}


def _compare(module: str, a: SavedAdapter, b: SavedAdapter) -> Overlap:
    if module not in a.layouts:
        return Overlap(only_b=b.counts[module])
    if module not in b.layouts:
        return Overlap(only_a=a.counts[module])
    return overlap(a.delta(module, a.layouts[module]), b.delta(module, b.layouts[module]))


def _check_same(a: SavedAdapter, b: SavedAdapter) -> None:
    common = [module for module in a.layouts if module in b.layouts]
    if not common:
        first, second = quoted(next(iter(a.layouts))), quoted(next(iter(b.layouts)))
        raise ValueError(
            f"'{a.name}' and '{b.name}' have no module in common: the first adapts {first}, the second {second}. They "
            "are for different base models, or for different parts of one."
        )
    if other := [module for module in common if a.layouts[module].shape != b.layouts[module].shape]:
        first, second = (adapter.layouts[other[0]].shape for adapter in (a, b))
        raise ValueError(
            f"'{a.name}' and '{b.name}' are for weights of other shapes in {len(other)} of {len(common)} modules that "
            f"both adapt: {quoted(other[0])} is {first} in the first and {second} in the second. Only adapters of one "
            "base model can be compared."
        )
