"""`Patch`: a saved adapter written into the weights of a plain model, and taken out again bit for bit."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor, nn

from . import writing
from .adapters import SavedAdapter, open_adapter
from .entries import checksum, merged_entries, write_entries_
from .layer import dowser_layers
from .postmerge import Delta
from .provenance import warn_of_other_base
from .storage import offload_hook
from .target import Target
from .targets import check_is_model


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

    Several patches may be applied to a model; the last one must be removed first. Where a Ctrl-C or an error leaves one
    half applied, `remove()` takes the rest of it out.
    """

    def __init__(self, model: nn.Module, adapter: str | Path) -> None:
        """Read a saved adapter and check it against a model, which stays as it is.

        Args:
            model: a model of transformers or any other, as the adapter's base.
            adapter: folder or Hub id of a saved Dowser adapter.

        Raises:
            TypeError: the model is not a module, but its name for example.
            ValueError: the adapter is damaged or does not fit the model (`DeltaFormatError`), trains more than sparse
                deltas, or the model is adapted, quantized or offloaded.
            OSError: there is no such adapter.
        """
        check_is_model(model)
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
        # By module, what is to be put back; and whether that is all that `apply` writes, not an interrupted rest of it.
        self._written: dict[str, _Written] = {}
        self._is_whole = False
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
        with writing.lock:
            if self._written:
                raise ValueError(f"Adapter '{self.name}' is applied already. Call remove() first.")
            sums = {}
            for name, target in self._targets.items():
                delta = self._deltas[name]
                entries = merged_entries(_weight(target), delta.positions, delta.values)
                entries.check_finite(self.name, name)
                sums[name] = entries
            try:
                self._written = {name: _Written(each.originals, checksum(each.sums)) for name, each in sums.items()}
                for name, entries in sums.items():
                    write_entries_(_weight(self._targets[name]), self._deltas[name].positions, entries.sums)
                self._is_whole = True
            except BaseException:
                writing.to_the_end(self._restore)
                raise

    def remove(self) -> None:
        """Put the replaced entries back: the weights are bit for bit what they were.

        Raises:
            ValueError: it is not applied, or entries that it wrote were changed since, be it by another patch or by
                training; no weight has changed.
        """
        with writing.lock:
            if not self._written:
                raise ValueError(f"Adapter '{self.name}' is not applied.")
            for name, written in self._written.items():
                found = _weight(self._targets[name]).view(-1).index_select(0, self._deltas[name].positions)
                is_cast = found.dtype != written.originals.dtype
                # Of what was interrupted some entries are the originals.
                if is_cast or (self._is_whole and checksum(found) != written.checksum):
                    raise ValueError(
                        f"Adapter '{self.name}': entries that it wrote into the weight of module '{name}' were changed "
                        "since. Remove the patch that was applied after it first; a model that was trained or cast "
                        "meanwhile has to be loaded again."
                    )
            writing.to_the_end(self._restore)

    def _restore(self) -> None:
        """Put back what is written still."""
        self._is_whole = False
        for name, written in list(self._written.items()):
            write_entries_(_weight(self._targets[name]), self._deltas[name].positions, written.originals)
            del self._written[name]

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
