"""Model Grafting with a learned mask: which fine-tuned entries to graft onto the base, learned on the task's loss."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.restoring import in_eval_mode
from ..delta.apply import Delta
from ..delta.codec import position_dtype
from ..delta.seeds import derived_seed
from .postmerge import graft


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that a transformers model computes itself from a batch with labels."""
    return model(**batch).loss


def learn_graft(
    model: nn.Module,
    tuned: Mapping[str, Tensor],
    batches: Iterable[Any],
    update_ratio: float,
    steps: int = 10,
    learning_rate: float = 1e7,
    beta: float = 10.0,
    seed: int = 0,
    loss: Callable[[nn.Module, Any], Tensor] = model_loss,
) -> dict[str, Delta]:
    """Learn which entries of D = W - W* to graft onto the base (Model Grafting, Panigrahi et al. 2023).

    The weight is W* + g o D with g = b + (1 - 2b) sigmoid(S - beta), where b is the base patch, see `graft`. The logits
    S start uniform in [0, 1), so g starts near b, and take plain gradient steps on the mean loss. The masks g > 1/2
    before and after every step are compared, the base patch first; the mask with the lowest loss is kept.

    Args:
        model: the model with the base weights W*. Its weights, modes and gradients are restored at the end.
        tuned: fine-tuned weights W by parameter name; parameters not named stay at the base.
        batches: inputs with their targets, kept in a list; every step goes through all of them.
        update_ratio: rho of the base patch, in (0, 1]. The learned mask may keep more or fewer entries.
        steps: number of gradient steps.
        learning_rate: learning rate of the logits; large, because sigmoid'(S - beta) is small.
        beta: how far every entry starts from changing sides.
        seed: seed of the initial logits.
        loss: mean loss of a model on one batch, a scalar.

    Returns:
        One delta per parameter of `tuned`, in that order; some may be empty.

    Raises:
        ValueError: an argument is out of range, a name or a shape does not fit the model, or no mask has a finite loss.

    Note: the model runs in eval mode. Holds W*, D, S, b and one gradient of the tuned parameters, all dense, and the
    best mask; this is the cost of the method.
    """
    losses = [partial(loss, model, batch) for batch in batches]
    _check(losses, steps, learning_rate, beta)
    grafts = _grafts(model, tuned, update_ratio, seed)
    best, masks = math.inf, [one.patch for one in grafts]
    with in_eval_mode(model), _borrowed(model, grafts):
        for step in range(steps + 1):
            if step:
                _descend(grafts, losses, learning_rate, beta)
            candidate = [one.mask(beta) for one in grafts]
            found = _mean_loss(grafts, candidate, losses)
            if found < best:
                best, masks = found, candidate
    if best == math.inf:
        raise ValueError("The loss is not finite, whatever the mask. Check the batches and the fine-tuned weights.")
    return {name: one.delta(mask) for name, one, mask in zip(tuned, grafts, masks, strict=True)}


@dataclass
class _Graft:
    """A parameter that is grafted: of the model, whose data hold the grafted weight while the mask is learned.

    Attributes:
        origin: W*, a copy.
        difference: D, float32.
        patch: b, bool.
        logits: S, float32.
    """

    parameter: nn.Parameter
    origin: Tensor
    difference: Tensor
    patch: Tensor
    logits: Tensor

    def share(self, beta: float) -> Tensor:
        """g, between 0 and 1."""
        return (self.patch.float() - torch.sigmoid(self.logits - beta)).abs_()

    def mask(self, beta: float) -> Tensor:
        return self.patch ^ (self.logits > beta)

    def put(self, share: Tensor) -> None:
        self.parameter.data.copy_(self.origin + share * self.difference)

    def slope(self, gradient: Tensor, beta: float) -> Tensor:
        """dL/dS = (1 - 2b) o (dL/dW o D) o sigmoid'(S - beta)."""
        sigmoid = torch.sigmoid(self.logits - beta)
        sign = 1 - 2 * self.patch.float()
        return sign * gradient * self.difference * sigmoid * (1 - sigmoid)

    def delta(self, mask: Tensor) -> Delta:
        positions = mask.view(-1).nonzero().view(-1)
        return Delta(positions.to(position_dtype(mask.numel())), self.difference.view(-1)[positions])


def _grafts(model: nn.Module, tuned: Mapping[str, Tensor], update_ratio: float, seed: int) -> list[_Graft]:
    parameters = dict(model.named_parameters())
    for name, weight in tuned.items():
        if name not in parameters:
            raise ValueError(f"'{name}' is not a parameter of the model; tuned maps parameter names to weights.")
        parameter = parameters[name]
        if parameter.shape != weight.shape or parameter.dtype != weight.dtype:
            raise ValueError(
                f"Parameter '{name}' is {parameter.dtype} of shape {tuple(parameter.shape)}, but the fine-tuned weight "
                f"is {weight.dtype} of shape {tuple(weight.shape)}."
            )
    moved = {name: weight.to(parameters[name].device) for name, weight in tuned.items()}
    patches = graft([lambda name=name: (parameters[name], moved[name]) for name in moved], update_ratio)
    return [
        _start(parameters[name], weight, patch, derived_seed(seed, "graft", name))
        for (name, weight), patch in zip(moved.items(), patches, strict=True)
    ]


def _start(parameter: nn.Parameter, tuned: Tensor, patch: Delta, seed: int) -> _Graft:
    origin = parameter.detach().clone()
    mask = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
    mask[patch.positions.long()] = True
    generator = torch.Generator().manual_seed(seed)
    logits = torch.rand(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
    return _Graft(
        parameter=parameter,
        origin=origin,
        difference=tuned.detach().float() - origin.float(),
        patch=mask.view(parameter.shape),
        logits=logits.to(parameter.device),
    )


@contextmanager
def _borrowed(model: nn.Module, grafts: list[_Graft]) -> Iterator[None]:
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for one in grafts:
            one.parameter.requires_grad_(True)
        yield
    finally:
        for one in grafts:
            one.parameter.data.copy_(one.origin)
        for parameter, before in required:
            parameter.requires_grad_(before)


def _descend(grafts: list[_Graft], losses: list[Callable[[], Tensor]], learning_rate: float, beta: float) -> None:
    for one in grafts:
        one.put(one.share(beta))
    totals = [torch.zeros_like(one.logits) for one in grafts]
    for loss in losses:
        with torch.enable_grad():
            value = loss()
        gradients = torch.autograd.grad(value, [one.parameter for one in grafts])
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient
    for one, total in zip(grafts, totals, strict=True):
        one.logits -= learning_rate * one.slope(total / len(losses), beta)


def _mean_loss(grafts: list[_Graft], masks: list[Tensor], losses: list[Callable[[], Tensor]]) -> float:
    for one, mask in zip(grafts, masks, strict=True):
        one.put(mask)
    with torch.no_grad():
        return sum(float(loss()) for loss in losses) / len(losses)


def _check(losses: list[Callable[[], Tensor]], steps: int, learning_rate: float, beta: float) -> None:
    if not losses:
        raise ValueError("batches is empty; a graft is learned on at least one batch.")
    if steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be a finite number above 0, got {learning_rate!r}.")
    if not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, got {beta!r}.")
