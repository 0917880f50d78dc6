"""The guard: a model stays as it was until the whole of a saved adapter is in it, and nothing else.

PEFT shows a tuner the file before it loads a tensor, see `gate.py`. transformers' `load_adapter` does not: it puts
every tensor whose name the model has in its place, the base's own weights too, and then calls `eval()`, or nothing if
the adapter is to be trained further. So the guard looks at the model when that is called, or else at the first use of
the adapter, and takes back what was done.
"""

import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ._peft import AuxiliaryTrainingWrapper, adapters_of
from ._transformers import without_adapters
from .codec import DeltaFormatError
from .config import DowserConfig
from .experts import FusedParameter
from .gate import adapted, check_loaded
from .layer import DowserLayer
from .tied import Tied
from .whole import check_whole_tensors


class Guard:
    """What a model was before an adapter came.

    As a context manager it restores the model when a `DeltaFormatError` passes.
    """

    def __init__(self, model: nn.Module, adapter_name: str, config: DowserConfig) -> None:
        self._model = model
        self._adapter_name = adapter_name
        self._config = config
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        # References: no memory, unless a tensor is replaced.
        self._tensors = [
            (module, name, tensor)
            for module in model.modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None
        ]

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DeltaFormatError):
            self.restore()

    def settle(self) -> None:
        """Release the adapter, if all of it and nothing else was loaded; do nothing where nothing was.

        Raises:
            DeltaFormatError: tensors are missing, or others than those of the adapter were replaced. The model is
                restored.
        """
        with self:
            is_loaded = check_loaded(self._model, self._adapter_name)
            names = {module: name for name, module in self._model.named_modules()}
            replaced = [f"{names[module]}.{name}" for module, name, _ in self._replaced() if module in names]
            check_whole_tensors(
                self._model, self._adapter_name, self._config, replaced, f"Adapter '{self._adapter_name}'"
            )
        if is_loaded:
            for _, layer in adapted(self._model, self._adapter_name):
                layer.release(self._adapter_name)

    def restore(self) -> None:
        """Take the adapter out of the model, and put back what was replaced."""
        for module, name, tensor in list(self._replaced()):
            setattr(module, name, tensor)
        remove(self._model, self._adapter_name)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
        _forget(self._model, self._adapter_name)

    def _replaced(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """The tensors in whose place there are others, with other content, but neither cast, moved nor sharded."""
        for module, name, before in self._tensors:
            now = module._parameters.get(name, module._buffers.get(name))
            if now is None or now is before or isinstance(now, DTensor) or before.is_meta:
                continue
            same_kind = (now.shape, now.dtype, now.device) == (before.shape, before.dtype, before.device)
            if same_kind and not torch.equal(now, before):
                yield module, name, before


def remove(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of the model; a layer without any other gives its place back to the base layer."""
    for name, layer in adapted(model, adapter_name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT announces the next active adapter
            layer.delete_adapter(adapter_name)
        if not layer.dowser_values:
            _unwrap(model, name, layer)
    _unwrap_whole_modules(model, adapter_name)


def _unwrap(model: nn.Module, name: str, layer: DowserLayer) -> None:
    """Put the base layer back in the place of a layer without adapters."""
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(layer, FusedParameter):
        delattr(parent, child)
        if any(isinstance(other, FusedParameter) for other in parent.children()):
            return
        path, _, child = path.rpartition(".")
        parent = model.get_submodule(path)
    setattr(parent, child, layer.get_base_layer())
    for name, module in list(model.named_modules()):
        if isinstance(module, Tied) and module.layer is layer:
            path, _, child = name.rpartition(".")
            setattr(model.get_submodule(path), child, module.base_layer)


def _unwrap_whole_modules(model: nn.Module, adapter_name: str) -> None:
    """Take away what PEFT has put around modules of which an adapter trains all weights, or some tokens."""
    for name, wrapper in list(model.named_modules()):
        if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in adapters_of(wrapper):
            wrapper.delete_adapter(adapter_name, [other for other in wrapper.active_adapters if other != adapter_name])
            if not adapters_of(wrapper):
                path, _, child = name.rpartition(".")
                setattr(model.get_submodule(path), child, wrapper.original_module)


def _forget(model: Any, adapter_name: str) -> None:
    """Take the name of an adapter off the model; without any other, it is no model of PEFT's any more."""
    if hasattr(model, "peft_config"):
        model.peft_config.pop(adapter_name, None)
        if not model.peft_config:
            del model.peft_config
            without_adapters(model)
