"""Taps: hooks that reduce the activations and gradients of a module to its statistics while a batch runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..base.target import Target, TargetKind
from .settings import ProbeSettings


@dataclass
class Tap:
    """Statistics of one module for the batch in flight.

    Attributes:
        masks: real tokens of the batch, `(batch, tokens)`, float32: of the prompts, and of what a separate decoder
            reads; empty where the inputs have no tokens.
        batch: number of prompts in the batch.
        wants_gradient: inputs are kept until the backward of a loss needs them.
        wants_graph: backwards follow; otherwise the forward runs without a graph.
        width: `in`; of an embedding, the number of tokens that it knows. Only a `LookupTap` needs it.
        calls: how often the module was called with at least one row.
        activity: sum over calls of the mean |h|, `(batch, in)`.
        energy: sum over calls and real tokens of h squared, `(in,)`.
        sensitivity: sum over backwards and calls of the mean |dz|, `(batch, out)`.
        gradient: sum over calls of dz^T h in the backward of a loss, `(out, in)`.
        starts: outputs at which the graph begins.
        of_loss: the running backward belongs to a loss, not to a Rademacher vector.
    """

    masks: Sequence[Tensor]
    batch: int
    wants_gradient: bool = False
    wants_graph: bool = True
    width: int = 0
    calls: int = 0
    activity: Tensor | None = None
    energy: Tensor | None = None
    sensitivity: Tensor | None = None
    gradient: Tensor | None = None
    starts: list[Tensor] = field(default_factory=list)
    of_loss: bool = False

    def forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        """Forward hook."""
        hidden = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not hidden.numel():
            return output  # an expert without tokens
        activity, energy = self._measured(hidden)
        self.calls += 1
        self.activity = plus(self.activity, activity)
        self.energy = plus(self.energy, energy)
        if not self.wants_graph:
            return output
        # Until here the forward ran without a graph, so that it begins at the first probed modules even where a hook of
        # the caller makes the embeddings require grad.
        torch.set_grad_enabled(True)
        kept = hidden if self.wants_gradient else None
        starts = not output.requires_grad
        output.requires_grad_(True).register_hook(lambda grad: self._backward(grad.detach(), kept))
        if starts:
            self.starts.append(output)
            return output.clone()  # the model may change it in place, which a leaf does not allow
        return output

    def _measured(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Activity and energy of one call."""
        tokens, weights = self._by_prompt(hidden)
        energy = (tokens.float().square() * (weights > 0)[..., None]).sum((0, 1))
        return _weighted_sum(tokens.abs(), weights), energy

    def _product(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """dz^T h, shape `(out, in)`, float32."""
        rows = hidden.reshape(-1, hidden.shape[-1]).to(grad.dtype)  # under autocast the input may be wider
        return (grad.reshape(-1, grad.shape[-1]).T @ rows).float()

    def _backward(self, grad: Tensor, hidden: Tensor | None) -> None:
        if self.of_loss and hidden is not None:
            self.gradient = plus(self.gradient, self._product(grad, hidden))
        else:
            tokens, weights = self._by_prompt(grad)
            self.sensitivity = plus(self.sensitivity, _weighted_sum(tokens.abs(), weights))

    def _by_prompt(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values as `(batch, tokens, features)` and the weight of each token in its prompt's mean.

        Behind a router the rows are only some of the tokens of a prompt; the others count as zero.
        """
        if not self.tells_apart(values.shape[:-1]):
            raise ValueError(
                f"A target module reads rows of shape {tuple(values.shape[:-1])} in a batch of {self.batch} prompts, "
                "which the probe cannot tell apart by prompt. Set probe_batch_size=1."
            )
        tokens = values.reshape(self.batch, -1, values.shape[-1])
        for mask in self.masks:
            if mask.shape == tokens.shape[:2]:
                mask = mask.to(values.device)
                return tokens, mask / mask.sum(1, keepdim=True)
        count = torch.full((self.batch, 1), tokens.shape[1], dtype=torch.float32, device=values.device)
        if values.dim() == 2 and self.masks:
            count = self.masks[0].to(values.device).sum(1, keepdim=True)
        return tokens, (1 / count).expand(tokens.shape[:2])

    def tells_apart(self, rows: torch.Size) -> bool:
        """Whether it is known which prompt each row of an input of shape `(*rows, features)` belongs to.

        The rows belong to one prompt, or come prompt by prompt.
        """
        in_order = rows[:1] == (self.batch,) or any(rows == (mask.numel(),) for mask in self.masks)
        return self.batch == 1 or in_order


@dataclass
class LayoutTap(Tap):
    """Measures nothing, but finds out whether the module mixes the prompts of a batch.

    Attributes:
        mixes: in a call it was not known which prompt each row belongs to.
    """

    mixes: bool = False

    def forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        rows = output.shape[:-1]
        # As many tokens as prompts: a transposed batch would have the same shape.
        square = rows[:2] == (self.batch, self.batch)
        self.mixes |= square or not self.tells_apart(rows)
        return output


@dataclass
class LookupTap(Tap):
    """Statistics of an embedding, whose h is one-hot: activity is the frequency of each token, energy its count."""

    def _measured(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, weights = self._by_prompt(hidden[..., None])
        ids = tokens[..., 0].long()
        activity = weights.new_zeros(len(ids), self.width).scatter_add_(1, ids, weights)
        return activity, torch.bincount(ids[weights > 0], minlength=self.width).float()

    def _product(self, grad: Tensor, hidden: Tensor) -> Tensor:
        return sums_by_group(grad.reshape(-1, grad.shape[-1]).float(), hidden.reshape(-1).long(), self.width).T


# Without the fused parameters: their taps are not hooks, see `expert_taps`.
_TAPS: dict[TargetKind, type[Tap]] = {"linear": Tap, "conv1d": Tap, "embedding": LookupTap, "quantized": Tap}


def tap_of(target: Target, masks: Sequence[Tensor], batch: int, settings: ProbeSettings) -> Tap:
    """A tap for one matrix."""
    return _TAPS[target.kind](masks, batch, settings.gradient, settings.backward, width=target.features[1])


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


def sums_by_group(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums of the rows of every group, `(count, features)`, each in the order of the rows, on every device.

    Args:
        rows: shape `(rows, features)`, float32.
        groups: the group of each row, in [0, count), shape `(rows,)`, int64.
        count: number of groups.

    Note: `index_add_` adds on a GPU in another order in every run, and so gives other last bits.
    """
    lengths = torch.bincount(groups, minlength=count)
    return torch.segment_reduce(rows[groups.argsort(stable=True)], "sum", lengths=lengths, axis=0)


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over the tokens, `(batch, features)`, float32. Padding, whatever it holds, counts for nothing."""
    return torch.where((weights > 0)[..., None], values.float() * weights[..., None], 0).sum(1)
