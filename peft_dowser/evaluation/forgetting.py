"""What a training forgets, as a callback of the Trainer, and how well a model still predicts upstream texts."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.distributed import broadcast
from ..base.restoring import adapters_disabled, measuring
from ..config import DowserConfig
from ..probing.batches import alike
from ..probing.prompts import Prompt, Text
from .texts import Texts, divergence, next_token_logits, prediction_batch

logger = logging.getLogger(__name__)

_LOSSES = ("forgetting", "upstream_loss")

if TYPE_CHECKING:
    from transformers import Trainer  # slow to import


class ForgettingCallback(TrainerCallback):
    """Measure what a training forgets: the rise of the next-token loss on upstream texts.

    At the start of training, every `every_n_steps`, at every evaluation and after the last step, the console and
    the log history get `upstream_loss` (mean cross-entropy per token, in nats) and `forgetting` (its rise since the
    baseline); if requested, also `upstream_kl`, `upstream_accuracy` and `upstream_accuracy_change`. A rise of 0.01
    nats per token is small: the perplexity of the texts grows by 1 %. A rise of 0.1 is clearly visible (11 %), and 0.7
    doubles it. The baseline is the base model of a `PeftModel`, its adapter disabled, and otherwise the model before
    the training. The metrics of an evaluation get the same values as `eval_...`, so
    `metric_for_best_model="forgetting"` with `greater_is_better=False` keeps the checkpoint that forgot least. The
    model card of a Dowser adapter tells what was measured last. The callback leaves the training as it is: weights,
    modes and torch's generators.

    Args:
        texts: upstream texts, as strings for the trainer's `processing_class`, as rows of token ids, or as keyword
            arguments of the model's forward with a batch dimension of 1; `labels` among them may be -100 where a token
            does not count, and without labels the placeholders of images do not. None lets the base model write its own
            prompts, as a probe does: no data needed.
        config: number, length and seed of those prompts; None takes the defaults of `DowserConfig`.
        batch_size: texts per forward pass.
        max_length: longer texts are cut to this many tokens, except those given as keyword arguments.
        kl: also measure the mean KL(base || model) per token; needs a `PeftModel`.
        every_n_steps: measure after every so many steps too, with or without an evaluation; None does not.
        max_forgetting: stop the training at the first measurement that finds more forgetting.
        accuracy: a measure of your own, called with the model in eval mode without gradients.
        trainer: the trainer that this callback is added to. With it, the values also reach its report integrations,
            which a callback cannot reach by itself.

    Raises:
        ValueError: an argument is out of its range; or, when the training begins, the model or the training arguments
            do not allow what was asked for.

    Note: every rank measures everything, and takes the values of rank 0. A resumed training of dense weights takes its
    baseline from the log history of the checkpoint and needs the same `texts`.
    """

    def __init__(
        self,
        texts: Sequence[Text] | None = None,
        config: DowserConfig | None = None,
        batch_size: int = 8,
        max_length: int = 512,
        kl: bool = False,
        every_n_steps: int | None = None,
        max_forgetting: float | None = None,
        accuracy: Callable[[Any], float] | None = None,
        trainer: "Trainer | None" = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, or None, got {every_n_steps}.")
        if max_forgetting is not None and not 0 <= max_forgetting < math.inf:
            raise ValueError(f"max_forgetting must be a finite number of at least 0, got {max_forgetting}.")
        self.texts = Texts.of(texts, config, max_length, type(self).__name__)
        self.batch_size = batch_size
        self.kl, self.max_forgetting, self.accuracy = kl, max_forgetting, accuracy
        self.trainer, self.every_n_steps = trainer, every_n_steps
        self.prompts: list[Prompt] = []
        self.baseline: dict[str, float] = {}
        self.current: dict[str, float] | None = None  # what the weights of this step measured
        self.training = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        self._check(args, state, model)
        with measuring(model), adapters_disabled(model):
            self.prompts = self.texts.prompts(model, processing_class)
            resumes_dense = state.global_step and not isinstance(model, PeftModel)
            self.baseline = self._recorded_baseline(state) if resumes_dense else self._raw_values(model, kl=False)
        self.training = True
        if not state.global_step:
            self._measure(state, control, model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # The last step here, and not when the training has ended: now its checkpoint is not saved yet, and the progress
        # bar, which shows what is logged, is still open.
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if is_last or (self.every_n_steps and state.global_step % self.every_n_steps == 0):
            values = self._measure(state, control, model)
            self._stop_at_bound(state, control, values["forgetting"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.baseline:
            return  # an evaluation before the training
        # Several evaluation sets share one measurement.
        values = self._measure(state, control, model) if self.current is None else self.current
        if metrics is not None:
            metrics.update({f"eval_{key}": value for key, value in values.items()})
        if self.training:
            self._stop_at_bound(state, control, values["forgetting"])
        else:
            self.current = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.current is None or args.load_best_model_at_end:
            best = state.best_model_checkpoint if args.load_best_model_at_end else None
            self._measure(state, control, model, best and f"Loaded {Path(best).name}")
        self.training, self.current = False, None

    def _check(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        if self.max_forgetting is not None and args.eval_strategy == "no" and self.every_n_steps is None:
            raise ValueError(
                f"max_forgetting={self.max_forgetting} could never stop this training: forgetting is measured at "
                "evaluations and every_n_steps, eval_strategy is 'no' and every_n_steps None. Pass every_n_steps."
            )
        best = (args.metric_for_best_model or "").removeprefix("eval_")
        if best in ("forgetting", "upstream_kl") and args.greater_is_better:
            raise ValueError(
                f"metric_for_best_model='{best}' with greater_is_better=True would keep the checkpoint that forgot "
                "most; set greater_is_better=False."
            )
        if self.kl and not isinstance(model, PeftModel):
            raise ValueError(
                "kl=True compares a model with its base by disabling the adapter, but "
                f"{type(model).__name__} is not a PeftModel: its base is gone after the first step. Leave kl out."
            )
        if state.global_step and self.texts.given is None and not isinstance(model, PeftModel):
            raise ValueError(
                "ForgettingCallback cannot resume without texts: the dense model that wrote the prompts has been "
                "trained since. Train from the start with texts=[...], or without this callback."
            )

    def _recorded_baseline(self, state: TrainerState) -> dict[str, float]:
        wanted = ["upstream_loss"] if self.accuracy is None else ["upstream_loss", "upstream_accuracy"]
        for entry in state.log_history:
            if entry["step"] == 0 and all(key in entry for key in wanted):
                return {key: entry[key] for key in wanted}
        raise ValueError(
            f"ForgettingCallback cannot resume: the log history of the checkpoint has no {' and '.join(wanted)} of "
            "step 0, so the training began without this callback. Resume without it, or train from the start."
        )

    def _compared(self, model: Any) -> dict[str, float]:
        with measuring(model):
            values = self._raw_values(model, self.kl)
        values["forgetting"] = values["upstream_loss"] - self.baseline["upstream_loss"]
        if self.accuracy is not None:
            values["upstream_accuracy_change"] = values["upstream_accuracy"] - self.baseline["upstream_accuracy"]
        # One set of values on all ranks, or some might stop while others wait for them.
        return broadcast(values)

    def _raw_values(self, model: Any, kl: bool) -> dict[str, float]:
        loss, divergence = loss_on(model, self.prompts, self.batch_size, kl)
        values = {"upstream_loss": loss}
        if kl:
            values["upstream_kl"] = divergence
        if self.accuracy is not None:
            values["upstream_accuracy"] = float(self.accuracy(model))
        return values

    def _measure(
        self, state: TrainerState, control: TrainerControl, model: Any, where: str | None = None
    ) -> dict[str, float]:
        """Measure a model, and tell the console, the log history and the config of the adapter.

        `where` names the weights for the console; None where they are those of the step.
        """
        values = self.current = self._compared(model)
        for adapter_name in model.active_adapters if isinstance(model, PeftModel) else []:
            if isinstance(config := model.peft_config[adapter_name], DowserConfig):
                config.record = replace(config.record, measured=values)  # for the model card
        if self.trainer is not None:
            from transformers import Trainer  # slow to import, and here it was

            logs_later = control.should_log
            # Not a subclass's own, which would put its averages of the step, such as TRL's, into this row.
            Trainer.log(self.trainer, dict(values))
            control.should_log = logs_later  # the loss of this step is still to be logged
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})
        if state.is_world_process_zero:
            others = "".join(f", {name} {value:.4g}" for name, value in values.items() if name not in _LOSSES)
            where = where or f"Step {state.global_step}"
            tqdm.write(
                f"{where}: forgetting {values['forgetting']:.4f} nats per token (upstream_loss "
                f"{self.baseline['upstream_loss']:.4f} -> {values['upstream_loss']:.4f}){others}"
            )
        return values

    def _stop_at_bound(self, state: TrainerState, control: TrainerControl, forgetting: float) -> None:
        if self.max_forgetting is None or forgetting <= self.max_forgetting or control.should_training_stop:
            return
        control.should_training_stop = True
        if state.is_world_process_zero:
            logger.warning(
                "Training stops at step %d: the upstream loss has risen by %.4g, more than max_forgetting=%g.",
                state.global_step,
                forgetting,
                self.max_forgetting,
            )


def loss_on(model: Any, prompts: Sequence[Prompt], batch_size: int, with_kl: bool) -> tuple[float, float]:
    """Mean next-token cross-entropy per token, and mean KL(base || model) per token, 0 if not requested.

    The model is in eval mode, a `PeftModel` for the divergence, for which the base runs as well, its adapter disabled.
    Tokens that are padding, or whose label is -100, do not count. `batch_size` prompts run in one forward.
    """
    loss, total_divergence, tokens = 0.0, 0.0, 0
    for group in alike(prompts, padding=True):
        for first in range(0, len(group), batch_size):
            chosen = [prompts[number] for number in group[first : first + batch_size]]
            for scores, base_scores, targets in _scored(model, chosen, with_kl):
                loss += F.cross_entropy(scores, targets, reduction="sum").item()
                tokens += targets.numel()
                if base_scores is not None:
                    total_divergence += divergence(base_scores, scores).item()
    if not tokens:
        raise ValueError("No token of the upstream texts counts: all labels are -100, or all tokens are special ones.")
    return loss / tokens, total_divergence / tokens


def _scored(model: Any, prompts: list[Prompt], with_base: bool) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Run a batch. For each prompt, at its tokens that count: float32 logits, logits of the base, and the tokens."""
    inputs, targets, counts = prediction_batch(prompts, next(model.parameters()).device)
    logits = next_token_logits(model, inputs)
    base_logits = None
    if with_base:
        with adapters_disabled(model):
            base_logits = next_token_logits(model, inputs)
    for row, real in enumerate(counts):
        base_scores = None if base_logits is None else base_logits[row, real].float()
        yield logits[row, real].float(), base_scores, targets[row, real]
