"""Taps on the fused parameters of experts: statistics per expert, though its rows come from all prompts of a batch.

An experts module sorts the tokens of all prompts by expert, in an order of its own, so a product does not tell which
row belongs to which prompt. Each call of the module is therefore rehearsed: its forward runs once on tokens that hold
nothing but their number, without computing any product, and what arrives at the products tells.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.fused import Product, standing_in, weight_of, wrapped_forward
from ..base.target import Target
from .taps import Tap, plus, sums_by_group

# Digits, base 256, of a token's number: each is exact in every float dtype.
_DIGITS = 3


@dataclass
class ExpertsTap:
    """Statistics of the experts of one fused parameter for the batch in flight.

    An expert's activity and sensitivity are sums over the tokens that it gets, divided by all real tokens of the
    prompt: a mean in which the other tokens count as zero, so that rarely used experts are not inflated.

    Attributes:
        mask: real tokens of the batch, `(batch, tokens)`, float32.
        experts: number of experts.
        wants_gradient: rows are kept until the backward of a loss needs them.
        wants_graph: backwards follow; otherwise the forward runs without a graph.
        calls: how often the module was called.
        rows: number of real tokens that each expert got, `(experts,)`.
        activity: sum over calls of the mean |h|, `(batch * experts, in)`.
        energy: sum over calls and real tokens of h squared, `(experts, in)`.
        sensitivity: sum over backwards and calls of the mean |dz|, `(batch * experts, out)`.
        gradient: by expert, sum over calls of dz^T h in the backward of a loss, `(out, in)`.
        starts: products at which the graph begins.
        of_loss: the running backward belongs to a loss, not to a Rademacher vector.
    """

    mask: Tensor
    experts: int
    wants_gradient: bool = False
    wants_graph: bool = True
    calls: int = 0
    rows: Tensor | None = None
    activity: Tensor | None = None
    energy: Tensor | None = None
    sensitivity: Tensor | None = None
    gradient: dict[int, Tensor] = field(default_factory=dict)
    starts: list[Tensor] = field(default_factory=list)
    of_loss: bool = False

    def multiply(self, product: Product, tokens: Tensor, weight: Tensor) -> Tensor:
        """Compute a product with the fused parameter, or with the matrix of `product.expert`, and watch it.

        `tokens` has the token of every row, numbered through the batch, `(rows,)`.
        """
        hidden, expert, mask = product.x.detach(), product.expert_of_row(), self.mask.to(tokens.device)
        share = (mask / mask.sum(1, keepdim=True)).view(-1)[tokens]
        slot = tokens // mask.shape[1] * self.experts + expert
        real = (share > 0).float()
        self.rows = plus(self.rows, torch.bincount(expert[share > 0], minlength=self.experts))
        self.activity = plus(self.activity, self._sums(hidden.abs(), share, slot, len(mask)))
        self.energy = plus(self.energy, self._sums(hidden.float().square(), real, expert, 1))
        if not self.wants_graph:
            return product.compute(weight)
        # As in `Tap`: until the first probed module the forward runs without a graph.
        torch.set_grad_enabled(True)
        result = product.compute(weight)
        if not result.requires_grad:
            self.starts.append(result.requires_grad_(True))
            result = result.clone()  # the module may add a bias in place, which a leaf does not allow
        kept = hidden if self.wants_gradient else None

        def backward(grad: Tensor) -> None:
            grad = grad.detach().reshape(len(tokens), -1)
            if not self.of_loss:
                self.sensitivity = plus(self.sensitivity, self._sums(grad.abs(), share, slot, len(mask)))
            elif kept is not None:
                for number, rows in product.rows_by_expert():
                    found = (grad[rows].T @ kept[rows].to(grad.dtype)).float()
                    self.gradient[number] = plus(self.gradient.get(number), found)

        result.register_hook(backward)
        return result

    def by_expert(self) -> Iterator[tuple[int, Tap]]:
        """For every expert that a real token reached, its number and its statistics as a single matrix."""
        if self.rows is None or self.activity is None or self.energy is None:
            return
        activity = self.activity.unflatten(0, (-1, self.experts)).cpu()
        sensitivity = None if self.sensitivity is None else self.sensitivity.unflatten(0, (-1, self.experts)).cpu()
        for expert in self.rows.nonzero().view(-1).tolist():
            yield (
                expert,
                Tap(
                    [self.mask],
                    len(self.mask),
                    calls=self.calls,
                    activity=activity[:, expert],
                    energy=self.energy[expert],
                    sensitivity=None if sensitivity is None else sensitivity[:, expert],
                    gradient=self.gradient.get(expert),
                ),
            )

    def _sums(self, values: Tensor, share: Tensor, slot: Tensor, prompts: int) -> Tensor:
        """Weighted sums of rows by slot, `(prompts * experts, features)`. Padding counts for nothing."""
        weighted = torch.where((share > 0)[:, None], values.float() * share[:, None], 0)
        return sums_by_group(weighted, slot, prompts * self.experts)


@contextmanager
def tapped_experts(targets: Mapping[str, Target], taps: Mapping[str, ExpertsTap]) -> Iterator[None]:
    """Connect each tap to its fused parameter, and disconnect all of them in every case."""
    watches: dict[nn.Module, _Watch] = {}
    for name, tap in taps.items():
        module = targets[name].module
        watches.setdefault(module, _Watch(tap.mask.shape)).taps[targets[name].parameter] = tap
    with ExitStack() as stack:
        for module, watch in watches.items():
            stack.enter_context(wrapped_forward(module, partial(watch.forward, module)))
        yield


class _Watch:
    """Watches one experts module, with taps by parameter; `batch` is the number of its prompts and of their tokens."""

    def __init__(self, batch: torch.Size) -> None:
        self.batch = batch
        self.taps: dict[str, ExpertsTap] = {}

    def forward(self, module: nn.Module, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The forward of the module, whose first argument are the tokens."""
        if hidden.shape[:-1].numel() != self.batch.numel():
            return forward(hidden, *args, **kwargs)  # the tokens of different prompts cannot be told apart
        names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]
        tokens = iter(_rehearsed(module, names, lambda marked: forward(marked, *args, **kwargs), hidden))
        for tap in self.taps.values():
            tap.calls += 1
        multiply = {name: partial(self._multiply, module, name, tokens) for name in names}
        with standing_in(module, multiply):
            return forward(hidden, *args, **kwargs)

    def _multiply(self, module: nn.Module, name: str, tokens: Iterator[Tensor], product: Product) -> Tensor:
        weight = weight_of(module, name)
        weight = weight if product.expert is None else weight[product.expert]
        of_rows = next(tokens)
        if name in self.taps:
            return self.taps[name].multiply(product, of_rows, weight)
        return product.compute(weight)


def _rehearsed(module: nn.Module, names: list[str], forward: Callable[[Tensor], Any], hidden: Tensor) -> list[Tensor]:
    """The token of every row of every product of a forward, in the order of the products."""
    numbers = torch.arange(hidden.shape[:-1].numel(), device=hidden.device)
    marked = torch.zeros_like(hidden)
    shifts = torch.arange(_DIGITS, device=hidden.device) * 8
    marked.view(-1, hidden.shape[-1])[:, :_DIGITS] = ((numbers[:, None] >> shifts) & 255).to(hidden.dtype)
    found: list[Tensor] = []

    def note(product: Product) -> Tensor:
        digits = product.x[:, :_DIGITS].float()
        # Products give NaN here, so a NaN is what earlier products of the same rows have led to.
        tokens = found[-1] if found and bool(digits.isnan().any()) else (digits.long() << shifts).sum(1)
        if len(tokens) != len(digits) or bool(((tokens < 0) | (tokens >= len(numbers))).any()):
            raise ValueError(
                f"{type(module).__name__} changes its tokens before it multiplies them, so the probe cannot tell them "
                "apart. Choose score='magnitude' or 'random', or leave its parameters out of target_parameters."
            )
        found.append(tokens)
        return product.x.new_full(product.shape, float("nan"))

    with torch.no_grad(), standing_in(module, dict.fromkeys(names, note)):
        forward(marked)
    return found
