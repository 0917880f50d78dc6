"""Saved Dowser adapters, read one module at a time and checked against the checkpoint of their base."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from torch import Tensor, nn

from ..base.search import resolve_targets
from ..base.target import Target, layouts_of
from ..card import measured
from ..config import DowserConfig
from ..delta.apply import Delta
from ..delta.codec import DeltaFormatError, check_values
from ..delta.format import CODE, PREFIX, VALUES, base_name, base_sample, digest, is_delta, quoted
from ..delta.layout import Layout, StoredDelta
from ..delta.safe_files import open_tensors
from .checkpoint import FLOAT_DTYPES, Checkpoint, fetched
from .checks import (
    check_counts,
    check_fits,
    check_foreign,
    check_keys,
    check_missing,
    check_whole_tensor,
    described_layouts,
    errors_at,
    foreign_to,
    in_modules_to_save,
    other_base,
    read_delta,
)


@dataclass
class SavedAdapter:
    """An open adapter.

    Attributes:
        name: its folder or Hub id.
        size: size of its file, in bytes.
        counts: trained weights by module.
        whole_tensors: names in the file, by name in the base model, of the tensors that are not part of a delta: biases
            and modules that were trained as a whole.
        measured: what its card says was measured in training, by name.
    """

    name: str
    config: DowserConfig
    size: int
    file: Any
    counts: dict[str, int]
    whole_tensors: dict[str, str]
    measured: dict[str, float]

    def delta(self, module: str, layout: Layout) -> Delta:
        """The delta of a module as single weights; the rest as `stored`."""
        return layout.delta(self.stored(module, layout))

    def stored(self, module: str, layout: Layout, code: Tensor | None = None) -> StoredDelta:
        """The delta of a module, checked; its values are float32, as PEFT loads them. `code` is its index code, where
        that was read already.
        """
        values, code = self._read(f"{PREFIX}{module}{VALUES}"), self.code(module) if code is None else code
        manifest = self.config.manifest
        code_digest = None if manifest is None else manifest["modules"][module]["code_sha256"]
        return read_delta(values, code, layout, self.counts[module], code_digest, self._place(module))

    def values(self, module: str) -> Tensor:
        """The values of a module as they are in the file, shape `(nnz,)`, or `(out, k)` for input channels; checked."""
        values, nnz = self._read(f"{PREFIX}{module}{VALUES}"), self.counts[module]
        shape: tuple[int, ...] = (nnz,)
        if self.config.granularity == "input_channel":  # of a weight whose shape may not be known here
            shape = tuple(values.shape) if values.dim() == 2 and values.numel() == nnz else (nnz, 1)
        with errors_at(self._place(module)):
            check_values(values, shape)
        return values

    def code(self, module: str) -> Tensor:
        """The index code of a module, unchecked, shape `(bytes,)`, uint8."""
        return self._read(f"{PREFIX}{module}{CODE}")

    def whole_tensor(self, name: str) -> Tensor:
        """A tensor that is not part of a delta, by its name in the base model."""
        return self._read(self.whole_tensors[name])

    def check_complete(self) -> None:
        """Refuse counts that cannot be, and a file that does not have the tensors of exactly the modules counted."""
        check_counts(self.counts, self._where)
        expected = [f"{PREFIX}{module}{part}" for module in self.counts for part in (VALUES, CODE)]
        check_keys(expected, self.file.keys(), self._where)

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """What its positions mean by module, where no base is at hand: as its manifest describes it."""
        if self.config.manifest is None:
            raise DeltaFormatError(
                f"{self._where} has no manifest, so the shapes of its weights are unknown. Load it with its base model "
                "and save it again with this release."
            )
        self.check_complete()
        return described_layouts(self.config.manifest, self.counts, self.config.granularity, self._where)

    def check_fits(self, targets: Mapping[str, Target]) -> None:
        check_fits(self.counts, layouts_of(targets, self.config.granularity), self.config.manifest, self._where)
        self.check_complete()

    def targets_in(self, model: nn.Module) -> dict[str, Target]:
        """The weights of a model that the adapter trains, by module; refuses an adapter that does not fit, and reads no
        tensor.
        """
        try:
            targets = resolve_targets(model, self.config)
        except (ValueError, TypeError) as error:
            raise DeltaFormatError(str(error)) from error
        self.check_fits(targets)
        return {module: targets[module] for module in self.counts}

    def problems(self, base: Checkpoint, targets: Mapping[str, Target]) -> Iterator[str]:
        """Everything that keeps the adapter from being merged into a base, one message each. `targets` are those in its
        model.
        """
        for module, target in targets.items():
            yield from _problem(_check_weight, base, target.tensor_name, target.shape)
            yield from _problem(self.stored, module, target.layout(self.config.granularity))
        names = [target.tensor_name for target in targets.values()]
        stored = [base.key(name) for name in names if name in base]
        if shared := len(stored) - len(set(stored)):
            yield (
                f"{self._where}: {shared} of its target weights are tied to others of them in '{base.name}'. "
                "Merge in memory, with merge_and_unload()."
            )
        for name in self.whole_tensors:
            yield from _problem(self._check_whole_tensor, base, name)
        known = [name for name in self.whole_tensors if name in base.tensors]
        yield from _problem(check_foreign, foreign_to(base.model, known, self.config, self.counts), self._where)
        needed = in_modules_to_save(base.model, self.config)
        yield from _problem(check_missing, [name for name in needed if name not in self.whole_tensors], self._where)

    def other_base(self, base: Checkpoint, targets: Mapping[str, Target]) -> str | None:
        """What to say where the adapter was made for other weights than a base has; reads a few entries of each.

        Weights that the checkpoint holds in several tensors are left out.
        """
        if self.config.manifest is None:
            return None
        names = {module: target.tensor_name for module, target in targets.items()}
        samples = {module: base_sample(base.read(name)) for module, name in names.items() if name in base}
        return other_base(self.config.manifest, samples, self._where)

    def altered(self) -> Iterator[str]:
        """A message for every module whose values are not those that were saved, by the digests of the manifest."""
        for module, entry in (self.config.manifest or {"modules": {}})["modules"].items():
            if digest(self.values(module)) != entry["values_sha256"]:
                yield (
                    f"{self._place(module)}: the values are not those that its manifest describes. "
                    "The adapter's two files are not of one save, or were edited."
                )

    def _read(self, key: str) -> Tensor:
        """A copy of a tensor: the memory of a file changes with it, and kills the process where the file was cut."""
        return self.file.get_tensor(key).clone()

    @property
    def _where(self) -> str:
        return f"Adapter '{self.name}'"

    def _place(self, module: str) -> str:
        return f"{self._where}, module {quoted(module)}"

    def _check_whole_tensor(self, base: Checkpoint, name: str) -> None:
        key = self.whole_tensors[name]
        if name not in base.tensors or name in base.tied:
            raise DeltaFormatError(
                f"{self._where}: {quoted(key)} is neither a Dowser tensor nor a tensor of '{base.name}' that is not "
                "tied. Such an adapter can only be merged in memory, with merge_and_unload()."
            )
        check_whole_tensor(self.whole_tensor(name), base.read(name), key, self._where)


def _problem(check: Callable[..., Any], *arguments: Any) -> Iterator[str]:
    try:
        check(*arguments)
    except DeltaFormatError as error:
        yield str(error)


def _check_weight(base: Checkpoint, name: str, shape: tuple[int, ...]) -> None:
    slices = [base.files[key].get_slice(key) for key in base.pieces_of(name)]
    if not slices:
        raise DeltaFormatError(
            f"'{base.name}' has no tensor for the target weight '{name}': the checkpoint is incomplete, or "
            "transformers builds this weight from other tensors. Merge in memory, with merge_and_unload()."
        )
    found = Counter((piece.get_dtype(), tuple(piece.get_shape())) for piece in slices)
    numel = sum(math.prod(size) * count for (_, size), count in found.items())
    # The pieces of a fused parameter are matrices, one below the other.
    width = shape[2 if name in base.pieces else 1 :]
    fits = numel == math.prod(shape) and {size[1:] for _, size in found} == {width}
    if not fits or {dtype for dtype, _ in found} not in [{dtype} for dtype in FLOAT_DTYPES]:
        kinds = [
            f"{dtype} of shape {size}{f' ({count} times)' * (count > 1)}" for (dtype, size), count in found.items()
        ]
        raise DeltaFormatError(
            f"The target weight '{name}' is {' and '.join(kinds)} in '{base.name}'; it must be one of "
            f"{', '.join(FLOAT_DTYPES)}, of shape {shape}."
        )


def open_adapter(name: str, files: ExitStack) -> SavedAdapter:
    """Open an adapter in a folder or, by its id, on the Hub; `files` closes it.

    Raises:
        OSError: there is no such adapter, or it is not in a safetensors file.
        ValueError: it is not a Dowser adapter, or a file is damaged.
    """
    folder = fetched(name, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md"])
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"'{name}' holds no {SAFETENSORS_WEIGHTS_NAME}.")
    config = _config(folder, name)
    file = open_tensors(path, files)
    counts = _counts(file) if config.nnz_pattern is None else config.nnz_pattern
    whole_tensors = {base_name(key): key for key in file.keys() if not is_delta(key)}
    return SavedAdapter(name, config, path.stat().st_size, file, counts, whole_tensors, measured(folder))


def _config(folder: Path, name: str) -> DowserConfig:
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"'{name}' holds no {CONFIG_NAME}.")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"'{folder / CONFIG_NAME}' is not a configuration that PEFT can read ({error!r}).") from error
    if not isinstance(config, DowserConfig):
        raise ValueError(f"'{name}' holds a {PeftType(config.peft_type).value} adapter, not a Dowser adapter.")
    return config


def _counts(file: Any) -> dict[str, int]:
    return {
        key.removeprefix(PREFIX).removesuffix(VALUES): math.prod(file.get_slice(key).get_shape())
        for key in file.keys()
        if key.endswith(VALUES)
    }
