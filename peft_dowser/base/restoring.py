"""Contexts that change a model for a while: modes, generators and adapters are restored, whatever happens meanwhile."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from ..delta.seeds import generators_restored
from .distributed import reshard
from .storage import autocast_dtype, differentiable


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Freeze the model, put it into eval mode, and restore everything that a probe changes."""
    reshard(model)
    # By name: an offloaded parameter is another object after every forward.
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.enter_context(generators_restored())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(in_eval_mode(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # taps and batches would compile layers anew
        stack.enter_context(differentiable(model))
        dtype = autocast_dtype(model)
        for device_type in _autocast_devices():
            stack.enter_context(torch.autocast(device_type, dtype, enabled=dtype is not None))
        try:
            model.requires_grad_(False)
            yield
        finally:
            reshard(model)
            for name in trainable:
                model.get_parameter(name).requires_grad_(True)


def _autocast_devices() -> set[str]:
    """The devices where autocast may be on. Parameters do not tell: an offloaded base may have them elsewhere."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return {"cpu"} if accelerator is None else {"cpu", accelerator.type}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, after which every module is in the mode that it was in, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; modes and torch's generators are restored."""
    with generators_restored(), torch.no_grad(), in_eval_mode(model):
        yield


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """The base of a `PeftModel`; PEFT itself would leave every active adapter trainable."""
    if not isinstance(model, PeftModel):
        yield
        return
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def base_of(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
