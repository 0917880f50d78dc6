"""Rehearsal without data: a training is held to the base on texts that the base has written itself."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.distributed import is_spread
from ..base.untouched import adapters_disabled, in_eval_mode, measuring
from ..config import DowserConfig
from ..delta.seeds import derived_seed, generators_restored, seed_generators
from ..probing.batches import alike
from ..probing.prompts import Prompt, Text
from ..probing.settings import ProbeSettings
from .forgetting import divergence, next_token_logits, predicted, prompts_for


class RehearsalCallback(TrainerCallback):
    """Hold the adapted model to its base: add the gradient of `weight` times KL(base || adapted) to a training.

    Every `every_n_steps` optimizer steps the base, which is the model with its adapter disabled, and the adapted model
    read `batch_size` texts. The mean over their tokens of KL(base || adapted), exact over the whole vocabulary, is
    propagated back before the first batch of the step. Its gradient is therefore accumulated with those of the
    training's own batches, and clipped together with them. The texts are the base's own samples by default, so no data
    are needed, and what the base could do before is what they hold it to. Works for every adapter of PEFT in
    transformers' Trainer and TRL's trainers, with gradient accumulation, autocast, gradient scaling, gradient
    checkpointing, DDP and FSDP2.

    The training logs get `rehearsal_kl`, the mean KL in nats per token since the last log. The training's own random
    numbers, modes and batches do not change; a training that resumes reads the same texts as one that was never
    interrupted.

    Args:
        texts: strings for the trainer's `processing_class`, rows of token ids, or keyword arguments of the model's
            forward with a batch dimension of 1, in which tokens with a label of -100 do not count. None lets the base
            write its own.
        weight: factor of the KL beside the loss of the training; 0 leaves the training as it is, bit for bit.
        every_n_steps: optimizer steps from one rehearsal to the next. At the same ratio of
            `weight` to `every_n_steps` a larger number costs less time.
        batch_size: texts of one rehearsal, over all ranks; rounded up to a multiple of their number.
        config: number, length, images and seed of the texts that the base writes; None takes the defaults of
            `DowserConfig`.
        max_length: longer texts are cut to this many tokens, except those given as keyword arguments.

    Raises:
        ValueError: an argument is out of its range; or, when the training begins, the model has no adapter to disable,
            cannot write texts, or is trained by DeepSpeed.

    Note: a rehearsal costs one forward without a graph, and one forward and backward, over `batch_size` texts.
    """

    def __init__(
        self,
        texts: Sequence[Text] | None = None,
        weight: float = 1.0,
        every_n_steps: int = 1,
        batch_size: int = 2,
        config: DowserConfig | None = None,
        max_length: int = 512,
    ) -> None:
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single string; pass [text].")
        if texts is not None and not len(texts):
            raise ValueError("texts is empty: pass at least one text, or None for texts that the base writes.")
        if texts is not None and config is not None:
            raise ValueError("config is for the texts that the base writes, so it cannot go with texts; drop one.")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, got {weight}.")
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self.texts, self.weight, self.every_n_steps, self.batch_size = texts, weight, every_n_steps, batch_size
        self.settings = ProbeSettings.of(config or DowserConfig())
        self.max_length = max_length
        self.prompts: list[Prompt] = []
        self._since_log: list[Tensor] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        _check(args, model)
        self._since_log = []
        if self.weight == 0:
            return
        with measuring(model), adapters_disabled(model):
            self.prompts = prompts_for(model, self, processing_class)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.weight == 0 or state.global_step % self.every_n_steps:
            return
        chosen = self._chosen(state.global_step // self.every_n_steps, args.world_size)
        scaler = getattr(optimizer, "scaler", None)
        scale = self.weight if scaler is None else self.weight * scaler.get_scale()
        with generators_restored(), torch.enable_grad():
            # Of its own, so that the dropout of the training stays what it is, and a resumed training has the same.
            seed_generators(derived_seed(self.settings.seed, "rehearsal", state.global_step, args.process_index))
            self._since_log.append(rehearse(model, chosen, scale, args.process_index, args.world_size))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self._since_log and logs is not None and "loss" in logs:
            logs["rehearsal_kl"] = float(torch.stack(self._since_log).mean())
            if state.log_history:
                state.log_history[-1]["rehearsal_kl"] = logs["rehearsal_kl"]
            self._since_log = []

    def _chosen(self, number: int, ranks: int) -> list[Prompt]:
        """The texts of a rehearsal: the next ones in turn, from the first again after the last."""
        count = -(-self.batch_size // ranks) * ranks
        return [self.prompts[(number * count + each) % len(self.prompts)] for each in range(count)]


def rehearse(model: Any, prompts: Sequence[Prompt], weight: float, rank: int = 0, ranks: int = 1) -> Tensor:
    """Add the gradient of `weight` times the mean over all tokens of KL(base || adapted) to the parameters' gradients.

    Args:
        model: the adapted model, in the mode that it trains in.
        prompts: inputs of one sample each, the same on every rank, as many as a multiple of `ranks`.
        weight: factor of the divergence.
        rank: number of this rank, which runs every `ranks`-th prompt.
        ranks: how many ranks run. The gradients that each finds are averaged by what trains the model.

    Returns:
        The mean KL over the tokens of this rank's prompts, in nats, a scalar.
    """
    device = next(model.parameters()).device
    own = list(prompts[rank::ranks])
    # Ranks that gather weights together must run as many forwards as each other.
    groups = [[number] for number in range(len(own))] if is_spread(model) else alike(own, padding=True)
    tokens = sum(int(predicted([prompt], torch.device("cpu"))[2].sum()) for prompt in prompts)
    total = torch.zeros((), dtype=torch.float32, device=device)
    counted = 0
    for group in groups:
        inputs, _, counts = predicted([own[number] for number in group], device)
        with torch.no_grad(), in_eval_mode(model), adapters_disabled(model):
            base = next_token_logits(model, inputs)[counts]
        found = divergence(base, next_token_logits(model, inputs)[counts])
        (found * (weight * ranks / tokens)).backward()
        total += found.detach().float()
        counted += len(base)
    return total / max(1, counted)


def _check(args: TrainingArguments, model: Any) -> None:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"RehearsalCallback holds an adapted model to its base by disabling the adapter, but "
            f"{type(model).__name__} is not a PeftModel: its base is gone after the first step. Train an adapter: "
            "get_peft_model(model, DowserConfig(...)), LoraConfig(...) or any other."
        )
    if getattr(args, "deepspeed", None):
        raise ValueError(
            "RehearsalCallback cannot add to the gradients of DeepSpeed, whose engine runs the backward itself. Train "
            "with DDP or FSDP2."
        )
