"""Sparse deltas on the fused parameters of an experts module, where the matrices of all experts are one Parameter."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._transformers import experts_implementation
from ..base.fused import Product, standing_in, weight_of, wrapped_forward
from ..base.target import Target
from .experts_op import expert_bounds, sparse_experts
from .layer import DowserLayer
from .linear_op import in_autocast

# Implementations of experts that `torch.compile` can trace. An older torch cannot trace what stands in for a parameter;
# its version compares as a version, not as text.
_TRACEABLE = {"batched_mm", "grouped_mm"} if torch.__version__ >= "2.13" else set()


class FusedParameter(nn.Module, DowserLayer):
    """The deltas of one fused parameter. It has no forward: the forward of the experts module multiplies with it."""

    def __init__(self, target: Target, sample: str | None = None) -> None:
        super().__init__()
        DowserLayer.__init__(self, target, sample)

    @property
    def base_layer(self) -> nn.Module:
        return self.target.module  # not a child of this: it belongs to the `Experts` around it

    @property
    def weight(self) -> nn.Parameter:
        return weight_of(self.base_layer, self.target.parameter)

    def __repr__(self) -> str:
        return "dowser." + super().__repr__()


class Experts(nn.Module):
    """An experts module with sparse deltas on its fused parameters: a `FusedParameter` of the same name for each."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def layer_for(self, target: Target, sample: str | None) -> FusedParameter:
        """The deltas of a fused parameter of the base layer, new where there are none; `sample` as in `DowserLayer`."""
        if target.parameter not in self._modules:
            self.add_module(target.parameter, FusedParameter(target, sample))
        return cast(FusedParameter, self._modules[target.parameter])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base layer's own forward, in which every product with an adapted parameter takes W + D.

        Several threads may call it at once only while every adapter is merged.
        """
        if all(fused.merged and not fused.disable_adapters for fused in self._fused()):
            return self.base_layer(*args, **kwargs)
        if experts_implementation(self.base_layer) in _TRACEABLE:
            return self._run(*args, **kwargs)
        return self._run_untraced(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with wrapped_forward(self.base_layer, self._forward):
            return self.base_layer(*args, **kwargs)

    # `torch.compile` breaks its graph here: a loop over the experts that have rows has no graph without an adapter
    # either.
    _run_untraced = torch.compiler.disable(_run)

    def _forward(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        multiply = {}
        for fused in self._fused():
            if adapters := fused.in_use():
                multiply[fused.target.parameter] = _Deltas(fused, adapters).multiply
        with standing_in(self.base_layer, multiply):
            return forward(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the deltas merged into it if asked for; called by PEFT."""
        if merge:
            for fused in self._fused():
                fused.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def _fused(self) -> list[FusedParameter]:
        return [child for child in self.children() if isinstance(child, FusedParameter)]


class _Deltas:
    """The deltas of one parameter in one forward."""

    def __init__(self, fused: FusedParameter, adapters: list[str]) -> None:
        self.fused = fused
        self.values = [fused.scaled_values(name) for name in adapters]
        self.positions = [fused.index(name).decoded() for name in adapters]
        self._by_expert: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] | None = None

    def multiply(self, product: Product) -> Tensor:
        weight = self.fused.weight
        if not product.is_grouped:
            product = replace(product, x=in_autocast(product.x))
        if product.expert is None:
            return sparse_experts(product, weight, self.values, self.positions)
        values, positions = self._of(product.expert)
        if not any(at.numel() for at in positions):
            return product.compute(weight[product.expert])
        return sparse_experts(product, weight, values, positions)

    def _of(self, expert: int) -> tuple[list[Tensor], list[Tensor]]:
        """The deltas of one expert."""
        if self._by_expert is None:
            shape = self.fused.weight.shape
            self._by_expert = []
            for values, positions in zip(self.values, self.positions, strict=True):
                bounds = expert_bounds(positions, shape)
                sizes = [end - begin for begin, end in pairwise(bounds)]
                # One split for all experts: its backward writes the gradient once, not once per expert.
                self._by_expert.append((values.split(sizes), positions.split(sizes)))
        return [each[expert] for each, _ in self._by_expert], [each[expert] for _, each in self._by_expert]
