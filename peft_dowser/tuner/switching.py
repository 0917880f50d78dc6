"""Switching adapters: replace one in use by a saved one (`hotswap`), or write one into a plain model (`Patch`)."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from torch import Tensor, nn

from ..base.search import check_is_model
from ..base.storage import offload_hook
from ..base.target import Target
from ..config import AdapterRecord, DowserConfig
from ..delta.apply import Delta, Overwritten, merged_entries
from ..delta.format import few, quoted
from ..files.adapter import SavedAdapter, open_adapter
from ..files.checks import warn_of_other_base
from ..layers.layer import DowserLayer, dowser_layers, layers_with_adapter
from . import writing
from .merging import check_replaceable


def hotswap(model: nn.Module, adapter: str | Path, adapter_name: str = "default") -> None:
    """Replace an adapter of a model by a saved one for the same modules, in place.

    Where the numbers of values agree, as they do at one `update_ratio`, every tensor keeps its memory, so a model that
    `torch.compile` has compiled is not compiled again. An optimizer keeps what it knows of the old values.

    Args:
        model: model with Dowser adapters.
        adapter: folder or Hub id of the saved adapter.
        adapter_name: the adapter to replace.

    Raises:
        TypeError: the model is not a module, but its name for example.
        ValueError: the model has no such adapter, it is merged, one of the two trains more than sparse deltas, or the
            saved one is damaged or for other modules (`DeltaFormatError`). The model is unchanged.
        OSError: there is no such saved adapter.
    """
    check_is_model(model)
    layers = {layer.module_name: layer for layer in layers_with_adapter(model, adapter_name).values()}
    with ExitStack() as files:
        saved = open_adapter(str(adapter), files)
        _check(model, layers, saved, adapter_name)
        saved.check_fits({name: layer.target for name, layer in layers.items()})
        codes = {name: saved.code(name) for name in layers}
        layouts = {name: layer.index(adapter_name).layout for name, layer in layers.items()}
        deltas = {name: saved.stored(name, layout, codes[name]) for name, layout in layouts.items()}
    if saved.config.manifest is not None:
        samples = {name: layer.base_sample for name, layer in layers.items()}
        warn_of_other_base(saved.config.manifest, samples, f"Adapter '{saved.name}'")
    config = saved.config
    config.nnz_pattern, config.record = saved.counts, AdapterRecord(in_use=True, counts=saved.counts)
    config.inference_mode = model.peft_config[adapter_name].inference_mode  # type: ignore[index, union-attr]

    def replace() -> None:
        for name, layer in layers.items():
            layer.replace_delta(adapter_name, deltas[name], codes[name])
        model.peft_config[adapter_name] = config  # type: ignore[index, operator]

    with writing.lock:
        check_replaceable(layers.values(), adapter_name)  # a `generate` may have merged it meanwhile
        writing.to_the_end(replace)


def _check(model: nn.Module, layers: dict[str, DowserLayer], saved: SavedAdapter, adapter_name: str) -> None:
    if not layers:
        raise ValueError(f"The model has no Dowser adapter '{adapter_name}' to replace. Load one with load_adapter().")
    check_replaceable(layers.values(), adapter_name)
    known = cast(DowserConfig, model.peft_config[adapter_name])  # type: ignore[index]
    if known.granularity != saved.config.granularity:
        raise ValueError(
            f"Adapter '{saved.name}' has granularity='{saved.config.granularity}', adapter '{adapter_name}' "
            f"'{known.granularity}', so their tensors differ. Use load_adapter() and delete_adapter()."
        )
    for name, config in ((adapter_name, known), (saved.name, saved.config)):
        if also := config.also_trains:
            raise ValueError(
                f"Adapter '{name}' also trains {also}, which hotswap does not replace. Use load_adapter() and "
                "delete_adapter()."
            )
    _check_sparse(saved, "hotswap does not replace. Use load_adapter() and delete_adapter()")
    if different := sorted(layers.keys() ^ saved.counts.keys()):
        raise ValueError(
            f"Adapter '{saved.name}' is not for the modules of adapter '{adapter_name}'; {len(different)} differ: "
            f"{few(different)}. Use load_adapter() and delete_adapter()."
        )


def _check_sparse(saved: SavedAdapter, refusal: str) -> None:
    """Refuse an adapter that is more than sparse deltas; `refusal` says who does, and what to do instead."""
    if saved.whole_tensors:
        raise ValueError(
            f"Adapter '{saved.name}' also changes {len(saved.whole_tensors)} whole tensors, such as "
            f"{quoted(next(iter(saved.whole_tensors)))}, which {refusal}."
        )


class Patch:
    """A saved adapter for a model without PEFT's layers: for switching between many adapters of one base.

    Applying costs nnz writes and keeps the nnz entries that they replace; the model runs at the speed of the base, and
    its outputs are bit for bit those of the merged model.

        french = Patch(model, "adapters/french")
        with french:
            model.generate(...)

    Several patches may be applied to a model; the last one must be removed first. Where Ctrl-C or an error leaves it
    half applied, `remove()` takes out what was written.
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
            _check_sparse(saved, "a patch does not. Use PeftModel.from_pretrained()")
            self._targets = saved.targets_in(model)
            _check_writable(self._targets)
            self._deltas = {}
            for name, target in self._targets.items():
                delta = saved.delta(name, target.layout(saved.config.granularity))
                self._deltas[name] = Delta(*(part.to(target.device) for part in delta))
        # What is to be put back, by module, and whether `apply` has written all of it and was not interrupted.
        self._overwritten: dict[str, Overwritten] = {}
        self._is_complete = False
        self.name = saved.name
        if saved.config.manifest is not None:
            samples = {name: target.base_sample() for name, target in self._targets.items()}
            warn_of_other_base(saved.config.manifest, samples, f"Adapter '{self.name}'")

    def __repr__(self) -> str:
        return f"Patch({self.name!r}, {len(self._targets)} modules, {'' if self._overwritten else 'not '}applied)"

    def apply(self) -> None:
        """Write W + D into the weights.

        Raises:
            ValueError: it is applied already, or a sum would not be finite; no weight has changed.
        """
        with writing.lock:
            if self._overwritten:
                raise ValueError(f"Adapter '{self.name}' is applied already. Call remove() first.")
            sums = {}
            for name, target in self._targets.items():
                entries = merged_entries(_weight(target), self._deltas[name])
                entries.check_finite(self.name, name)
                sums[name] = entries
            try:
                self._overwritten = {name: entries.overwritten() for name, entries in sums.items()}
                for name, entries in sums.items():
                    entries.write(_weight(self._targets[name]))
                self._is_complete = True
            except BaseException:
                writing.to_the_end(self._restore)
                raise

    def remove(self) -> None:
        """Put the replaced entries back: the weights are bit for bit what they were.

        Raises:
            ValueError: it is not applied, or another patch or training has changed entries that it wrote; no weight has
                changed.
        """
        with writing.lock:
            if not self._overwritten:
                raise ValueError(f"Adapter '{self.name}' is not applied.")
            for name, written in self._overwritten.items():
                weight = _weight(self._targets[name])
                is_cast = weight.dtype != written.originals.dtype
                # Where a write was interrupted, some entries are the originals.
                if is_cast or (self._is_complete and written.was_changed(weight)):
                    raise ValueError(
                        f"Adapter '{self.name}': entries that it wrote into the weight of module '{name}' were changed "
                        "since. Remove the patch that was applied after it first; a model that was trained or cast "
                        "meanwhile has to be loaded again."
                    )
            writing.to_the_end(self._restore)

    def _restore(self) -> None:
        """Put back what was written; called again after an interruption, the rest."""
        self._is_complete = False
        for name, written in list(self._overwritten.items()):
            written.undo(_weight(self._targets[name]))
            del self._overwritten[name]

    def __enter__(self) -> "Patch":
        self.apply()
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _weight(target: Target) -> Tensor:
    return cast(Tensor, target.weight).data


def _check_writable(targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if target.kind == "quantized" or offload_hook(target.module) is not None:
            how = "quantized" if target.kind == "quantized" else "offloaded"
            raise ValueError(
                f"The weight of module '{name}' is {how}, so no entries of it can be written. Use "
                "PeftModel.from_pretrained(), whose adapters run next to such a base."
            )
