"""The state of a model before an adapter is added, and how it is restored."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .._peft import AuxiliaryTrainingWrapper, adapters_of
from .._transformers import without_adapters
from ..layers.layer import DowserLayer


class Snapshot:
    """The state of a model before an adapter is added: references, which take no memory unless a tensor is replaced."""

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model = model
        self.adapter_name = adapter_name
        self._state = [
            (module, dict(module._modules), dict(module._parameters), dict(module._buffers))
            for module in model.modules()
        ]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def replaced(self) -> Iterator[str]:
        """The names of the tensors that were replaced by others with other content."""
        names = {module: name for name, module in self.model.named_modules()}
        for module, _, parameters, buffers in self._state:
            for name, before in (parameters | buffers).items():
                now = module._parameters.get(name, module._buffers.get(name))
                if module in names and now is not None and before is not None and differ(before, now):
                    yield f"{names[module]}.{name}"

    def restore(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT announces the next active adapter
            for module, *_ in self._state:
                _delete(module, self.adapter_name)
        for module, *before in self._state:
            for now, then in zip((module._modules, module._parameters, module._buffers), before, strict=True):
                now.clear()
                now.update(then)  # type: ignore[arg-type]
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
        _forget(self.model, self.adapter_name)


def differ(before: Tensor, now: Tensor) -> bool:
    """Whether two tensors differ in content; False where one is on disk or sharded, and cannot be compared."""
    if now is before or before.is_meta or isinstance(before, DTensor) or isinstance(now, DTensor):
        return False
    return now.dtype != before.dtype or not torch.equal(now.to(before.device), before)


def _delete(module: nn.Module, adapter_name: str) -> None:
    """Take an adapter out of a module that other adapters have changed before: a layer, or one trained as a whole."""
    if isinstance(module, DowserLayer) and adapter_name in module.dowser_values:
        with contextlib.suppress(KeyError):  # it was added in part
            module.delete_adapter(adapter_name)
    elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in adapters_of(module):
        module.delete_adapter(adapter_name, [other for other in module.active_adapters if other != adapter_name])


def _forget(model: Any, adapter_name: str) -> None:
    """Remove the adapter's config from the model, and PEFT's marks with it if no adapter is left."""
    if hasattr(model, "peft_config"):
        model.peft_config.pop(adapter_name, None)
        if not model.peft_config:
            del model.peft_config
            without_adapters(model)
