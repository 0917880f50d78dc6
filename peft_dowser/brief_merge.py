"""The merge that lasts as long as a `generate`, shared by all calls that run at the same time."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from .layer import DowserLayer, dowser_layers
from .spread import is_spread

# Held while weights are written; not while tokens are generated.
_writing = threading.RLock()
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
    with _writing:
        calls = _calls.setdefault(model, set())
        is_ours = bool(calls) or not any(layer.merged or layer.disable_adapters for layer in layers)
    if not is_ours:
        yield
        return
    call = object()
    try:
        with _writing:
            if not calls:
                for layer in layers:
                    layer.merge_briefly()
            calls.add(call)
        yield
    finally:
        with _writing:
            calls.discard(call)
            if not calls:
                _unmerge(layers)


def _unmerge(layers: Sequence[DowserLayer]) -> None:
    """Unmerge all layers, also where a Ctrl-C comes in between."""
    try:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
    except (KeyboardInterrupt, SystemExit):  # what a signal raises; an error would come again, and again
        _unmerge([layer for layer in layers if layer.merged])
        raise
