"""`inspect`: what a saved adapter trains, and how far it moves each module, read one module at a time."""

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import SavedAdapter, open_adapter
from .checkpoints import Checkpoint, open_checkpoint
from .codec import DeltaFormatError
from .entries import merged_entries

# Fields of the configuration that say how the mask was chosen.
_CHOICES = ("base_model_name_or_path", "update_ratio", "score", "select", "scope", "seed")


@dataclass(frozen=True)
class ModuleFacts:
    """What a saved adapter holds for one module.

    Attributes:
        module: its name in the base model.
        shape: shape of its weight, as stored; None where the adapter has no manifest.
        trained: number of its values.
        ratio: fraction of the weight that they are; None where the adapter has no manifest.
        dtype: of the values in the file, "bfloat16" for example.
        index_bits: size of the code of their positions, in bits.
        bytes: size of values and code in the file.
        delta_norm: L2 norm of the values.
        vanished: fraction of the values that change no weight in bfloat16; None where no base was given.
    """

    module: str
    shape: tuple[int, ...] | None
    trained: int
    ratio: float | None
    dtype: str
    index_bits: int
    bytes: int
    delta_norm: float
    vanished: float | None


def inspect(adapter: str | Path, base: str | Path | None = None) -> dict[str, Any]:
    """Describe a saved adapter, without a model.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        base: folder or Hub id of its base model, a safetensors checkpoint. With it each module also tells what fraction
            of its values vanishes when they are merged into this base in bfloat16, whatever dtype the base is in.

    Returns:
        How the mask was chosen, what all modules are together, "bytes" of the file, and under "modules" the
        `ModuleFacts` of each as a dict, ordered by name.

    Raises:
        ValueError: a file is damaged, this is no Dowser adapter, or it does not fit the base.
        OSError: the adapter or the base cannot be found.
    """
    with ExitStack() as files:
        saved = open_adapter(str(adapter), files)
        saved.check_complete()
        shapes = {} if saved.config.manifest is None else saved.shapes()
        vanished = {} if base is None else _vanished(saved, open_checkpoint(str(base), files))
        modules = [_facts(saved, name, shapes.get(name), vanished.get(name)) for name in sorted(saved.counts)]
    chosen = {field: getattr(saved.config, field) for field in _CHOICES}
    return chosen | _together(modules) | {"bytes": saved.size, "modules": [asdict(module) for module in modules]}


def _facts(adapter: SavedAdapter, module: str, shape: tuple[int, ...] | None, vanished: int | None) -> ModuleFacts:
    values, code = adapter.values(module), adapter.code(module)
    return ModuleFacts(
        module=module,
        shape=shape,
        trained=values.numel(),
        ratio=None if shape is None else values.numel() / math.prod(shape),
        dtype=str(values.dtype).removeprefix("torch."),
        index_bits=8 * code.nbytes,
        bytes=values.nbytes + code.nbytes,
        delta_norm=float(values.float().norm()),
        vanished=None if vanished is None else vanished / values.numel(),
    )


def _together(modules: list[ModuleFacts]) -> dict[str, Any]:
    trained = sum(module.trained for module in modules)
    sizes = [math.prod(module.shape) for module in modules if module.shape is not None]
    vanished = [module.vanished * module.trained for module in modules if module.vanished is not None]
    return {
        "trained": trained,
        "ratio": trained / sum(sizes) if sizes else None,
        "delta_norm": math.hypot(*(module.delta_norm for module in modules)),
        "vanished": sum(vanished) / trained if vanished else None,
    }


def _vanished(adapter: SavedAdapter, base: Checkpoint) -> dict[str, int]:
    """By module, how many values other than 0 change no weight of the base in bfloat16."""
    targets = adapter.targets_in(base.model)
    for problem in adapter.problems(base, targets):
        raise DeltaFormatError(problem)
    found = {}
    for module, target in targets.items():
        positions, values = adapter.delta(module, target.numel)
        entries = _entries(base, target.tensor_name, positions).to(torch.bfloat16)
        found[module] = merged_entries(entries, torch.arange(len(entries), device="cpu"), values).vanished(values)
    return found


def _entries(base: Checkpoint, name: str, positions: Tensor) -> Tensor:
    """The entries of a weight at some positions; of a fused one, of the tensors that make it up."""
    if name in base:
        return base.read(name).view(-1).index_select(0, positions)
    return torch.cat([base.stored(key).view(-1) for key in base.pieces[name]]).index_select(0, positions)
