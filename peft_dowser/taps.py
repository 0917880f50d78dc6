"""Taps: hooks that reduce the activations and gradients of a module to its statistics while a batch runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .target import Target


@dataclass
class Tap:
    """Statistics of one module for the batch in flight.

    Attributes:
        masks: real tokens of the batch, `(batch, tokens)`, float32: those of the prompts, and those that a decoder of
            its own reads; none where the inputs have no tokens.
        batch: number of prompts in the batch.
        wants_gradient: inputs are kept until the backward of a loss needs them.
        calls: how often the module was called with tokens that can be told apart by prompt.
        activity: sum over calls of the mean |h|, `(batch, in)`.
        energy: sum over calls and real tokens of h squared, `(in,)`.
        sensitivity: sum over backwards and calls of the mean |dz|, `(batch, out)`.
        gradient: sum over calls of dz^T h in the backward of a loss, `(out, in)`.
        starts: outputs at which the graph begins.
        of_loss: the running backward is that of a loss, not of a Rademacher vector.
    """

    masks: Sequence[Tensor]
    batch: int
    wants_gradient: bool = False
    calls: int = 0
    activity: Tensor | None = None
    energy: Tensor | None = None
    sensitivity: Tensor | None = None
    gradient: Tensor | None = None
    starts: list[Tensor] = field(default_factory=list)
    of_loss: bool = False

    def forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        """Forward hook."""
        hidden = (args[0] if args else next(iter(kwargs.values()))).detach()
        measured = self._measured(hidden)
        if measured is None:
            return
        # Until here the forward ran without a graph, so that it begins at the first probed modules even where a hook of
        # the caller makes the embeddings require grad.
        torch.set_grad_enabled(True)
        if not output.requires_grad:
            output.requires_grad_(True)
            self.starts.append(output)
        kept = hidden if self.wants_gradient else None
        output.register_hook(lambda grad: self._backward(grad.detach(), kept))
        self.calls += 1
        self.activity = plus(self.activity, measured[0])
        self.energy = plus(self.energy, measured[1])

    def _measured(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        """Activity and energy of one call; None where the tokens of different prompts cannot be told apart."""
        by_prompt = self._by_prompt(hidden)
        if by_prompt is None:
            return None
        tokens, weights = by_prompt
        energy = (tokens.float().square() * (weights > 0)[..., None]).sum((0, 1))
        return _weighted_sum(tokens.abs(), weights), energy

    def _product(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """dz^T h, shape `(out, in)`, float32."""
        return (grad.reshape(-1, grad.shape[-1]).T @ hidden.reshape(-1, hidden.shape[-1])).float()

    def _backward(self, grad: Tensor, hidden: Tensor | None) -> None:
        if self.of_loss and hidden is not None:
            self.gradient = plus(self.gradient, self._product(grad, hidden))
        elif by_prompt := self._by_prompt(grad):
            self.sensitivity = plus(self.sensitivity, _weighted_sum(by_prompt[0].abs(), by_prompt[1]))

    def _by_prompt(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        """Values as `(batch, tokens, features)` and the weight of each token in its prompt's mean.

        None where the tokens of different prompts cannot be told apart, as behind a router.
        """
        features = values.shape[-1]
        for mask in self.masks:
            if values.shape[:-1].numel() == mask.numel():
                mask = mask.to(values.device)
                return values.reshape(*mask.shape, features), mask / mask.sum(1, keepdim=True)
        if values.dim() >= 2 and values.shape[0] == self.batch:
            tokens = values.reshape(self.batch, -1, features)
            return tokens, tokens.new_full(tokens.shape[:2], 1 / tokens.shape[1], dtype=torch.float32)
        return None


@dataclass
class LookupTap(Tap):
    """Statistics of an embedding, whose h is one-hot: activity is the frequency of each token, energy its count.

    Attributes:
        entries: `in`, the number of tokens that the embedding knows.
    """

    entries: int = 0

    def _measured(self, hidden: Tensor) -> tuple[Tensor, Tensor] | None:
        by_prompt = self._by_prompt(hidden[..., None])
        if by_prompt is None:
            return None
        ids, weights = by_prompt[0][..., 0].long(), by_prompt[1]
        activity = weights.new_zeros(len(ids), self.entries).scatter_add_(1, ids, weights)
        return activity, torch.bincount(ids[weights > 0], minlength=self.entries).float()

    def _product(self, grad: Tensor, hidden: Tensor) -> Tensor:
        rows = grad.reshape(-1, grad.shape[-1]).float()
        return rows.new_zeros(self.entries, rows.shape[1]).index_add_(0, hidden.reshape(-1).long(), rows).T


def tap_of(target: Target, masks: Sequence[Tensor], batch: int, wants_gradient: bool) -> Tap:
    """A tap for one matrix."""
    if isinstance(target.module, nn.Embedding):
        return LookupTap(masks, batch, wants_gradient, entries=target.features[1])
    return Tap(masks, batch, wants_gradient)


@contextmanager
def tapped(targets: Mapping[str, Target], taps: Mapping[str, Tap]) -> Iterator[None]:
    """Connect each tap to its matrix, and disconnect all of them in every case."""
    hooks = []
    try:
        for name, target in targets.items():
            hooks.append(target.module.register_forward_hook(taps[name].forward, with_kwargs=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def plus(total: Tensor | None, addend: Tensor) -> Tensor:
    """A running sum, added to in place; None is zero."""
    return addend if total is None else total.add_(addend)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over the tokens, `(batch, features)`, float32. Padding, whatever it holds, counts for nothing."""
    return torch.where((weights > 0)[..., None], values.float() * weights[..., None], 0).sum(1)
