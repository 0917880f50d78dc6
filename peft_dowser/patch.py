"""`Patch`: a saved adapter written into the weights of a plain model, and taken out again bit for bit."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from .adapters import SavedAdapter, open_adapter
from .entries import checksum, merged_entries, write_entries_
from .layer import dowser_layers
from .postmerge import Delta
from .provenance import warn_of_other_base
from .storage import offload_hook
from .target import Target


@dataclass(frozen=True)
class _Written:
    """What a patch has done to one weight: the entries that were there, and the checksum of those that are."""

    originals: Tensor
    checksum: int


class Patch:
    """A saved adapter for a model without PEFT's layers: for switching between many adapters of one base.

    Applying costs nnz writes and keeps the nnz entries that they replace; the model runs at the speed of the base, and
    its outputs are bit for bit those of the merged model.

        french = Patch(model, "adapters/french")
        with french:
            model.generate(...)

    Several patches may be applied to a model; the last one must be removed first.
    """

    def __init__(self, model: nn.Module, adapter: str | Path) -> None:
        """Read a saved adapter and check it against a model, which stays as it is.

        Args:
            model: a model of transformers or any other, as the adapter's base.
            adapter: folder or Hub id of a saved Dowser adapter.

        Raises:
            ValueError: the adapter is damaged or does not fit the model (`DeltaFormatError`), trains more than sparse
                deltas, or the model is adapted, quantized or offloaded.
            OSError: there is no such adapter.
        """
        if dowser_layers(model):
            raise ValueError("The model has Dowser adapters. Give a patch the plain model, or use load_adapter().")
        with ExitStack() as files:
            saved = open_adapter(str(adapter), files)
            if saved.others:
                raise ValueError(
                    f"Adapter '{saved.name}' also changes {len(saved.others)} whole tensors, such as "
                    f"{next(iter(saved.others))!r}, which a patch does not. Use PeftModel.from_pretrained()."
                )
            self._targets = saved.targets_in(model)
            _check_writable(self._targets)
            self._deltas = {name: _delta(saved, target) for name, target in self._targets.items()}
        self._written: dict[str, _Written] = {}
        self.name = saved.name
        if saved.config.manifest is not None:
            samples = {name: target.sample() for name, target in self._targets.items()}
            warn_of_other_base(saved.config.manifest, samples, f"Adapter '{self.name}'")

    def __repr__(self) -> str:
        return f"Patch({self.name!r}, {len(self._targets)} modules, {'' if self._written else 'not '}applied)"

    def apply(self) -> None:
        """Write W + D into the weights.

        Raises:
            ValueError: it is applied already, or a sum would not be finite; no weight has changed.
        """
        if self._written:
            raise ValueError(f"Adapter '{self.name}' is applied already.")
        sums = {}
        for name, target in self._targets.items():
            delta = self._deltas[name]
            entries = merged_entries(_weight(target), delta.positions, delta.values)
            entries.check_finite(self.name, name)
            sums[name] = entries
        self._written = {name: _Written(each.originals, checksum(each.sums)) for name, each in sums.items()}
        try:
            for name, entries in sums.items():
                write_entries_(_weight(self._targets[name]), self._deltas[name].positions, entries.sums)
        except BaseException:
            self._restore()
            raise

    def remove(self) -> None:
        """Put the replaced entries back: the weights are bit for bit what they were.

        Raises:
            ValueError: it is not applied, or entries that it wrote were changed since, be it by another patch or by
                training; no weight has changed.
        """
        if not self._written:
            raise ValueError(f"Adapter '{self.name}' is not applied.")
        for name, target in self._targets.items():
            found = _weight(target).view(-1).index_select(0, self._deltas[name].positions)
            written = self._written[name]
            if found.dtype != written.originals.dtype or checksum(found) != written.checksum:
                raise ValueError(
                    f"Adapter '{self.name}': entries that it wrote into the weight of module '{name}' were changed "
                    "since. Remove the patch that was applied after it first; a model that was trained or cast "
                    "meanwhile has to be loaded again."
                )
        self._restore()

    def _restore(self) -> None:
        for name, written in self._written.items():
            write_entries_(_weight(self._targets[name]), self._deltas[name].positions, written.originals)
        self._written = {}

    def __enter__(self) -> "Patch":
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _weight(target: Target) -> Tensor:
    return getattr(target.module, target.parameter).data


def _delta(saved: SavedAdapter, target: Target) -> Delta:
    positions, values = saved.delta(target.name, target.numel)
    return Delta(positions.to(target.device), values.to(target.device))


def _check_writable(targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if target.is_quantized or offload_hook(target.module) is not None:
            how = "quantized" if target.is_quantized else "offloaded"
            raise ValueError(
                f"The weight of module '{name}' is {how}, so no entries of it can be written. Use "
                "PeftModel.from_pretrained(), whose adapters run beside such a base."
            )
