"""A target: one weight of the base model of which an adapter trains a part, however the base stores it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import Conv1D

from .._peft import QuantizationBackend
from .._transformers import is_falcons, is_scaled_embedding, stores_transposed
from ..delta.format import base_sample
from ..delta.layout import Granularity, Layout
from .distributed import full_tensor, shape_of
from .storage import backend_of, device_of, onloaded

# What holds a weight. "fused" is the parameter with the matrices of all experts, "expert" one of these matrices. A
# further kind needs a line in `target_kind`, a layer in `layers.kinds` and a tap in `probing.taps`.
TargetKind: TypeAlias = Literal["linear", "conv1d", "embedding", "quantized", "fused", "expert"]

# The modules that can be targets, for messages.
TARGETABLE = (
    "torch.nn.Linear or transformers' Conv1D, with no other forward than theirs, or a torch.nn.Embedding that only "
    "looks up rows"
)

# The kinds that multiply their input with a matrix.
LINEAR: tuple[TargetKind, ...] = ("linear", "conv1d", "quantized")


def target_kind(module: nn.Module) -> TargetKind | None:
    """The kind of a module; None where calling it does something else than its weight and bias say."""
    if backend_of(module) is not None:
        return "quantized"
    if _is_lookup(module):
        return "embedding"
    forward = type(module).forward
    if forward is Conv1D.forward:
        return "conv1d"
    # A linear quantized by a library that PEFT does not know is accepted here; `search` raises a clear error for it.
    unknown = isinstance(module, nn.Linear) and is_narrow(module.weight)
    return "linear" if unknown or forward is nn.Linear.forward or is_falcons(module) else None


def is_narrow(weight: Tensor) -> bool:
    """Whether no delta can be added to a weight: it holds integers, or floats of eight bits."""
    return not weight.is_floating_point() or weight.element_size() < 2


def _is_lookup(module: nn.Module) -> bool:
    """Whether this is an embedding that gives the rows of its weight, perhaps times a scale, and does nothing else."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:  # the latter rewrites its weight
        return False
    return type(module).forward is nn.Embedding.forward or is_scaled_embedding(module)


@dataclass(frozen=True)
class Target:
    """One weight of the base model: a matrix, or the matrices of all experts in one fused parameter.

    All but the tensor itself is read once, by `target_of` or `fused_target`.

    Attributes:
        name: what files and messages call it: the path of its module, or of the fused parameter.
        module: the base layer that holds it. A quantized merge replaces the layer, but not this attribute.
        shape: shape as stored: `(out, in)`, or `(in, out)` if `transposed` (y = h W), after the number of experts if
            fused. Of a quantized weight, the shape of what it stands for.
        parameter: its name in the module.
        backend: PEFT's access to a quantized weight; None for other kinds.
        expert: the number of the matrix in a fused parameter; None for other kinds.
        tied: other modules that use the same weight, and with it the same delta.
    """

    name: str
    module: nn.Module
    kind: TargetKind
    shape: tuple[int, ...]
    transposed: bool = False
    parameter: str = "weight"
    backend: QuantizationBackend | None = None
    expert: int | None = None
    tied: tuple["Target", ...] = ()

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def features(self) -> tuple[int, int]:
        """Output and input features of one matrix."""
        rows, columns = self.shape[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def channel_dim(self) -> int | None:
        """The dimension of its input channels; None where it has none: the inputs of an embedding are tokens."""
        return int(not self.transposed) if self.kind in LINEAR else None

    def layout(self, granularity: Granularity) -> Layout:
        """What the positions of an adapter of this granularity mean in it."""
        return Layout(self.shape, self.channel_dim if granularity == "input_channel" else None)

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    @property
    def uses_per_token(self) -> int:
        """How many of its matrices a token is multiplied with; all experts, where the model does not say."""
        if self.kind != "fused":
            return 1
        return getattr(getattr(self.module, "config", None), "num_experts_per_tok", None) or self.shape[0]

    @property
    def tensor_name(self) -> str:
        """Its name among the tensors of the base model."""
        return self.name if self.kind == "fused" else f"{self.name}.{self.parameter}"

    @property
    def name_without_expert(self) -> str:
        """Its name; of the matrix of an expert, the name of the fused parameter."""
        return self.name if self.expert is None else self.name.removesuffix(f"[{self.expert}]")

    @property
    def uses(self) -> tuple["Target", ...]:
        """The modules that multiply with it: this one, and those that are tied to it."""
        return (self, *self.tied)

    def matrices(self) -> list["Target"]:
        """The matrices that are ranked one by one: this one, or one for each expert."""
        if self.kind != "fused":
            return [self]
        return [
            replace(self, name=f"{self.name}[{expert}]", kind="expert", shape=self.shape[1:], expert=expert)
            for expert in range(self.shape[0])
        ]

    @property
    def weight(self) -> nn.Parameter | None:
        """The parameter as the base stores it; None in HQQ's layers, which have none of this name."""
        return getattr(self.module, self.parameter, None)

    def read(self) -> Tensor:
        """The weight in a floating-point dtype, as stored; must not be written.

        Of a quantized, offloaded or sharded weight this is a temporary of its full size; all ranks must read a sharded
        one together.
        """
        with onloaded(self.module):
            if self.backend is None:
                weight = full_tensor(getattr(self.module, self.parameter)).detach()
            else:
                weight = self.backend.get_base_weight(self.module).detach()
        return weight if self.expert is None else weight[self.expert]

    def base_sample(self) -> str | None:
        """`delta.format.base_sample` of the weight; None of a quantized one, whose entries are in no checkpoint."""
        return None if self.kind == "quantized" else base_sample(self.read())


def target_of(name: str, module: nn.Module, requantize: Any = None) -> Target:
    """The weight of a module that has a kind; `requantize` as in `backend_of`."""
    layer, kind = cast(Any, module), cast(TargetKind, target_kind(module))
    if kind == "quantized":  # its parameters, if it has any, are packed
        shape = int(layer.out_features), int(layer.in_features)
        return Target(name, module, kind, shape, backend=backend_of(module, requantize))
    # An embedding multiplies one-hot inputs.
    return Target(name, module, kind, shape_of(layer.weight), transposed=kind in ("conv1d", "embedding"))


def fused_target(name: str, module: nn.Module, parameter: str) -> Target:
    """A fused parameter of an experts module, by its name in the base model and in the module."""
    shape = shape_of(getattr(module, parameter))
    return Target(name, module, "fused", shape, stores_transposed(module), parameter)


def layouts_of(targets: Mapping[str, Target], granularity: Granularity) -> dict[str, Layout]:
    """What the positions of an adapter of this granularity mean in each of its targets."""
    return {name: target.layout(granularity) for name, target in targets.items()}
