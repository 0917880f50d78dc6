"""`merge` and `verify`: a base checkpoint plus a saved adapter, one tensor at a time and without building a model."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers.utils.logging import tqdm

from .._transformers import convert_file_size_to_int
from ..base.target import Target
from ..delta.apply import Delta, merged_entries, report_vanished
from ..delta.codec import DeltaFormatError
from ..delta.format import quoted
from ..delta.safe_files import check_output, finished_together, write_tensors
from .adapter import SavedAdapter, open_adapter
from .checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, copy_companions, open_checkpoint

# What to do where the adapter does not lead to its base.
_GIVE_BASE = "give the base (base=, or --base on the command line)"


def merge(
    adapter: str | Path, output: str | Path, base: str | Path | None = None, max_shard_size: int | str = "5GB"
) -> dict[str, int]:
    """Write the model that `merge_and_unload` and `save_pretrained` make, bit for bit, without loading it whole.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        output: folder for the merged model; new or empty. It gets the tensors of the base checkpoint, under their
            names and in their dtypes, with its configuration, tokenizer, processor and code.
        base: folder or Hub id of the base model, a safetensors checkpoint; None takes the one that the adapter names.
        max_shard_size: size of a file of weights, in bytes or as "5GB"; a larger tensor gets a file of its own. The
            changed weights of one file are in memory together.

    Returns:
        Number of values merged by module.

    Raises:
        ValueError: the adapter is damaged or does not fit the base, the base is damaged, or a sum is not finite.
        OSError: a checkpoint cannot be found, the output folder is not empty, or it cannot be written.

    Note: nothing is written before the whole adapter is checked, and no file has its name before all are written:
    an interrupted merge leaves nothing that loads as a model.
    """
    folder = Path(output)
    check_output(folder)
    limit = convert_file_size_to_int(max_shard_size)
    with ExitStack() as files:
        merged = open_merged(adapter, base, files)
        with finished_together(folder) as work:
            _write(work, merged, limit)
            copy_companions(merged.base.name, work)
            # It may have tokens and a chat template of its own.
            copy_companions(merged.adapter.name, work, of_adapter=True)
    report_vanished([merged.vanished])
    return merged.adapter.counts


def verify(adapter: str | Path, base: str | Path | None = None, merged: str | Path | None = None) -> list[str]:
    """Check a saved adapter against its base, and a merged model against both, without loading a model.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        base: folder or Hub id of the base model, a safetensors checkpoint; None takes the one that the adapter names.
        merged: folder or Hub id of a model in which every tensor must be the sum of base and adapter, bit for
            bit; None checks the adapter alone, for which only a few entries of the base are read.

    Returns:
        A message for every problem; empty where all is well.

    Raises:
        ValueError: a file is damaged as a whole, or the adapter is not a Dowser adapter.
        OSError: a checkpoint cannot be found.
    """
    with ExitStack() as files:
        saved, checkpoint = _open(str(adapter), base, files)
        try:
            targets = saved.targets_in(checkpoint.model)
        except DeltaFormatError as error:
            return [str(error)]
        problems = list(saved.problems(checkpoint, targets))
        if not problems:
            problems = list(saved.altered())
            if other := saved.other_base(checkpoint, targets):
                problems.append(other)
        if merged is not None and not problems:
            expected = MergedCheckpoint(saved, checkpoint, targets)
            problems = list(_differences(expected, open_checkpoint(str(merged), files)))
    return problems


class MergedCheckpoint:
    """A base checkpoint plus an adapter.

    `vanished` has by module how many non-zero values changed no weight, of how many values; filled as tensors are read.
    """

    def __init__(self, adapter: SavedAdapter, base: Checkpoint, targets: Mapping[str, Target]) -> None:
        self.adapter = adapter
        self.base = base
        self.vanished: dict[str, tuple[int, int]] = {}
        # By tensor of the checkpoint: its target, and where in the memory of the target's weight it begins.
        self._places: dict[str, tuple[Target, int]] = {}
        for target in targets.values():
            keys = base.pieces_of(target.tensor_name)
            starts = accumulate((math.prod(base.files[key].get_slice(key).get_shape()) for key in keys), initial=0)
            self._places |= {key: (target, start) for key, start in zip(keys, starts, strict=False)}
        # Tensors of two fused parameters alternate, and each needs the delta of its whole parameter.
        self._delta = lru_cache(maxsize=2)(adapter.delta)
        self._others = {base.tensors[name]: name for name in adapter.whole_tensors if name in base.tensors}

    def changed_tensors(self) -> list[str]:
        """The tensors that the adapter changes, by their names in the base checkpoint."""
        return [key for key in self.base.files if key in self._places or key in self._others]

    def read(self, key: str) -> Tensor:
        """A tensor of the sum, by its name in the base checkpoint; must not be written."""
        tensor = self.base.tensor(key)
        if key in self._others:
            tensor = self.adapter.whole_tensor(self._others[key]).to(tensor.dtype)
        return self._added(tensor, *self._places[key]) if key in self._places else tensor

    def cast_on_load(self) -> str | None:
        """What to say where weights are stored, and so summed, in another dtype than they are loaded in; or None."""
        stored = {self.base.tensor(key).dtype for key in self._places}
        loaded = self.base.model.config.dtype
        if loaded is None or stored == {loaded}:
            return None
        names = ", ".join(sorted(str(dtype) for dtype in stored))
        return (
            f"'{self.base.name}' holds its weights in {names}, and its config says {loaded}, in which they are loaded. "
            "The merged model keeps the dtype of the files, so its sums may differ in the last bits from what the "
            "adapter computes on a base that is loaded so. For those bits merge in memory, with merge_and_unload()."
        )

    def _added(self, weight: Tensor, target: Target, start: int) -> Tensor:
        module, delta = target.name, self._delta(target.name, target.layout(self.adapter.config.granularity))
        ends = torch.tensor([start, start + weight.numel()], dtype=torch.int64, device="cpu")
        own = slice(*torch.searchsorted(delta.positions, ends.to(delta.positions.dtype)).tolist())
        entries = merged_entries(weight, Delta(delta.positions[own] - start, delta.values[own]))
        entries.check_finite(self.adapter.name, module)
        weight = weight.clone()  # what was read is memory of the file
        entries.write(weight)
        lost, total = self.vanished.get(module, (0, 0))
        self.vanished[module] = (lost + entries.vanished(), total + entries.sums.numel())
        return weight


def open_merged(adapter: str | Path, base: str | Path | None, files: ExitStack) -> MergedCheckpoint:
    """Open a base checkpoint plus an adapter, and check all that can be checked before a sum is formed.

    Arguments and errors are as for `merge`; `files` closes the files of both.
    """
    saved, checkpoint = _open(str(adapter), base, files)
    targets = saved.targets_in(checkpoint.model)
    for problem in saved.problems(checkpoint, targets):
        raise DeltaFormatError(problem)
    if other := saved.other_base(checkpoint, targets):
        warnings.warn(other, stacklevel=3)
    merged = MergedCheckpoint(saved, checkpoint, targets)
    if cast := merged.cast_on_load():
        warnings.warn(cast, stacklevel=3)
    return merged


def _open(adapter: str, base: str | Path | None, files: ExitStack) -> tuple[SavedAdapter, Checkpoint]:
    saved = open_adapter(adapter, files)
    if base is not None:
        return saved, open_checkpoint(str(base), files)
    named = saved.config.base_model_name_or_path
    if not named:
        raise ValueError(f"Adapter '{adapter}' does not name its base model; {_GIVE_BASE}.")
    if not str(named).isprintable():
        raise ValueError(f"Adapter '{adapter}' names its base model {quoted(named)}, which cannot be; {_GIVE_BASE}.")
    if saved.config.revision:
        raise ValueError(
            f"Adapter '{adapter}' was made for revision {quoted(saved.config.revision)} of '{named}'; download that "
            f"revision and {_GIVE_BASE}: its folder."
        )
    try:
        return saved, open_checkpoint(named, files)
    except OSError as error:
        raise OSError(
            f"Adapter '{adapter}' names its base model '{named}', which cannot be read: {error} If the base has moved, "
            f"{_GIVE_BASE}."
        ) from error


def _write(work: Path, merged: MergedCheckpoint, limit: int) -> None:
    split = split_state_dict_into_shards_factory(
        {key: merged.base.tensor(key).nbytes for key in merged.base.files},
        get_storage_size=lambda size: size,
        filename_pattern=SINGLE_FILE.replace(".", "{suffix}."),
        max_shard_size=limit,
    )
    files = split.filename_to_tensors.items()
    for name, keys in tqdm(files, desc="Merging", unit="file"):
        write_tensors({key: merged.read(key) for key in keys}, work / name, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (work / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _differences(expected: MergedCheckpoint, merged: Checkpoint) -> Iterator[str]:
    base = expected.base
    # A tied tensor that only the merged model stores counts too: with other content it is tied no more.
    names = dict.fromkeys([*base.tensors, *(name for name in merged.tensors if name in base)])
    for name in tqdm(names, desc="Verifying", unit="tensor"):
        if name not in merged:
            yield f"'{merged.name}' lacks the tensor {quoted(name)}."
            continue
        ours, found = expected.read(base.key(name)), merged.read(name)
        if (found.dtype, found.shape) != (ours.dtype, ours.shape):
            yield (
                f"'{merged.name}': tensor {quoted(name)} is {found.dtype} of shape {tuple(found.shape)}, expected "
                f"{ours.dtype} of shape {tuple(ours.shape)}."
            )
        elif different := int((_bits(found) != _bits(ours)).any(-1).sum()):
            entries = f"{different} of {ours.numel()} entries of tensor {quoted(name)}"
            yield f"'{merged.name}': {entries} are not base + delta."
    if unknown := sorted(name for name in merged.tensors if name not in base):
        yield f"'{merged.name}' has {len(unknown)} tensors that are not in '{base.name}', such as {quoted(unknown[0])}."


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 1).view(torch.uint8)
