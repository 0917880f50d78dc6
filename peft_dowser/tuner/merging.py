"""Merging all layers of a model: the checks before it, and the merge that lasts as long as a `generate`."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..base.distributed import is_sharded_model
from ..delta.format import few
from ..layers.layer import DowserLayer, dowser_layers
from . import writing

# By model, the calls that its merge is for. Not an attribute: none of them uses a copy of the model.
_calls: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


def prepare_merge(model: nn.Module, known: Collection[str], adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Refuse a merge that cannot be done in all layers; every layer stays as it is.

    An adapter that is not `known` is refused, which PEFT would leave out without a word, and with `safe_merge` a sum
    that is not finite. Some adapters may be merged already; None names the active ones.
    """
    names = () if isinstance(adapter_names, str) else adapter_names or ()  # PEFT refuses a string
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"Cannot merge unknown adapters {unknown}; the model has {sorted(known)}.")
    for layer in dowser_layers(model) if safe_merge else []:
        merged = len(layer.merged_adapters)
        if merged and not layer.merges_in_place:
            continue  # the layer itself refuses, and stays as it is
        try:
            layer.merge(safe_merge=True, adapter_names=adapter_names)
        finally:
            if layer.merged and not merged:
                layer.unmerge()
            while len(layer.merged_adapters) > merged:
                layer.unmerge_last()


def check_unmerged(layers: Iterable[BaseTunerLayer], before: str) -> None:
    """Refuse what needs the weights of the base while adapters are merged into them."""
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise ValueError(f"Adapters {merged} are merged into the base model. Call unmerge_adapter() before {before}.")


def check_replaceable(layers: Iterable[DowserLayer], adapter_name: str) -> None:
    """Refuse to replace a merged adapter: its positions say where to put back what the merge overwrote."""
    check_unmerged([layer for layer in layers if adapter_name in layer.merged_adapters], f"replacing '{adapter_name}'")


def note_merged_everywhere(model: nn.Module) -> None:
    """Note an adapter that is merged in some layers in all layers, so that no other active adapter runs in the rest."""
    layers = dowser_layers(model)
    merged = dict.fromkeys(name for layer in layers for name in layer.merged_adapters)
    for layer in layers:
        here = {*layer.merged_adapters, *layer.dowser_values}
        layer.merged_adapters += [name for name in merged if name not in here]


def unmerge_everywhere(model: nn.Module) -> None:
    """Unmerge all layers, also PEFT's own that hold the tokens that an adapter trains."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            layer.unmerge()


@contextmanager
def briefly_merged(model: nn.Module) -> Iterator[None]:
    """Merge the active adapters for a while; afterwards the weights are what they were, bit for bit.

    The first of several threads merges, the last unmerges. Nothing happens to a model whose adapters are merged or
    disabled already, or whose weights are spread over ranks; a layer whose merge does not write in place stays
    unmerged.
    """
    layers = [] if is_sharded_model(model) else [layer for layer in dowser_layers(model) if layer.merges_in_place]

    def unmerge() -> None:
        for layer in layers:
            if layer.merged:
                layer.unmerge()

    with writing.lock:
        calls = _calls.setdefault(model, set())
        is_ours = bool(calls) or not any(layer.merged or layer.disable_adapters for layer in layers)
    if not is_ours:
        yield
        return
    call = object()
    try:
        with writing.lock:
            if not calls:
                for layer in layers:
                    layer.merge_briefly()
            calls.add(call)
        report_not_finite([(layer.module_name, layer.not_finite) for layer in layers])
        yield
    finally:
        with writing.lock:
            calls.discard(call)
            if not calls:
                writing.to_the_end(unmerge)


def report_not_finite(found: Iterable[tuple[str, Mapping[str, int]]]) -> None:
    """Warn once where a merge has written values that are not finite: their numbers by adapter, with the name of the
    module.
    """
    counts = {module: sum(numbers.values()) for module, numbers in found if any(numbers.values())}
    if counts:
        warnings.warn(
            f"The merge has written {sum(counts.values())} values that are not finite into {len(counts)} modules: "
            f"{few(list(counts))}. The adapter is broken, or its values are too large for the dtype of the base. Load "
            "the base in bfloat16 or float32; with safe_merge=True such a merge is refused.",
            stacklevel=3,
        )
