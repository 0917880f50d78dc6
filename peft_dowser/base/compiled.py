"""What `torch.compile` puts around modules and into names, and how to do without it for a while.

A module in the place of another one takes part in the names of all that is inside it. Files, configs and messages have
the names that a model has where nothing is compiled; torch finds a module under these as well.
"""

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

_WRAPPED = "_orig_mod"


def uncompiled(model: nn.Module) -> nn.Module:
    """The model itself, where this is what `torch.compile` has made of it."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def usual_name(name: str) -> str:
    """The name of a module, parameter or buffer where nothing is compiled."""
    return name.replace(f"{_WRAPPED}.", "")


def usual_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their usual names; what is compiled by itself stands for what is inside it."""
    return {usual_name(name): module for name, module in model.named_modules() if name.rpartition(".")[2] != _WRAPPED}
