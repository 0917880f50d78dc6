"""A target: one weight of the base model of which an adapter trains a part, however the base stores it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import Conv1D

from .._transformers import stores_transposed
from ..delta.format import base_sample
from .distributed import gathered, shape_of
from .storage import backend_of, device_of, onloaded


def is_plain(module: nn.Module) -> bool:
    """Whether the class of a module computes torch's linear layer or transformers' Conv1D, and has no other forward."""
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True)
class Target:
    """One weight of the base model: a matrix, or the matrices of all experts in one fused parameter.

    Attributes:
        name: what files and messages call it: the path of its module, or of the fused parameter.
        module: the base layer that holds it.
        parameter: its name in that module.
        expert: the number of the matrix in a fused parameter; None for the whole.
        tied: other modules that use the same weight, and with it the same delta.
    """

    name: str
    module: nn.Module
    parameter: str = "weight"
    expert: int | None = None
    tied: tuple["Target", ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored: `(out, in)`, or `(in, out)` if `transposed`, after the number of experts if fused.

        Of a quantized weight, the shape of what it stands for.
        """
        if self.is_quantized:
            return int(self.module.out_features), int(self.module.in_features)  # type: ignore[arg-type]
        shape = shape_of(self._whole)
        return shape if self.expert is None else shape[1:]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def device(self) -> torch.device:
        """Where the base layer computes."""
        return device_of(self.module)

    @property
    def is_quantized(self) -> bool:
        return backend_of(self.module) is not None

    @property
    def features(self) -> tuple[int, int]:
        """Output and input features of one matrix."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def transposed(self) -> bool:
        """Whether a matrix is stored as `(in, out)`: y = h W."""
        if self.is_fused or self.expert is not None:
            return stores_transposed(self.module)
        return isinstance(self.module, Conv1D | nn.Embedding)  # an embedding multiplies one-hot h

    @property
    def is_fused(self) -> bool:
        """Whether this holds several matrices, one per expert."""
        return len(self.shape) == 3

    @property
    def uses_per_token(self) -> int:
        """How many of its matrices a token is multiplied with; all experts, where the model does not say."""
        if not self.is_fused:
            return 1
        return getattr(getattr(self.module, "config", None), "num_experts_per_tok", None) or self.shape[0]

    @property
    def tensor_name(self) -> str:
        """Its name among the tensors of the base model."""
        return self.name if self.is_fused else f"{self.name}.weight"

    @property
    def whole_name(self) -> str:
        """Its name; of the matrix of an expert, that of the fused parameter."""
        return self.name if self.expert is None else self.name.removesuffix(f"[{self.expert}]")

    @property
    def uses(self) -> tuple["Target", ...]:
        """The modules that multiply with it: this one, and those that are tied to it."""
        return (self, *self.tied)

    def matrices(self) -> list["Target"]:
        """The matrices that are ranked one by one: this one, or those of the experts."""
        if not self.is_fused:
            return [self]
        return [replace(self, name=f"{self.name}[{expert}]", expert=expert) for expert in range(self.shape[0])]

    def read(self) -> Tensor:
        """The weight in a floating-point dtype, as stored; must not be written.

        Note: of a quantized, offloaded or sharded weight this is a temporary of its full size; of a sharded one all
        ranks must read it.
        """
        with onloaded(self.module):
            backend = backend_of(self.module)
            weight = (gathered(self._whole) if backend is None else backend.get_base_weight(self.module)).detach()
        return weight if self.expert is None else weight[self.expert]

    def sample(self) -> str | None:
        """`delta.format.base_sample` of the weight; None of a quantized one, whose entries are in no checkpoint."""
        return None if self.is_quantized else base_sample(self.read())

    @property
    def _whole(self) -> nn.Parameter:
        return getattr(self.module, self.parameter)
