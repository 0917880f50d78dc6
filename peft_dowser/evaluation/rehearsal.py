"""Rehearsal without data: a training is held to the base on texts that the base has written itself."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.distributed import all_gather, is_gathered_by_module, is_sharded_model
from ..base.restoring import adapters_disabled, in_eval_mode, measuring
from ..config import DowserConfig
from ..delta.seeds import derived_seed, generators_restored, seed_generators
from ..probing.batches import alike
from ..probing.prompts import Prompt, Text
from .texts import Texts, divergence, next_token_logits, prediction_batch

if TYPE_CHECKING:
    from transformers import Trainer  # slow to import


class RehearsalCallback(TrainerCallback):
    """Hold the model that trains to its base: add the gradient of `weight` times KL(base || model) to a training.

    At every `every_n_steps`-th optimizer step the base, which is the model with its adapter disabled, and the model
    itself read `batch_size` texts. The mean over their tokens of KL(base || model), exact over the whole vocabulary, is
    propagated back before the first batch of the step. Its gradient is therefore accumulated with the gradients of the
    training's own batches, and clipped together with them. The texts are the base's own samples by default, so no data
    are needed, and what the base could do before is what they hold it to. Works for every adapter of PEFT in
    transformers' Trainer and TRL's trainers, with gradient accumulation, autocast, gradient scaling, gradient
    checkpointing, DDP and FSDP2; with `base` for full fine-tuning too.

    The training logs get `rehearsal_kl`, the mean KL in nats per token of the rehearsals since the last log. The base
    runs in eval mode, the model as it trains, with a dropout of its own. The training's random numbers, modes and
    batches do not change; a training that resumes reads the same texts as one that was never interrupted.

    Args:
        texts: strings for the trainer's `processing_class`, rows of token ids, or keyword arguments of the model's
            forward with a batch dimension of 1, such as a processor returns, in which tokens with a label of -100, or
            without labels the placeholders of images, do not count. None lets the base write its own; rank 0 writes for
            all, and the cache of probes keeps them.
        weight: factor of the KL, compared with the loss of the training; 0 leaves the training as it is, bit for bit.
        every_n_steps: optimizer steps from one rehearsal to the next. At the same ratio of
            `weight` to `every_n_steps` a larger number costs less time.
        batch_size: texts of one rehearsal, over all ranks; rounded up to a multiple of their number.
        config: number, length, images and seed of the texts that the base writes; None takes the defaults of
            `DowserConfig`.
        max_length: longer texts are cut to this many tokens, except those given as keyword arguments.
        base: what the model is held to, for full fine-tuning: the same checkpoint, loaded once more. It is left as it
            is, on every rank, on any device. None is the model itself without its adapter.
        trainer: the trainer that this callback is added to. With it, `rehearsal_kl` also reaches its report
            integrations, which run before any other callback.

    Raises:
        ValueError: an argument is out of its range; or, when the training begins, there is no base (no adapter to
            disable, or one that trains biases of the base), it cannot write texts, a text is longer than the model
            reads, or the weights are sharded in a way that a callback cannot follow: by DeepSpeed, FSDP1 or tensor
            parallelism.

    Note: a rehearsal costs one forward without a graph, and one forward and backward, over `batch_size` texts, and the
    memory of their logits and of two float32 copies of these. Nothing waits for the accelerator.
    """

    def __init__(
        self,
        texts: Sequence[Text] | None = None,
        weight: float = 1.0,
        every_n_steps: int = 1,
        batch_size: int = 2,
        config: DowserConfig | None = None,
        max_length: int = 512,
        base: nn.Module | None = None,
        trainer: "Trainer | None" = None,
    ) -> None:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be a finite number of at least 0, got {weight}.")
        for name, value in (("every_n_steps", every_n_steps), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.texts = Texts.of(texts, config, max_length, type(self).__name__)
        self.weight, self.every_n_steps, self.batch_size = weight, every_n_steps, batch_size
        self.base, self.trainer = base, trainer
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
        _check(args, model, self.base)
        self._since_log = []
        if self.weight == 0:
            return
        source = model if self.base is None else self.base
        with measuring(source), adapters_disabled(source):
            self.prompts = self.texts.prompts(source, processing_class)
        _check_prompts(model, self.base, self.prompts)
        if self.trainer is not None:
            # What they log is the dictionary that `on_log` adds to, so they come after this callback.
            callbacks = self.trainer.callback_handler.callbacks
            callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        # At the last step of every interval: at the first one of all, the model still is its base.
        if self.weight == 0 or (state.global_step + 1) % self.every_n_steps:
            return
        chosen = self._chosen(state.global_step // self.every_n_steps, args.world_size)
        model.train()  # as the Trainer does before every batch; an evaluation has left it in eval mode
        with generators_restored(), torch.enable_grad():
            # Of its own, so that the dropout of the training stays what it is, and a resumed training has the same.
            seed_generators(derived_seed(self.texts.settings.seed, "rehearsal", state.global_step, args.process_index))
            found = rehearse(
                model,
                chosen,
                self.weight,
                self.base,
                args.process_index,
                args.world_size,
                getattr(optimizer, "scaler", None),
            )
        self._since_log.append(found)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        if self._since_log and logs is not None and "loss" in logs:
            by_rank = all_gather(float(torch.stack(self._since_log).mean()))
            logs["rehearsal_kl"] = sum(by_rank) / len(by_rank)
            if state.log_history:
                state.log_history[-1]["rehearsal_kl"] = logs["rehearsal_kl"]
            self._since_log = []

    def _chosen(self, number: int, ranks: int) -> list[Prompt]:
        """The texts of a rehearsal: the next ones in turn, from the first again after the last."""
        count = -(-self.batch_size // ranks) * ranks
        return [self.prompts[(number * count + each) % len(self.prompts)] for each in range(count)]


def rehearse(
    model: Any,
    prompts: Sequence[Prompt],
    weight: float,
    base: nn.Module | None = None,
    rank: int = 0,
    ranks: int = 1,
    scaler: Any = None,
) -> Tensor:
    """Add the gradient of `weight` times the mean over all tokens of KL(base || model) to the parameters' gradients.

    Args:
        model: the model that trains, in the mode that it trains in.
        prompts: inputs of one sample each, on the CPU, the same on every rank, as many as a multiple of `ranks`.
        weight: factor of the divergence.
        base: what the model is compared with; None disables the adapter of a `PeftModel`.
        rank: number of this rank, which runs every `ranks`-th prompt.
        ranks: how many ranks run. The gradients that each finds are averaged by what trains the model.
        scaler: `torch.amp.GradScaler` of the training, if it has one.

    Returns:
        Scalar on the model's device, in nats, whose mean over all ranks is the mean KL per token.
    """
    device = next(model.parameters()).device
    own = list(prompts[rank::ranks])
    # Ranks that gather weights together must run as many forwards as each other.
    groups = [[number] for number in range(len(own))] if is_sharded_model(model) else alike(own, padding=True)
    tokens = sum(int(_batch([prompt])[1].sum()) for prompt in prompts)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for group in groups:
        inputs, counts = _batch([own[number] for number in group])
        # Found on the CPU: on an accelerator, the host would have to wait for how many there are.
        counted = counts.nonzero(as_tuple=True)
        base_scores = _base_scores(model, base, inputs, counted).to(device)
        mean = divergence(base_scores, _scores(model, inputs, counted)) * (ranks / tokens)
        loss = mean * weight
        (loss if scaler is None else scaler.scale(loss)).backward()
        total += mean.detach()
    return total


def _batch(prompts: Sequence[Prompt]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of a batch, and which predictions count, on the CPU."""
    inputs, _, counts = prediction_batch(prompts, torch.device("cpu"))
    return inputs, counts


def _scores(model: Any, inputs: dict[str, Tensor], counted: tuple[Tensor, ...]) -> Tensor:
    """The logits of a model at the tokens that count, `(tokens, vocabulary)`."""
    device = next(model.parameters()).device
    logits = next_token_logits(model, {key: value.to(device) for key, value in inputs.items()})
    return logits[tuple(place.to(device) for place in counted)]


def _base_scores(model: Any, base: Any, inputs: dict[str, Tensor], counted: tuple[Tensor, ...]) -> Tensor:
    source = model if base is None else base
    with torch.no_grad(), in_eval_mode(source), adapters_disabled(source):
        return _scores(source, inputs, counted)


def _check(args: TrainingArguments, model: Any, base: nn.Module | None) -> None:
    """Refuse a training in which there is no base, or no way into the gradients."""
    name = type(model).__name__
    if args.deepspeed_plugin is not None:
        raise ValueError(
            "RehearsalCallback cannot add to the gradients of DeepSpeed, whose engine runs the backward itself. Train "
            "with DDP or FSDP2."
        )
    if not is_gathered_by_module(model):
        raise ValueError(
            f"RehearsalCallback cannot follow {name}, whose weights are sharded by FSDP1 or tensor parallelism. Train "
            "with DDP or FSDP2 (fsdp_version: 2)."
        )
    if base is not None:
        if isinstance(base, PeftModel):
            raise ValueError(
                "base is a PeftModel, and whether its adapter is to count is not clear. Pass the checkpoint itself, or "
                "base=model.merge_and_unload()."
            )
        if {id(p) for p in base.parameters()} & {id(p) for p in model.parameters() if p.requires_grad}:
            raise ValueError(
                f"base shares weights with the {name} that trains, so it would not stay what it is. Load the "
                "checkpoint once more: base=AutoModelForCausalLM.from_pretrained(...)."
            )
        return
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"RehearsalCallback holds an adapted model to its base by disabling the adapter, but {name} is not a "
            "PeftModel: its base is gone after the first step. Train an adapter: get_peft_model(model, "
            "DowserConfig(...)), LoraConfig(...) or any other; or pass the checkpoint, loaded once more, as base=."
        )
    for adapter_name in model.active_adapters:
        if (bias := getattr(model.peft_config[adapter_name], "bias", "none")) != "none":
            raise ValueError(
                f"RehearsalCallback holds a model to its base by disabling the adapter, but bias='{bias}' of adapter "
                f"'{adapter_name}' trains biases of the base itself. Train with bias='none', or pass the checkpoint, "
                "loaded once more, as base=."
            )


def _check_prompts(model: Any, base: nn.Module | None, prompts: Sequence[Prompt]) -> None:
    """Run the longest text as a rehearsal does, so that what cannot run fails before the training."""
    lengths = []
    for number, prompt in enumerate(prompts):
        lengths.append(int(_batch([prompt])[1].sum()))
        if not lengths[-1]:
            raise ValueError(f"texts[{number}] has no token that counts: all its labels are -100. Leave it out.")
    inputs, counts = _batch([prompts[lengths.index(max(lengths))]])
    counted = counts.nonzero(as_tuple=True)
    with measuring(model):
        ours, theirs = _scores(model, inputs, counted), _base_scores(model, base, inputs, counted)
    if ours.shape != theirs.shape:
        raise ValueError(
            f"base predicts {theirs.shape[1]} tokens and {type(model).__name__} {ours.shape[1]}, so they cannot be "
            "compared. Pass the checkpoint that the model started from, with the same vocabulary."
        )
