"""The merge that lasts as long as a `generate`, shared by all calls that run at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from . import writing
from .layer import dowser_layers
from .notices import report_not_finite
from .spread import is_spread

# By model, the calls that its merge is for. Not an attribute: a copy of the model is used by none of them.
_calls: WeakKeyDictionary[nn.Module, set[object]] = WeakKeyDictionary()


@contextmanager
def briefly_merged(model: nn.Module) -> Iterator[None]:
    """Merge the active adapters for a while, bit for bit without a trace.

    The first of several threads to come merges, the last one to go unmerges. Nothing happens to a model whose adapters
    are merged or disabled already, or whose weights are spread over ranks.

    Args:
        model: model with `DowserLayer`s; those whose merge does not write in place stay unmerged.
    """
    layers = [] if is_spread(model) else [layer for layer in dowser_layers(model) if layer.merges_in_place]

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
