"""Loading a saved adapter: whatever stops it, the model is what it was, and no mask is ever chosen.

PEFT and transformers put an adapter's modules into the model first and read its file afterwards, and neither takes the
modules out again when the read fails. So the three methods that load an adapter are wrapped. Only this module and
`_peft` change PEFT, and adapters of other PEFT methods load as they did before.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, cast

import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftModel
from peft.utils import PeftType, load_peft_weights
from torch import Tensor, nn

from .._peft import NAME
from .._transformers import PeftAdapterMixin
from ..config import DowserConfig
from ..delta.codec import DeltaFormatError, side_by_side
from ..delta.format import CODE, VALUES, quoted, with_adapter_name
from ..delta.layout import StoredDelta
from ..files.checks import check_keys, check_missing, check_names_in_file, read_delta
from ..layers.layer import DowserLayer, layers_with_adapter
from ..layers.state import Index, Values
from .merging import check_replaceable
from .snapshot import Snapshot
from .whole_tensors import check_replaced, saved_names


@dataclass
class Load:
    """A load that is under way.

    Attributes:
        counts: trained weights by module, from the saved config where the caller has given another.
        snapshots: what the model was before each adapter that was added since the load began.
        copies: tensors of the model that are about to be written, and what they were, on the CPU.
        deltas: likewise, values and index of an adapter that is about to be replaced, with its values, code, positions.
    """

    counts: Mapping[str, int] | None
    snapshots: list[Snapshot] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    deltas: list[tuple[Values, Index, list[Tensor]]] = field(default_factory=list)

    def back_up(self, tensors: Iterable[Tensor]) -> None:
        self.copies += [(tensor, _copied(tensor)) for tensor in tensors]

    def back_up_deltas(self, layers: Iterable[DowserLayer], adapter_name: str) -> None:
        """Copy the deltas of an adapter before they are replaced, unless it is new and goes as a whole."""
        if any(snapshot.adapter_name == adapter_name for snapshot in self.snapshots):
            return
        for layer in layers:
            index = layer.index(adapter_name)
            kept = [_copied(part) for part in (layer.values(adapter_name), index.code, index.decoded())]
            self.deltas.append((cast(Values, layer.dowser_values[adapter_name]), index, kept))

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, copy in self.copies:
                tensor.copy_(copy)
            for values, index, (before, code, positions) in self.deltas:
                values.replace(before)
                index.replace(code, positions)
        for snapshot in reversed(self.snapshots):
            snapshot.restore()


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


_CURRENT: ContextVar[Load | None] = ContextVar("load", default=None)


def current_load() -> Load | None:
    return _CURRENT.get()


def watch_loads() -> None:
    """Make the methods of PEFT and transformers that load an adapter undo what they did when they fail."""
    _replace(PeftModel, "from_pretrained", _from_pretrained)
    _replace(PeftModel, "load_adapter", _load_adapter)
    _replace(PeftAdapterMixin, "load_adapter", _load_adapter_of_transformers)


def _replace(owner: type, name: str, watched: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    method = vars(owner)[name]
    original = getattr(method, "__func__", method)
    original = getattr(original, "_unwatched", original)  # a reload of the package replaces ours
    wrapper: Any = wraps(original)(watched(original))
    wrapper._unwatched = original
    setattr(owner, name, classmethod(wrapper) if isinstance(method, classmethod) else wrapper)


@contextmanager
def _loading(counts: Mapping[str, int] | None = None) -> Iterator[Load]:
    """Undo a load that fails; a load inside another is a part of the other."""
    if (outer := _CURRENT.get()) is not None:
        yield outer
        return
    load = Load(counts)
    token = _CURRENT.set(load)
    try:
        yield load
    except BaseException:
        load.undo()
        raise
    finally:
        _CURRENT.reset(token)


def _from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(cls, *args, **kwargs).arguments
        with _loading(_saved_counts(given)):
            return original(cls, *args, **kwargs)

    return from_pretrained


def _saved_counts(given: Mapping[str, Any]) -> dict[str, int] | None:
    """Trained weights by module from the saved config, where the caller gives a config without them."""
    config = given.get("config")
    if not isinstance(config, DowserConfig) or config.nnz_pattern is not None:
        return None
    hub = {key: given["kwargs"][key] for key in ("revision", "cache_dir", "token") if key in given.get("kwargs", {})}
    subfolder = given.get("kwargs", {}).get("subfolder")
    saved = DowserConfig.from_pretrained(given["model_id"], subfolder=subfolder, **hub)
    return saved.nnz_pattern if isinstance(saved, DowserConfig) else None


def _load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with _loading():
            try:
                return original(self, model_id, adapter_name, *args, **kwargs)
            except KeyError as error:
                config = self.peft_config.get(adapter_name)
                if isinstance(config, DowserConfig) and error.args[0] in saved_names(self, adapter_name):
                    check_missing([error.args[0]], f"Adapter '{adapter_name}'")
                raise

    return load_adapter


def _load_adapter_of_transformers(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _loading() as load:
            try:
                report = original(self, *args, **kwargs)
            except RuntimeError as error:
                if not load.snapshots or "ignore_mismatched_sizes" not in str(error):
                    raise
                raise DeltaFormatError(
                    f"Adapter '{load.snapshots[0].adapter_name}': the file has tensors of other shapes than its config "
                    "says, which the report above names. It was edited, or belongs to another base model."
                ) from error
            for snapshot in load.snapshots:
                _check_end(snapshot, report, signature.bind(self, *args, **kwargs).arguments)
            return report

    return load_adapter


def _check_end(snapshot: Snapshot, report: Any, given: Mapping[str, Any]) -> None:
    """Refuse what transformers has loaded, unless it is the whole of an adapter and nothing else.

    transformers shows the file to nobody, replaces every tensor of the model whose name is in the file, and casts to
    any dtype. `report` is what it says of the load, and `given` are the arguments of `load_adapter`.
    """
    model, name = snapshot.model, snapshot.adapter_name
    check_loaded(model, name)
    config = cast(DowserConfig, model.peft_config[name])  # type: ignore[index]
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType[NAME]]
    tuner._remap_adapter_state_dict_for_load(model, config, name, dict(_tensors(given)))  # checks them
    check_replaced(model, name, list(snapshot.replaced()))
    check_missing(sorted(set(report.missing_keys) & set(saved_names(model, name).values())), f"Adapter '{name}'")


def _tensors(given: Mapping[str, Any]) -> Mapping[str, Tensor]:
    if given.get("adapter_state_dict") is not None:
        return given["adapter_state_dict"]
    config = given.get("load_config")
    options = getattr(config, "download_kwargs", {}) | (given.get("adapter_kwargs") or {}) | given.get("kwargs", {})
    known = {key: options[key] for key in ("subfolder", "revision", "cache_dir", "token") if options.get(key)}
    name = given.get("peft_model_id") or getattr(config, "pretrained_model_name_or_path", None)
    return load_peft_weights(str(name), device="cpu", **known)


def read_file(
    layers: Mapping[str, DowserLayer],
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    names: Collection[str],
) -> list[StoredDelta]:
    """Have every Dowser tensor of a saved adapter judged for the layers that it is loaded into, with their names in the
    model.

    `state_dict` has its tensors, as the model calls them, and `names` are their names in the file. Returns the deltas
    in the order of the layers, their values in the dtypes of the layers.
    """
    check_replaceable(layers.values(), adapter_name)
    where = f"Adapter '{adapter_name}'"
    values, code = with_adapter_name(VALUES, adapter_name), with_adapter_name(CODE, adapter_name)
    expected = [name + part for name in layers for part in (values, code)]
    check_keys(expected, state_dict, where)
    check_names_in_file(names, expected, where)

    def read(name: str) -> StoredDelta:
        layer = layers[name]
        index, dtype = layer.index(adapter_name), layer.values(adapter_name).dtype
        place = f"{where}, module {quoted(layer.module_name)}"
        tensors = state_dict[name + values], state_dict[name + code]
        return read_delta(*tensors, index.layout, index.nnz, index.digest, place, dtype)

    # On a GPU all threads would share it, and each would take memory of its own there.
    on_cpu = all(tensor.is_cpu for tensor in state_dict.values())
    return side_by_side(read, list(layers)) if on_cpu else list(map(read, layers))


def set_positions(
    layers: Mapping[str, DowserLayer],
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    deltas: Sequence[StoredDelta],
) -> dict[str, Tensor]:
    """Give the layers the positions in the deltas of `read_file`, so that nothing decodes them again.

    Returns the tensors of the deltas that are to be loaded, by their names in `state_dict`.
    """
    tensors = {}
    for (name, layer), delta in zip(layers.items(), deltas, strict=True):
        code = name + with_adapter_name(CODE, adapter_name)
        layer.index(adapter_name).replace(state_dict[code], delta.positions)
        tensors |= {name + with_adapter_name(VALUES, adapter_name): delta.values, code: state_dict[code]}
    return tensors


def check_loaded(model: nn.Module, adapter_name: str) -> None:
    loaded = {}
    for name, layer in layers_with_adapter(model, adapter_name).items():
        loaded[name + VALUES] = not cast(Values, layer.dowser_values[adapter_name]).awaited
        loaded[name + CODE] = layer.index(adapter_name).positions is not None
    check_keys(loaded, [key for key, is_there in loaded.items() if is_there], f"Adapter '{adapter_name}'")
