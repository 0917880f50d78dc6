"""The passes of a probe: for every batch of prompts one forward and R backwards, reduced to statistics by taps.

R is 0 for the scores that read no sensitivity: then nothing but the forward runs, and without a graph.
"""

import gc
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import tqdm

from ..base.target import Target
from ..delta.seeds import derived_seed
from .batches import alike, collate, decoder_tokens, last_positions
from .expert_taps import ExpertsTap, tapped_experts
from .prompts import ModelKind, Prompt, model_kind
from .ranks import Ranks
from .settings import ProbeSettings
from .statistics import ModuleStatistics
from .taps import LayoutTap, Tap, tap_of, tapped

logger = logging.getLogger(__name__)


class Passes:
    """The passes of one probe of a frozen model: this rank's share of the prompts, batch by batch.

    Attributes:
        groups: numbers of the prompts that can share a batch.
        mine: numbers of the prompts that this rank probes, increasing.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, Target],
        settings: ProbeSettings,
        prompts: list[Prompt],
        ranks: Ranks,
    ) -> None:
        self.model, self.targets, self.settings, self.prompts, self.ranks = model, targets, settings, prompts, ranks
        self.matrices = {matrix.name: matrix for target in targets.values() for matrix in target.matrices()}
        self.fused = {name: target for name, target in targets.items() if target.kind == "fused"}
        self.plain = {name: target for name, target in targets.items() if target.kind != "fused"}
        self.kind = model_kind(model)
        self.has_head = isinstance(model, PreTrainedModel) and model.can_generate()
        self.device = next(iter(targets.values())).device
        self.groups = alike(prompts, padding=self.kind is not ModelKind.OTHER)
        self.mine = sorted(number for group in self.groups for number in ranks.share(group))
        self.found: dict[str, ModuleStatistics] = {}

    def statistics(self) -> dict[str, ModuleStatistics]:
        """Statistics of this rank's prompts, in the order of `mine`."""
        size = self._batch_size()
        total = len(self.mine) * max(1, self.settings.num_rademacher)
        with tqdm(total=total, desc="Probing", unit="pass", disable=not self.ranks.is_first) as bar:
            for group in self.groups:
                waiting = self.ranks.share(group)
                if self.ranks.in_step and self.ranks.batch_count(group, size) > -(-len(waiting) // size):
                    self._probe_batch(group[:1], bar, kept=False)  # the others have one batch more
                while waiting:
                    if self._fits(partial(self._probe_batch, waiting[:size], bar)):
                        waiting = waiting[size:]
                    elif min(size, len(waiting)) > 1:
                        size = min(size, len(waiting)) // 2
                        logger.warning("Out of memory: probing %d prompts at a time.", size)
                    else:
                        raise RuntimeError(
                            "The probe runs out of memory with one prompt at a time; choose a smaller probe_length, "
                            "or fewer layers (last_layers)."
                        )
        return {name: self.found.pop(name).of_prompts(self.mine) for name in self.matrices if name in self.found}

    def _batch_size(self) -> int:
        """How many prompts are probed at a time: 1 where a target module mixes the prompts of a batch."""
        size = self.ranks.common_batch_size(self.settings.batch_size or self._fitting_batch())
        mixing: list[str] = []
        if size == 1 or not self._fits(lambda: mixing.extend(self._mixing())):
            return 1
        if mixing:
            logger.warning(
                "Probing one prompt at a time: %d target modules, '%s' the first, do not keep the prompts of a batch "
                "apart, like experts behind a router.",
                len(mixing),
                mixing[0],
            )
        return 1 if mixing else size

    def _mixing(self) -> list[str]:
        """The target modules that mix the prompts of a batch.

        A forward of the two longest prompts of every kind shows them, so the answer depends neither on the size of the
        batches nor on the rank.
        """
        mixing: set[str] = set()
        for group in self.groups:
            pair = sorted(group, key=lambda number: _length(self.prompts[number]))[-2:]
            if len(pair) == 2:
                inputs, mask, output_mask = self._collated(pair)
                taps = {name: LayoutTap(_masks(mask, output_mask), len(pair)) for name in self.plain}
                with torch.no_grad(), tapped(self.plain, taps):
                    self._forward(inputs, mask, output_mask)
                mixing.update(name for name, tap in taps.items() if tap.mixes)
        return [name for name in self.plain if name in mixing]

    def _fitting_batch(self) -> int:
        """How many prompts fill half of the free memory with their activations."""
        free = psutil.virtual_memory().available
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
        # Between forward and backward a transformer keeps about four times the inputs and outputs of its linears.
        tokens = max(map(_length, self.prompts))
        size = next(self.model.parameters()).element_size()
        features = sum(sum(target.features) * target.uses_per_token for target in self.targets.values())
        statistics = sum(sum(matrix.features) for matrix in self.matrices.values())
        prompt = 4 * features * tokens * size + 4 * statistics
        return max(1, min(len(self.prompts), free // 2 // max(1, prompt)))

    def _fits(self, work: Callable[[], None]) -> bool:
        """Do some work; False if the memory is too small."""
        try:
            work()
        except RuntimeError as error:
            # Ranks that gather weights together wait for this one by now, and cannot be told of smaller batches.
            if self.ranks.in_step or not should_reduce_batch_size(error):
                raise
        else:
            return True
        gc.collect()
        clear_device_cache()
        return False

    def _probe_batch(self, chosen: list[int], bar: Any, kept: bool = True) -> None:
        inputs, mask, output_mask = self._collated(chosen)
        masks = _masks(mask, output_mask)
        of_experts: dict[str, ExpertsTap] = {}
        if mask is not None:
            of_experts = {
                name: ExpertsTap(mask, target.shape[0], self.settings.gradient, self.settings.backward)
                for name, target in self.fused.items()
            }
        of_plain = {name: tap_of(target, masks, len(chosen), self.settings) for name, target in self.plain.items()}
        taps: list[Tap | ExpertsTap] = [*of_plain.values(), *of_experts.values()]
        generators = [
            torch.Generator().manual_seed(derived_seed(self.settings.seed, "rademacher", number)) for number in chosen
        ]
        with tapped(self.plain, of_plain), tapped_experts(self.fused, of_experts):
            for numbers in self._rounds():
                with torch.no_grad():  # the taps turn it on
                    outputs = self._forward(inputs, mask, output_mask)
                if not self.settings.backward:
                    bar.update(len(chosen))
                starts = [start for tap in taps for start in tap.starts]
                for number in numbers:
                    output, direction = self._probed_output(outputs, output_mask), None
                    if number < self.settings.num_rademacher:
                        direction = _rademacher(generators, output, output_mask)
                        bar.update(len(chosen))
                    else:
                        output = _next_token_loss(self.kind, outputs, inputs, output_mask) / len(self.mine)
                        for tap in taps:
                            tap.of_loss = True
                    if starts and output.requires_grad:
                        again = number != numbers[-1]
                        torch.autograd.grad(output, starts, direction, retain_graph=again, allow_unused=True)
        if not kept:
            return
        for name, tap in of_plain.items():
            self._keep(name, tap, chosen)
        for name, experts in of_experts.items():
            matrices = self.fused[name].matrices()
            for expert, tap in experts.by_expert():
                self._keep(matrices[expert].name, tap, chosen)

    def _collated(self, chosen: list[int]) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """The batch, the mask of its real tokens, and the mask of the tokens whose output is probed.

        The two masks differ for an encoder-decoder: the decoder gives the output.
        """
        prompts = [self.prompts[number] for number in chosen]
        inputs, mask = collate(prompts, self.device)
        if self.kind is not ModelKind.SEQ2SEQ or mask is None:
            return inputs, mask, mask
        return inputs, mask, decoder_tokens(prompts, mask)

    def _rounds(self) -> list[range]:
        """What follows each forward: the Rademacher vectors of its backwards, by number; after the last, the loss."""
        count = self.settings.num_rademacher + int(self.settings.gradient)
        if self.ranks.one_backward and count:
            return [range(number, number + 1) for number in range(count)]
        return [range(count)]

    def _forward(self, inputs: dict[str, Tensor], mask: Tensor | None, output_mask: Tensor | None) -> Any:
        if self.kind is ModelKind.OTHER or mask is None or output_mask is None:
            return self.model(**inputs)
        options: dict[str, Any] = {"attention_mask": mask.long()}
        accepted = inspect.signature(self.model.forward).parameters
        if not self.has_head:
            options["output_hidden_states"] = True
        if "use_cache" in accepted:
            options["use_cache"] = False
        if "logits_to_keep" in accepted and not self.settings.gradient and not self._probes_head():
            # A number, because a tensor might be on another device than the hidden states.
            options["logits_to_keep"] = output_mask.shape[1] - int(last_positions(output_mask).min())
        return self.model(**(inputs | options))

    def _probes_head(self) -> bool:
        """Whether the output head is a target: its input counts at every token, not at the last alone."""
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        return any(target.module is head for target in self.targets.values())

    def _probed_output(self, outputs: Any, output_mask: Tensor | None) -> Tensor:
        """f: `(batch, features)`, or `(batch, tokens, features)` for an encoder."""
        if self.kind is ModelKind.OTHER or output_mask is None:
            output = outputs if isinstance(outputs, Tensor) else outputs[0]
            return output[:, -1] if output.dim() == 3 else output
        if self.has_head:
            output = outputs.logits
        else:
            output = outputs.get("last_hidden_state")
            output = outputs.hidden_states[-1] if output is None else output
        if self.kind is ModelKind.ENCODER:
            return output
        last = last_positions(output_mask).to(output.device) - (output_mask.shape[1] - output.shape[1])
        return output[torch.arange(len(last), device=output.device), last]

    def _keep(self, name: str, tap: Tap, chosen: list[int]) -> None:
        """Move the statistics of a batch into the rows of its prompts."""
        if tap.activity is None or tap.energy is None:
            return  # never called
        module = self.found.get(name)
        if module is None:
            out, width = self.matrices[name].features
            zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
            module = ModuleStatistics(
                sensitivity=zeros(len(self.prompts), out) if self.settings.num_rademacher else None,
                activity=zeros(len(self.prompts), width),
                energy=zeros(width),
                gradient=zeros(out, width) if self.settings.gradient else None,
            )
            self.found[name] = module
        forwards = len(self._rounds())
        module.activity[chosen] = (tap.activity / tap.calls).cpu()
        module.energy += (tap.energy / forwards).cpu()
        if module.sensitivity is not None and tap.sensitivity is not None:
            backwards = tap.calls // forwards * self.settings.num_rademacher
            module.sensitivity[chosen] = (tap.sensitivity / backwards).cpu()
        if module.gradient is not None and tap.gradient is not None:
            module.gradient += tap.gradient.cpu()


def _length(prompt: Prompt) -> int:
    return next(iter(prompt.values())).shape[1:2].numel()


def _masks(mask: Tensor | None, output_mask: Tensor | None) -> list[Tensor]:
    return [tokens for tokens in (mask, output_mask) if tokens is not None]


def _rademacher(generators: list[torch.Generator], output: Tensor, mask: Tensor | None) -> Tensor:
    """Independent signs for every prompt, zero at its padding, in the shape of `output`.

    Each prompt has a generator of its own, so its signs depend neither on the batch nor on the padding.
    """
    if output.dim() == 3 and mask is not None:
        projection = torch.zeros(output.shape, dtype=torch.float32, device="cpu")
        for row, generator in enumerate(generators):
            real = mask[row].cpu() > 0
            projection[row, real] = _signs((int(real.sum()), output.shape[2]), generator)
    else:
        projection = torch.stack([_signs(output.shape[1:], generator) for generator in generators])
    return projection.to(output.device, output.dtype)


def _signs(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, tuple(shape), generator=generator, dtype=torch.int8, device="cpu")
    return signs.mul_(2).sub_(1).float()


def _next_token_loss(kind: ModelKind, outputs: Any, inputs: dict[str, Tensor], output_mask: Tensor | None) -> Tensor:
    """Sum over the prompts of the mean cross-entropy of their own next tokens."""
    logits = getattr(outputs, "logits", None)
    if kind not in (ModelKind.DECODER, ModelKind.SEQ2SEQ) or output_mask is None or logits is None:
        raise ValueError("score='gradient' needs a model that predicts the next token of its prompts.")
    ids = inputs.get("decoder_input_ids" if kind is ModelKind.SEQ2SEQ else "input_ids")
    if ids is None:
        raise ValueError(
            "score='gradient' needs prompts with decoder_input_ids, whose next tokens an encoder-decoder predicts."
        )
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none")
    return ((losses * output_mask[:, 1:]).sum(1) / output_mask[:, 1:].sum(1).clamp(min=1)).sum()
