"""Trainer callbacks: what a fine-tune forgets, and SPIDER's dynamic mask for dense weights."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import DowserConfig
from .prompts import Prompt
from .upstream import Text, adapters_disabled, base_of, loss_on, measuring, read_prompts, written_prompts

if TYPE_CHECKING:
    from transformers import Trainer  # slow to import

logger = logging.getLogger(__name__)

# What SPIDER adds to a checkpoint: without it, a resumed run would take the half-trained weights for the base.
SPIDER_FILE = "spider.safetensors"


class ForgettingCallback(TrainerCallback):
    """Measure what a training forgets: the rise of the next-token loss on upstream texts.

    At the begin of the training, at every evaluation and at the end, the log history gets an entry with
    `upstream_loss` (mean cross-entropy per token) and `forgetting` (its rise since the baseline); where asked for, also
    `upstream_kl`, `upstream_accuracy` and `upstream_accuracy_change`. The baseline is the base model of a `PeftModel`,
    its adapter disabled, and otherwise the model before the training. The metrics of an evaluation get the same values
    as `eval_...`, so `metric_for_best_model="forgetting"` with `greater_is_better=False` keeps the checkpoint that
    forgot least. The model card of a Dowser adapter tells what was measured last. The training itself does not change:
    neither weights, modes nor torch's generators.

    Args:
        texts: upstream texts, as strings for the trainer's `processing_class`, as rows of token ids, or as keyword
            arguments of the model's forward with a batch dimension of 1; `labels` among them may be -100 where a token
            shall not count. None lets the base model write its own prompts, as a probe does: no data needed.
        config: number, length and seed of those prompts; None takes the defaults of `DowserConfig`.
        batch_size: texts per forward pass.
        max_length: longer texts are cut to this many tokens, except those given as keyword arguments.
        kl: also measure the mean KL(base || model) per token; needs a `PeftModel`.
        max_forgetting: stop the training at the first evaluation that finds more forgetting.
        accuracy: a measure of your own, called with the model in eval mode without gradients.
        trainer: the trainer that this callback is added to. With it, the values also reach its report integrations,
            which are out of the reach of a callback.

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
        max_forgetting: float | None = None,
        accuracy: Callable[[Any], float] | None = None,
        trainer: "Trainer | None" = None,
    ) -> None:
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single string; pass [text].")
        if texts is not None and not len(texts):
            raise ValueError("texts is empty: pass at least one text, or None for prompts that the model writes.")
        if texts is not None and config is not None:
            raise ValueError("config is for the prompts that the model writes, so it cannot go with texts; drop one.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, or no token has a next one, got {max_length}.")
        if max_forgetting is not None and not 0 <= max_forgetting < math.inf:
            raise ValueError(f"max_forgetting must be a finite number of at least 0, got {max_forgetting}.")
        self.texts = texts
        self.config = DowserConfig() if config is None else config
        self.batch_size, self.max_length = batch_size, max_length
        self.kl, self.max_forgetting, self.accuracy = kl, max_forgetting, accuracy
        self.trainer = trainer
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
            if self.texts is None:
                self.prompts = written_prompts(base_of(model), self.config)
            else:
                self.prompts = read_prompts(self.texts, processing_class, self.max_length)
            resumes_dense = state.global_step and not isinstance(model, PeftModel)
            self.baseline = self._recorded_baseline(state) if resumes_dense else self._measured(model, kl=False)
        self.training = True
        if not state.global_step:
            self._log(state, model, self._compared(model))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.current = None

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
        if self.current is None:  # several evaluation sets share one measurement
            self._log(state, model, self._compared(model))
        values = self.current or {}
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
            self._log(state, model, self._compared(model))
        self.training, self.current = False, None

    def _check(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        if self.max_forgetting is not None and args.eval_strategy == "no":
            raise ValueError(
                f"max_forgetting={self.max_forgetting} could never stop this training: forgetting is measured at "
                "evaluations, and eval_strategy is 'no'. Pass an eval_dataset and eval_strategy='steps' or 'epoch'."
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
                f"{type(model).__name__} is no PeftModel: its base is gone after the first step. Leave kl out."
            )
        if state.global_step and self.texts is None and not isinstance(model, PeftModel):
            raise ValueError(
                "ForgettingCallback cannot resume without texts: the dense model that wrote the prompts has been "
                "trained since. Train from the start with texts=[...], or without this callback."
            )

    def _recorded_baseline(self, state: TrainerState) -> dict[str, float]:
        """The baseline of a resumed training, from its log history."""
        wanted = ["upstream_loss"] if self.accuracy is None else ["upstream_loss", "upstream_accuracy"]
        for entry in state.log_history:
            if entry["step"] == 0 and all(key in entry for key in wanted):
                return {key: entry[key] for key in wanted}
        raise ValueError(
            f"ForgettingCallback cannot resume: the log history of the checkpoint has no {' and '.join(wanted)} of "
            "step 0, so the training began without this callback. Resume without it, or train from the start."
        )

    def _compared(self, model: Any) -> dict[str, float]:
        """The values of a model, and how they differ from the baseline."""
        with measuring(model):
            values = self._measured(model, self.kl)
        values["forgetting"] = values["upstream_loss"] - self.baseline["upstream_loss"]
        if self.accuracy is not None:
            values["upstream_accuracy_change"] = values["upstream_accuracy"] - self.baseline["upstream_accuracy"]
        return _of_rank_0(values)

    def _measured(self, model: Any, kl: bool) -> dict[str, float]:
        loss, divergence = loss_on(model, self.prompts, self.batch_size, kl)
        values = {"upstream_loss": loss}
        if kl:
            values["upstream_kl"] = divergence
        if self.accuracy is not None:
            values["upstream_accuracy"] = float(self.accuracy(model))
        return values

    def _log(self, state: TrainerState, model: Any, values: dict[str, float]) -> None:
        self.current = values
        for adapter_name in model.active_adapters if isinstance(model, PeftModel) else []:
            if isinstance(config := model.peft_config[adapter_name], DowserConfig):
                config._forgetting = values  # for the model card
        if self.trainer is not None:
            self.trainer.log(dict(values))
        else:
            state.log_history.append({**values, "epoch": state.epoch, "step": state.global_step})

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


class SpiderCallback(TrainerCallback):
    """Pull a dense fine-tune back to its start where its gradients matter less than its weights (SPIDER, Huang 2025).

    With r(X) = sigmoid((|X| - mean|X|) / std|X|) per tensor, W* the weights at the begin of the training and G the sum
    of all gradients since then, every optimizer step ends with

        C = r(G) / (r(G) + r(W*)) where r(G) > r(W*), 0 elsewhere
        C = min(1, C / mean of the non-zeros of C)
        W = (1 - C) W* + C W

    for every trainable tensor. Works in any `Trainer` that trains dense weights; there is nothing to set. Checkpoints
    get one more file, and a resumed training continues from it.

    Note: keeps W*, in the dtype of the weights, and G, at least float32; a checkpoint holds both. Computes in float32
    and rounds once. A step that a gradient scaler skips, because a gradient is not finite, changes nothing. A tensor
    of equal magnitudes has r = 1/2, and one of zeros r = 0.
    """

    def __init__(self) -> None:
        self.base: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.skips = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        weights = _dense_weights(model)
        self.base = {name: weight.detach().clone() for name, weight in weights.items()}
        self.gradients = {name: torch.zeros_like(weight, dtype=_wide(weight)) for name, weight in weights.items()}
        if state.global_step:
            self._resume(_checkpoint(args, state) / SPIDER_FILE, weights)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        found = {name: weight.grad for name, weight in _trainable(model).items() if weight.grad is not None}
        if not found:
            raise ValueError(
                "SpiderCallback found no gradient at an optimizer step. It needs those of `parameter.grad`, and "
                "DeepSpeed and layer-wise optimizers keep theirs elsewhere; train without them."
            )
        self.skips = not all(bool(gradient.isfinite().all()) for gradient in found.values())
        if not self.skips:
            for name, gradient in found.items():
                self.gradients[name] += gradient

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.skips:
            return
        for name, weight in _trainable(model).items():
            _pull_back(weight.data, self.base[name], self.gradients[name])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        folder = _checkpoint(args, state)
        if args.should_save and not args.save_only_model and folder.is_dir():
            weights = _trainable(model)
            tensors = {f"base.{name}": tensor for name, tensor in self.base.items()}
            tensors |= {f"gradient.{name}": tensor for name, tensor in self.gradients.items()}
            tensors |= {f"checksum.{name}": _checksum(weight) for name, weight in weights.items()}
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SPIDER_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.base, self.gradients = {}, {}

    def _resume(self, path: Path, weights: dict[str, nn.Parameter]) -> None:
        if not path.is_file():
            raise ValueError(
                f"SpiderCallback cannot resume: '{path}' is missing, and the weights before the training are in no "
                "other file. Resume from a checkpoint in output_dir that was saved with SpiderCallback and without "
                "save_only_model."
            )
        saved = load_file(path)
        for name, weight in weights.items():
            checksum = saved.get(f"checksum.{name}")
            if checksum is None or checksum != _checksum(weight).cpu():
                raise ValueError(
                    f"SpiderCallback cannot resume: '{path}' belongs to other weights than those of the model, "
                    f"'{name}' the first. Resume from a checkpoint in output_dir, with the same trainable parameters."
                )
            self.base[name].copy_(saved[f"base.{name}"])
            self.gradients[name].copy_(saved[f"gradient.{name}"])


def _of_rank_0(values: dict[str, float]) -> dict[str, float]:
    """One set of values on all ranks, or some might stop while others wait for them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values
    shared: list[Any] = [values]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _dense_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model that SPIDER can train."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "SpiderCallback masks the dense weights of a fine-tune, but this model trains an adapter of PEFT. Train "
            "the base model itself, or remove the callback."
        )
    weights = _trainable(model)
    if not weights:
        raise ValueError(
            f"SpiderCallback has nothing to mask: no parameter of {type(model).__name__} requires a gradient."
        )
    all_sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    sharded = [name for name, weight in weights.items() if all_sharded or _is_sharded(weight)]
    if sharded:
        raise ValueError(
            f"SpiderCallback needs whole parameters, because its means are over whole tensors, but {len(sharded)} are "
            f"sharded (FSDP, ZeRO-3 or tensor parallelism), '{sharded[0]}' the first. Train with DDP or on one GPU."
        )
    return weights


def _is_sharded(weight: nn.Parameter) -> bool:
    return isinstance(weight, DTensor) or hasattr(weight, "ds_id")  # the mark that ZeRO-3 leaves


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pull_back(weight: Tensor, base: Tensor, gradient: Tensor) -> None:
    """W = (1 - C) W* + C W, in place; exact where C is 0 or 1, and where W has not moved."""
    wide = _wide(weight)
    start = base.to(wide)
    by_gradient, by_weight = _rank(gradient), _rank(start)
    share = by_gradient / (by_gradient + by_weight)
    share = share.where(by_gradient > by_weight, 0)
    mean = share.sum() / share.count_nonzero().clamp(min=1)
    share = (share / mean.where(mean > 0, 1)).clamp_(max=1)
    weight.copy_(torch.lerp(start, weight.to(wide), share))


def _rank(tensor: Tensor) -> Tensor:
    """r: how large the entries are among those of their tensor, between 0 and 1."""
    magnitude = tensor.abs()
    least, most = magnitude.aminmax()
    spread, mean = torch.std_mean(magnitude, correction=int(magnitude.numel() > 1))
    level = (magnitude.sub_(mean) / spread).where(least < most, 0)
    return level.sigmoid_().where(most > 0, 0)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _checksum(tensor: Tensor) -> Tensor:
    """Changes with the bits of a tensor, and is the same on every device."""
    return tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
