"""`extract`: from a base and a fine-tuned checkpoint to a Dowser adapter, one pair of matrices at a time."""

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from .._transformers import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from ..base.search import resolve_targets
from ..baselines.postmerge import dare, graft, top_delta
from ..config import DowserConfig
from ..delta.apply import Delta
from ..delta.codec import encode
from ..delta.format import CODE, PREFIX, VALUES, base_sample, few, manifest_entry, manifest_of, quoted
from ..delta.layout import Layout
from ..delta.safe_files import check_output, finished_together, write_tensors
from ..delta.seeds import derived_seed
from .checkpoint import FLOAT_DTYPES, Checkpoint, open_checkpoint

METHODS = ("top_delta", "dare", "graft")

# How often `graft` reads a pair.
_GRAFT_READS = 5


def extract(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    update_ratio: float = 0.1,
    method: Literal["top_delta", "dare", "graft"] = "top_delta",
    target_modules: list[str] | str | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, int]:
    """Write what separates a fine-tuned model from its base as an adapter, which `PeftModel.from_pretrained` loads.

    Args:
        base: folder or Hub id of the base model, a safetensors checkpoint.
        tuned: folder or Hub id of the fine-tuned model: the same architecture in the same dtype.
        output: folder for the adapter; new or empty.
        update_ratio: rho, the fraction to keep, in (0, 1]. Entries that did not change take no room.
        method: "top_delta" keeps the largest changes of each matrix, "graft" the largest of all matrices together,
            "dare" random ones, divided by rho; see `postmerge`.
        target_modules: modules to compare, as in `DowserConfig`; None takes the linears of the language model.
        scale: factor on what is kept. With `update_ratio=1` it is WiSE-FT's alpha, the point between base and tuned.
        seed: of "dare".

    Returns:
        Number of entries in the adapter by module.

    Raises:
        ValueError: an argument is out of range, or the checkpoints do not fit each other, do not differ, or are
            damaged. Nothing is written.
        TypeError: a target module is not a linear layer.
        OSError: a checkpoint cannot be found, or the output folder is not empty or cannot be written; then no adapter
            is in it.

    Note: with `update_ratio=1` the merged adapter is the fine-tuned model, bit for bit but for the cases of
    `delta.Delta`. Tensors that differ outside the target weights are named in a warning.
    """
    config = DowserConfig(
        update_ratio=update_ratio,
        target_modules=target_modules,
        scope="model" if method == "graft" else "matrix",
        seed=seed,
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    folder = Path(output)
    _check(str(base), str(tuned), folder, method, scale)
    with ExitStack() as files:
        pair = _Pair(open_checkpoint(str(base), files), open_checkpoint(str(tuned), files))
        _check_architecture(pair)
        names = list(resolve_targets(pair.base.model, config))
        _check_targets(pair, names)
        _report_others(pair, names)
        counts, tensors, entries = {}, {}, {}
        for name, delta in _deltas(pair, names, config, method):
            positions, values = _changed(delta, scale)
            if counted := positions.numel():
                counts[name] = counted
                weight = pair.base.read(_weight(name))
                tensors[f"{PREFIX}{name}{VALUES}"] = values
                tensors[f"{PREFIX}{name}{CODE}"] = code = encode(positions, weight.numel())
                entries[name] = manifest_entry(code, values, Layout(tuple(weight.shape)), base_sample(weight))
    if not counts:
        raise ValueError(f"'{tuned}' and '{base}' do not differ in what '{method}' keeps of {len(names)} modules.")
    config.nnz_pattern = counts
    config.manifest = manifest_of(entries)
    if config.target_modules is None:
        config.target_modules = set(names)
    _save(folder, tensors, config, pair.base.model)
    return counts


@dataclass
class _Pair:
    base: Checkpoint
    tuned: Checkpoint

    def read(self, module: str, bar: Any) -> tuple[Tensor, Tensor]:
        bar.update()
        return _finite(self.base, _weight(module)), _finite(self.tuned, _weight(module))

    def differ(self, name: str) -> bool:
        base, tuned = self.base, self.tuned
        comparable = name in base and name in tuned and base.dtype(name) == tuned.dtype(name)
        return not (comparable and torch.equal(base.read(name), tuned.read(name)))


def _finite(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.read(name)
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise ValueError(f"'{checkpoint.name}': tensor '{name}' has {bad} entries that are not finite.")
    return tensor


def _weight(module: str) -> str:
    return f"{module}.weight"


def _check(base: str, tuned: str, output: Path, method: str, scale: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}.")
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, got {scale!r}.")
    if base == tuned or (Path(base).is_dir() and Path(tuned).is_dir() and Path(base).samefile(tuned)):
        raise ValueError(f"base and tuned are the same checkpoint, '{base}'.")
    check_output(output)


def _check_architecture(pair: _Pair) -> None:
    base, tuned = pair.base, pair.tuned
    if type(base.model) is not type(tuned.model):
        raise ValueError(
            f"'{base.name}' is a {type(base.model).__name__} and '{tuned.name}' a {type(tuned.model).__name__}; the "
            "fine-tuned model must have the architecture of its base."
        )
    if other := sorted(base.model.state_dict().keys() ^ tuned.model.state_dict().keys()):
        raise ValueError(
            f"'{base.name}' and '{tuned.name}' have different architectures: {len(other)} tensors, such as "
            f"{quoted(other[0])}, are in one of them only."
        )


def _check_targets(pair: _Pair, modules: Iterable[str]) -> None:
    for name in map(_weight, modules):
        for checkpoint in (pair.base, pair.tuned):
            if name not in checkpoint:
                raise ValueError(
                    f"'{checkpoint.name}' has no tensor for the target weight '{name}': the checkpoint is incomplete, "
                    "or transformers builds this weight from other tensors, which is not supported. Choose other "
                    "target_modules."
                )
        found = [(checkpoint.dtype(name), checkpoint.shape(name)) for checkpoint in (pair.base, pair.tuned)]
        if found[0] != found[1] or found[0][0] not in FLOAT_DTYPES:
            raise ValueError(
                f"The target weight '{name}' is {found[0][0]} of shape {found[0][1]} in '{pair.base.name}' and "
                f"{found[1][0]} of shape {found[1][1]} in '{pair.tuned.name}'; it must be the same in both, of one of "
                f"{', '.join(FLOAT_DTYPES)}."
            )


def _report_others(pair: _Pair, modules: Iterable[str]) -> None:
    others = sorted((pair.base.tensors.keys() | pair.tuned.tensors.keys()) - set(map(_weight, modules)))
    different = [name for name in others if pair.differ(name)]
    if different:
        warnings.warn(
            f"{len(different)} tensors outside the target weights differ and are not in the adapter: {few(different)}.",
            stacklevel=3,
        )


def _deltas(pair: _Pair, names: list[str], config: DowserConfig, method: str) -> Iterator[tuple[str, Delta]]:
    reads = len(names) * (_GRAFT_READS if method == "graft" else 1)
    ratio = config.update_ratio
    with tqdm(total=reads, desc="Extracting", unit="matrix") as bar:
        if method == "graft":
            yield from zip(names, graft([partial(pair.read, name, bar) for name in names], ratio), strict=True)
            return
        for name in names:
            base, tuned = pair.read(name, bar)
            if method == "dare":
                yield name, dare(base, tuned, ratio, derived_seed(config.seed, "dare", name))
            else:
                yield name, top_delta(base, tuned, ratio)


def _changed(delta: Delta, scale: float) -> Delta:
    """The delta scaled, less the entries that change nothing."""
    values = delta.values * scale
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"scale={scale!r} is too large: values are no longer finite in float32.")
    kept = values != 0
    return Delta(delta.positions[kept], values[kept])


def _save(folder: Path, tensors: dict[str, Tensor], config: DowserConfig, model: PreTrainedModel) -> None:
    config.task_type = _task(model)
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    with finished_together(folder) as work:
        write_tensors(tensors, work / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
        config.save_pretrained(str(work), auto_mapping_dict=mapping)


def _task(model: PreTrainedModel) -> TaskType | None:
    """PEFT's task of a generating model. A classifier has none: PEFT would look for its head in the adapter."""
    name = type(model).__name__
    if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return TaskType.CAUSAL_LM
    if name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values():
        return TaskType.SEQ_2_SEQ_LM
    return None
