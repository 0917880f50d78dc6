"""What `torch.compile` puts around modules and into names, and how to do without it for a while.

The wrapper of a compiled module adds a part to the name of everything inside it. Files, configs and messages use the
names that a model has without compilation; torch finds a module by these names, too.
"""

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

_WRAPPED = "_orig_mod"


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of `torch.compile`, or the model itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def uncompiled_name(name: str) -> str:
    """The name that a module, parameter or buffer has without compilation."""
    return name.replace(f"{_WRAPPED}.", "")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that they have without compilation; a compiled one is still in its wrapper."""
    named = model.named_modules()
    return {uncompiled_name(name): module for name, module in named if name.rpartition(".")[2] != _WRAPPED}
