"""The compared methods as data: which adapter each puts on the base. All of them adapt the linears of the decoder.

Every method is an adapter in float32 on a base that does not change, full fine-tuning too, which trains all weights of
the same matrices. So each can be scaled, and each can be disabled to rehearse.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, PeftConfig
from peft.optimizers import create_lorafa_optimizer
from torch import nn

from peft_dowser import DowserConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# Settings of a DowserConfig.
SPARSE: dict[str, dict[str, Any]] = {
    "full": {"score": "random", "update_ratio": 1.0},
    "random": {"score": "random"},
    "magnitude": {"score": "magnitude"},
    "magnitude, high": {"score": "magnitude", "select": "high"},
    "wanda": {"score": "wanda"},
    "dowser": {"score": "dowser"},
    "dowser, high": {"score": "dowser", "select": "high"},
    "dowser, model": {"score": "dowser", "scope": "model"},
    "shift": {"score": "shift"},
    "shift, high": {"score": "shift", "select": "high"},
    "shift, model": {"score": "shift", "scope": "model"},
    "columns, activity": {"score": "activity", "granularity": "input_channel"},
    "columns, activity, 16": {"score": "activity", "granularity": "input_channel", "channels": 16},
    "columns, shift": {"score": "shift", "granularity": "input_channel"},
    "columns, dowser": {"score": "dowser", "granularity": "input_channel"},
    "columns, random": {"score": "random", "granularity": "input_channel"},
}
# Configs of PEFT.
PEERS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "lora r=16": (LoraConfig, {"r": 16, "lora_alpha": 32}),
    "lora r=64": (LoraConfig, {"r": 64, "lora_alpha": 128}),
    "lora-fa r=16": (LoraConfig, {"r": 16, "lora_alpha": 32}),  # trains B only, see `optimizer`
    "oft": (OFTConfig, {"oft_block_size": 32}),
}
METHODS = (*SPARSE, *PEERS)
UNSCALED = ("oft",)  # a rotation has no scale
# These have a size of their own; the others train a share rho of the weights.
FIXED_SIZE = ("full", "columns, activity, 16", *PEERS)


def is_probed(method: str) -> bool:
    """Whether the method chooses by a probe of the base."""
    return method in SPARSE and SPARSE[method]["score"] not in ("random", "magnitude")


def optimizer(method: str, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer | None:
    """The optimizer that belongs to a method; None where the Trainer's is meant."""
    if method != "lora-fa r=16":
        return None
    settings = PEERS[method][1]
    return create_lorafa_optimizer(model, settings["r"], settings["lora_alpha"], learning_rate)  # type: ignore[arg-type]


def config(method: str, update_ratio: float, seed: int, statistics: Path | None = None) -> PeftConfig:
    """The config of a method.

    Args:
        method: one of `METHODS`.
        update_ratio: rho.
        seed: of random masks.
        statistics: file of a probe, for the methods that choose by one.

    Raises:
        TypeError, ValueError: peft-dowser or PEFT has no such setting.
    """
    if method in PEERS:
        kind, settings = PEERS[method]
        return kind(target_modules=LINEARS, task_type="CAUSAL_LM", **settings)
    common: dict[str, Any] = {"seed": seed, "target_modules": LINEARS, "task_type": "CAUSAL_LM"}
    if "channels" not in SPARSE[method]:
        common["update_ratio"] = update_ratio
    probed = {} if statistics is None else {"statistics": str(statistics)}
    return DowserConfig(**(common | probed | SPARSE[method]))
