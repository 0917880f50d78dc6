"""The methods that are compared, at the same number of trained weights on the same linears."""

import torch
from measure import LINEARS, linear_weights, linears
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model

from peft_dowser import DowserConfig

METHODS = ("full", "lora", "lora r=16", "shira", "super-tuning", "dowser")


def config_of(method: str, update_ratio: float, model: torch.nn.Module) -> PeftConfig:
    """A method's config; those with a rank get the one that comes closest to the same number of weights.

    Of a matrix of shape (out, in), LoRA and SHiRA train rank * (out + in) weights.
    """
    rank = max(1, round(update_ratio * linear_weights(model) / sum(sum(weight.shape) for weight in linears(model))))
    return {
        "lora": LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS),
        "lora r=16": LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS),
        "shira": ShiraConfig(r=rank, target_modules=LINEARS, random_seed=0),
        "super-tuning": SupertuningConfig(sparsity=1 - update_ratio, select_top=False, target_modules=LINEARS),
        # Which weights train makes no difference to the costs, so the probe is left out.
        "dowser": DowserConfig(
            update_ratio=update_ratio, score="random", target_modules=LINEARS, task_type="CAUSAL_LM"
        ),
    }[method]


def adapted(method: str, update_ratio: float, model: torch.nn.Module) -> torch.nn.Module:
    """The model as a method trains it."""
    if method != "full":
        return get_peft_model(model, config_of(method, update_ratio, model))
    model.requires_grad_(False)
    for weight in linears(model):
        weight.requires_grad_(True)
    return model
