"""Stand-ins for the fused parameters of an experts module: they catch every product with the matrices of experts.

An experts module keeps the matrices of all its experts in one Parameter, shape `(experts, ., .)`, so there is no linear
layer per expert to wrap. While the module's own forward runs, a stand-in takes the place of the parameter and hands
each product to a function. The forward stays the module's own, whichever implementation transformers chooses for it (a
loop over experts, batched or grouped products): the merged model runs just that, and products computed in another way
would differ from it in the last bits. A stand-in is not a tensor, so a use that it cannot follow is an error, never a
silent use of the bare weight.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MATMUL = {torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
_BATCHED = {torch.bmm, Tensor.bmm}

# Where to find each. Which of them exist depends on the version of torch; the last is an op of transformers.
_GROUPED: dict[str, Any] = {"grouped_mm": F, "_grouped_mm": torch, "grouped_mm_fallback": torch.ops.transformers}

# What a forward may ask of a parameter besides products.
_METADATA = {"shape", "dtype", "device", "is_cuda", "ndim", "dim", "size", "data_ptr"}


@dataclass(frozen=True)
class Product:
    """Rows times the matrices of experts, as a forward asks for it.

    Attributes:
        x: the rows, shape `(rows, in)`.
        function: what computes it: "linear" for one expert; "rows_bmm" or "bmm_columns", which take each row as a
            matrix of one row or of one column and have a matrix for each; or a grouped product by its name.
        transposed: y = x W where True, y = x W^T where False.
        out: features of the result.
        expert: the expert of all rows; None where they go to several.
        experts: the expert of each row, shape `(rows,)`, where they come in any order; otherwise None.
        ends: where the rows of each expert end, shape `(experts,)`, where they are sorted by expert; otherwise None.
    """

    x: Tensor
    function: str
    transposed: bool
    out: int
    expert: int | None = None
    experts: Tensor | None = None
    ends: Tensor | None = None

    def compute(self, weight: Tensor) -> Tensor:
        """The result, of `shape`, of all matrices `(experts, ., .)`; where `expert` is set, of the matrix of this
        one.
        """
        if self.function == "linear":
            return self.x @ weight if self.transposed else F.linear(self.x, weight)
        if self.function == "rows_bmm":
            matrices = weight[self.experts]
            return torch.bmm(self.x.unsqueeze(1), matrices if self.transposed else matrices.mT)
        if self.function == "bmm_columns":
            matrices = weight[self.experts]
            return torch.bmm(matrices.mT if self.transposed else matrices, self.x.unsqueeze(2))
        return self._grouped(self.x, weight if self.transposed else weight.mT)

    def input_grad(self, grad: Tensor, weight: Tensor) -> Tensor:
        """The gradient of `x`, where `has_grouped_grads`.

        Args:
            grad: the gradient of the result, contiguous.
            weight: as in `compute`.
        """
        return self._grouped(grad, weight.mT if self.transposed else weight)

    def weight_grad(self, grad: Tensor) -> Tensor:
        """The gradient of the weight, of its shape, where `has_grouped_grads`; 0 of experts without rows."""
        rows, columns = (self.x, grad) if self.transposed else (grad, self.x)
        return self._grouped(rows.mT, columns)

    def _grouped(self, left: Tensor, right: Tensor) -> Tensor:
        return getattr(_GROUPED[self.function], self.function)(left, right, offs=self.ends)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result: `(rows, out)`, perhaps with a dimension of 1."""
        shapes = {"rows_bmm": (len(self.x), 1, self.out), "bmm_columns": (len(self.x), self.out, 1)}
        return shapes.get(self.function, (len(self.x), self.out))

    @property
    def is_grouped(self) -> bool:
        """Whether it is a grouped product, which autocast leaves alone."""
        return self.function in _GROUPED

    @property
    def has_grouped_grads(self) -> bool:
        """Whether its gradients are grouped products too; transformers' own has a loop."""
        return self.is_grouped and self.function != "grouped_mm_fallback"

    def expert_of_row(self) -> Tensor:
        """The expert of each row, shape `(rows,)`, int64."""
        if self.experts is not None:
            return self.experts
        numbers = torch.arange(len(self.x), device=self.x.device)
        if self.ends is not None:
            return torch.bucketize(numbers, self.ends.long(), right=True)
        return torch.full_like(numbers, cast(int, self.expert))

    def rows_by_expert(self) -> Iterator[tuple[int, slice | Tensor]]:
        """Each expert that has rows, and its rows."""
        if self.expert is not None:
            yield self.expert, slice(None)
        elif self.ends is not None:
            ends = self.ends.tolist()
            for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                if begin < end:
                    yield expert, slice(begin, end)
        elif self.experts is not None:
            counts = self.experts.bincount().tolist()
            for expert, rows in enumerate(self.experts.argsort(stable=True).split(counts)):
                if counts[expert]:
                    yield expert, rows


Multiply = Callable[[Product], Tensor]


class _StandIn:
    """Stands for a fused parameter, or for the matrices of some experts, perhaps transposed."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        multiply: Multiply,
        chosen: int | Tensor | None = None,
        flipped: bool = False,
    ) -> None:
        self._module, self._name, self._multiply = module, name, multiply
        self._chosen, self._flipped = chosen, flipped

    def __getitem__(self, experts: Any) -> "_StandIn":
        number = isinstance(experts, int) or (isinstance(experts, Tensor) and experts.dim() == 0)
        if self._chosen is not None or self._flipped or not (number or isinstance(experts, Tensor)):
            raise NotImplementedError(self._problem("a part of it"))
        return _StandIn(self._module, self._name, self._multiply, int(experts) if number else experts)

    def transpose(self, first: int, second: int) -> "_StandIn":
        dims = self._dense().dim()
        if {first % dims, second % dims} != {dims - 2, dims - 1}:
            raise NotImplementedError(self._problem("a transposition of its experts"))
        return _StandIn(self._module, self._name, self._multiply, self._chosen, not self._flipped)

    @property
    def mT(self) -> "_StandIn":
        return self.transpose(-2, -1)

    @property
    def T(self) -> "_StandIn":
        return self.transpose(0, 1)

    def __getattr__(self, name: str) -> Any:
        if name not in _METADATA:
            raise AttributeError(self._problem(f"its attribute '{name}'"))
        return getattr(self._dense(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Tensor:
        kwargs = kwargs or {}
        stand_in = next(value for value in (*args, *kwargs.values()) if isinstance(value, cls))
        return stand_in._multiply(stand_in._product(func, args, kwargs))

    def _product(self, func: Callable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product:
        x_first = bool(args) and isinstance(args[0], Tensor)
        if isinstance(self._chosen, int) and x_first and len(args) == 2 and not kwargs:
            if func in _MATMUL or func is F.linear:
                transposed = (func is F.linear) == self._flipped
                return Product(args[0], "linear", *self._layout(transposed), expert=self._chosen)
        elif isinstance(self._chosen, Tensor) and func in _BATCHED and len(args) == 2:
            return self._with_each(args[0 if x_first else 1], x_first)
        elif self._chosen is None and x_first and (name := _grouped_name(func)):
            x, ends = args[0], args[2] if len(args) > 2 else kwargs["offs"]
            return Product(x, name, *self._layout(not self._flipped), ends=ends)
        name = getattr(func, "__name__", str(func))
        raise NotImplementedError(self._problem(f"the function '{name}' with {len(args) + len(kwargs)} arguments"))

    def _with_each(self, operand: Tensor, x_first: bool) -> Product:
        x = operand.squeeze(1 if x_first else 2)
        if x.dim() != 2:
            raise NotImplementedError(self._problem("a batched product of several rows per expert"))
        function, layout = "rows_bmm" if x_first else "bmm_columns", self._layout(x_first != self._flipped)
        return Product(x, function, *layout, experts=cast(Tensor, self._chosen))

    def _layout(self, transposed: bool) -> tuple[bool, int]:
        """The `transposed` of a product, and its `out`."""
        return transposed, weight_of(self._module, self._name).shape[2 if transposed else 1]

    def _dense(self) -> Tensor:
        """A tensor of the same metadata, without memory of its own."""
        weight = weight_of(self._module, self._name)
        if isinstance(self._chosen, Tensor):
            weight = weight[:1].expand(len(self._chosen), -1, -1)
        elif self._chosen is not None:
            weight = weight[self._chosen]
        return weight.mT if self._flipped else weight

    def _problem(self, what: str) -> str:
        return (
            f"The forward of {type(self._module).__name__} uses {what} of its parameter '{self._name}', which "
            "peft-dowser cannot follow. Choose another implementation of the experts with "
            "model.set_experts_implementation: 'grouped_mm', 'batched_mm' or 'eager'; or leave the parameter out of "
            "target_parameters."
        )


def _grouped_name(func: Callable) -> str | None:
    """The name of a grouped product; None of another function."""
    for name, place in _GROUPED.items():
        grouped = getattr(place, name, None)
        if grouped is not None and func in (grouped, getattr(grouped, "default", None)):
            return name
    return None


def weight_of(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter of a module, also while a stand-in is in its place."""
    return cast(nn.Parameter, module._parameters[name])


@contextmanager
def standing_in(module: nn.Module, multiply: Mapping[str, Multiply]) -> Iterator[None]:
    """Put stand-ins in the place of parameters of a module, for the length of its `wrapped_forward`.

    `multiply` has by parameter name what computes a product with it. An attribute of the instance comes before its
    parameters when a name is looked up, so the parameters stay where they are: state dicts and optimizers see nothing.
    """
    for name, function in multiply.items():
        module.__dict__[name] = _StandIn(module, name, function)
    try:
        yield
    finally:
        for name in multiply:
            del module.__dict__[name]


@contextmanager
def wrapped_forward(module: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Call `wrapper(forward, *args, **kwargs)` where the module's forward would be called.

    This is the innermost forward. The forward of accelerate around it loads offloaded parameters before and unloads
    them after it, and must not meet a stand-in.
    """
    place = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward, is_own = getattr(module, place), place in module.__dict__
    module.__dict__[place] = partial(wrapper, forward)
    try:
        yield
    finally:
        del module.__dict__[place]
        if is_own:
            module.__dict__[place] = forward
