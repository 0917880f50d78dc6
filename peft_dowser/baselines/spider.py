"""SPIDER: a dynamic mask that pulls a dense fine-tune back to its start."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..base.distributed import is_sharded_model
from ..delta.safe_files import write_tensors

# What SPIDER adds to a checkpoint: without it, a resumed run would take the half-trained weights for the base.
SPIDER_FILE = "spider.safetensors"


class SpiderCallback(TrainerCallback):
    """Pull a dense fine-tune back to its start where its gradients matter less than its weights (SPIDER, Huang 2025).

    With r(X) = sigmoid((|X| - mean|X|) / std|X|) per tensor, W* the weights at the start of training and G the sum of
    all gradients since then, every optimizer step ends with

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
                "SpiderCallback found no gradient at an optimizer step. It reads `parameter.grad`, but DeepSpeed and "
                "layer-wise optimizers keep gradients elsewhere; train without them."
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
            write_tensors({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SPIDER_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.base, self.gradients = {}, {}

    def _resume(self, path: Path, weights: dict[str, nn.Parameter]) -> None:
        if not path.is_file():
            raise ValueError(
                f"SpiderCallback cannot resume: '{path}' is missing, and no other file has the weights from before the "
                "training. Resume from a checkpoint in output_dir that was saved with SpiderCallback and without "
                "save_only_model."
            )
        saved = load_file(path)
        for name, weight in weights.items():
            checksum = saved.get(f"checksum.{name}")
            if checksum is None or checksum != _checksum(weight).cpu():
                raise ValueError(
                    f"SpiderCallback cannot resume: '{path}' belongs to other weights than the model has, for example "
                    f"for '{name}'. Resume from a checkpoint in output_dir, with the same trainable parameters."
                )
            self.base[name].copy_(saved[f"base.{name}"])
            self.gradients[name].copy_(saved[f"gradient.{name}"])


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _dense_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    if isinstance(model, PeftModel):
        raise ValueError(
            "SpiderCallback masks the dense weights of a fine-tune, but this model trains a PEFT adapter. Train the "
            "base model itself, or remove the callback."
        )
    weights = _trainable(model)
    if not weights:
        raise ValueError(
            f"SpiderCallback has nothing to mask: no parameter of {type(model).__name__} requires a gradient."
        )
    if is_sharded_model(model):
        raise ValueError(
            "SpiderCallback needs whole parameters, because its means are over whole tensors, but the parameters of "
            f"{type(model).__name__} are sharded (FSDP, ZeRO-3 or tensor parallelism). Train with DDP or on one GPU."
        )
    return weights


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pull_back(weight: Tensor, base: Tensor, gradient: Tensor) -> None:
    """W = (1 - C) W* + C W, in place; exact where C is 0 or 1, and where W has not moved."""
    wide = _wide(weight)
    start = base.to(wide)
    by_gradient, by_weight = _relative_magnitude(gradient), _relative_magnitude(start)
    share = by_gradient / (by_gradient + by_weight)
    share = share.where(by_gradient > by_weight, 0)
    mean = share.sum() / share.count_nonzero().clamp(min=1)
    share = (share / mean.where(mean > 0, 1)).clamp_(max=1)
    weight.copy_(torch.lerp(start, weight.to(wide), share))


def _relative_magnitude(tensor: Tensor) -> Tensor:
    """r: how large each entry is compared with the others of its tensor, between 0 and 1."""
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
