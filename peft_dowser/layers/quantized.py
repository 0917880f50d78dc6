"""A quantized linear layer with sparse deltas: only a merge quantizes again."""

import copy
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._peft import QuantizationBackend
from ..base.storage import unpack
from ..base.target import Target
from ..delta.apply import add_delta_
from .layer import Linear
from .linear_op import Weight, in_autocast

# Libraries, as PEFT calls them, that dequantize a weight to multiply with it. The others compute with the integers, and
# some round the input too, so that a delta of zero would change the output.
_DEQUANTIZING = ("bnb 4bit", "hqq")


class QuantizedLinear(Linear):
    """A linear layer that bitsandbytes, torchao, HQQ or another library of PEFT's has quantized.

    Where the library multiplies with the dequantized weight, y = x (W + D)^T + b, with W dequantized for every use, as
    the library does. Elsewhere, and under `torch.compile`, y = base_layer(x) + x D^T.

    A merge computes W + D in floating point and quantizes the whole matrix again, so it rounds every weight of the
    matrix; unmerging puts the quantized original back, bit for bit.
    """

    @property
    def is_additive(self) -> bool:
        return super().is_additive or not self._dequantizes or torch.compiler.is_compiling()

    @property
    def merges_in_place(self) -> bool:
        return False

    def __init__(self, target: Target, sample: str | None = None) -> None:
        unpack(target.module)
        super().__init__(target, sample)
        self._backend = cast(QuantizationBackend, target.backend)
        self._dequantizes = self._backend.backend_name in _DEQUANTIZING
        # The base layer that a merge has replaced; a tuple hides it from torch, as it is not part of the model then.
        self._original: tuple[nn.Module, ...] = ()

    def _adapted(self, x: Tensor, active: list[str], *args: Any, **kwargs: Any) -> Tensor:
        output = super()._adapted(x, active, *args, **kwargs)
        return output if self.is_additive else output.to(x.dtype)  # as these libraries return it

    def _in_its_dtype(self, x: Tensor) -> Tensor:
        return in_autocast(x.to(getattr(self.get_base_layer(), "compute_dtype", None) or x.dtype))

    def _weight(self) -> Weight:
        base, backend = self.get_base_layer(), self._backend
        return lambda: backend.get_base_weight(base).detach()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base layer by one that holds W + D, quantized again; arguments as in `DowserLayer.merge`.

        Raises:
            ValueError: `safe_merge` found an infinite or undefined sum, or PEFT cannot quantize such a layer again;
                nothing has changed.
        """
        names = self._unmerged(adapter_names)
        if not names:
            return
        original = self._original[0] if self._original else self.get_base_layer()
        backend = self._backend
        if not backend.supports_merge:
            raise ValueError(
                f"Module '{self.module_name}' is quantized by {backend.backend_name}, into which PEFT cannot merge. "
                "Load the base in floating point and merge there; nothing was merged."
            )
        before = backend.get_base_weight(original).detach()
        total = before.clone()
        merged = [name for name in self.merged_adapters if name in self.dowser_values]
        for name in (*merged, *names):
            add_delta_(total, *self.delta(name))
        if safe_merge and not bool(torch.isfinite(total).all()):
            raise ValueError(
                f"Adapters {names}: merging would write values that are not finite into module '{self.module_name}'. "
                "The adapter is broken; nothing was merged into this module."
            )
        warnings.warn(
            f"Merging into a base quantized by {backend.backend_name} rounds every weight of the adapted matrices "
            "again, so outputs change a little. To merge exactly, load the base in floating point.",
            stacklevel=2,
        )
        previous = self.base_layer
        self.base_layer = _copied(original)
        try:
            backend.set_base_weight(self, total)
            unpack(self.base_layer)
            after = backend.get_base_weight(self.get_base_layer()).detach()
        except BaseException:
            self.base_layer = previous
            raise
        self._original = (original,)
        for name in names:
            at, values = self.delta(name)
            unchanged = before.view(-1).index_select(0, at) == after.view(-1).index_select(0, at)
            self.vanished[name] = (int((unchanged & (values != 0)).sum()), values.numel())
            self.not_finite[name] = int((~torch.isfinite(total.view(-1).index_select(0, at))).sum())
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the quantized original back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._original:
            self.base_layer = self._original[0]
        self._original = ()
        self.merged_adapters.clear()
        self.vanished.clear()
        self.not_finite.clear()


def _copied(module: nn.Module) -> nn.Module:
    """A module with the same tensors, of which each can be replaced without changing the other module."""
    copied = module.__new__(type(module))
    copied.__dict__ = dict(module.__dict__)
    # Of its own: PEFT writes into the attributes of a 4-bit weight that it replaces.
    copied._parameters = {
        name: copy.copy(weight) if hasattr(weight, "bnb_quantized") else weight
        for name, weight in module._parameters.items()
    }
    copied._buffers = dict(module._buffers)
    if hasattr(module, "state"):  # bitsandbytes keeps the statistics of 8-bit weights there
        copied.state = copy.copy(module.state)
    return copied
