"""How a base layer stores its weight: as a plain tensor, quantized, or offloaded until a forward asks for it."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Conv1D

from .._peft import QuantizationBackend, resolve_quantization_backend
from .._transformers import kept_in_float32
from .distributed import shape_of


def backend_of(layer: nn.Module, requantize: Any = None) -> QuantizationBackend | None:
    """PEFT's access to a quantized layer; None where the layer is not quantized.

    `requantize` is how torchao quantizes a weight again, as PEFT finds it in the model.
    """
    if type(layer) in (nn.Linear, Conv1D) and type(layer.weight) is nn.Parameter:
        return None  # the common case, without asking for every library
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=requantize or _unknown)


def _unknown() -> Any:
    raise ValueError(
        "How this torchao base was quantized is not known, so nothing can be merged into it. Quantize it by loading it "
        "with transformers' TorchAoConfig, or merge into the base in floating point."
    )


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from packing 4-bit weights for its kernel for CPUs with AVX-512, which has no backward."""
    packing: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    try:
        for module in packing:
            unpack(module)
        yield
    finally:
        for module in packing:
            module.support_avx512bf16_for_cpu = True


def autocast_dtype(model: nn.Module) -> torch.dtype | None:
    """The half dtype of a model that runs only under autocast; None of a model that runs without it.

    Parts of such a model, for example its norms, were made wider, as is usual for training under autocast. Parts that
    the class of the model keeps in float32, as in T5, do not count: its own code casts for them.
    """
    kept = kept_in_float32(model)
    weights: Counter[torch.dtype] = Counter()
    for name, parameter in model.named_parameters():
        computes = parameter.is_floating_point() and parameter.element_size() > 1  # others are quantized
        if computes and not any(re.search(rf"(^|\.){part}(\.|$)", name) for part in kept):
            weights[parameter.dtype] += math.prod(shape_of(parameter))
    most = max(weights, key=weights.__getitem__, default=torch.float32)
    return most if len(weights) > 1 and most.itemsize == 2 else None


def unpack(layer: Any) -> None:
    """Give a 4-bit layer of bitsandbytes on a CPU the storage that has a backward, permanently."""
    if getattr(layer, "support_avx512bf16_for_cpu", False):
        layer.state_dict()  # a packed weight is unpacked to be saved
        layer.support_avx512bf16_for_cpu = False


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes, even if its weights are offloaded to another place."""
    hook = offload_hook(module)
    if hook is not None:
        return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
    tensor = next(iter((*module.parameters(), *module.buffers())))
    # FSDP2 may keep its parts on the CPU.
    return torch.device(tensor.device_mesh.device_type) if isinstance(tensor, DTensor) else tensor.device


def offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """The hook of accelerate that loads the weights of an offloaded module; None of a module that is not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module has another forward than its class, which may do more than its weight says.

    A forward of accelerate that only moves inputs to the device of the weights does not count: every linear of a base
    on several devices has one.
    """
    hook, forward = getattr(module, "_hf_hook", None), module.__dict__.get("forward")
    moves = isinstance(hook, AlignDevicesHook) and not hook.offload and not hook.io_same_device
    if moves and isinstance(forward, partial) and forward.func.__module__ == AlignDevicesHook.__module__:
        forward = module.__dict__["_old_forward"]
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    hook = offload_hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def check_materialized(model: nn.Module) -> None:
    missing = on_meta(model)
    if missing:
        raise ValueError(
            f"{len(missing)} parameters of {type(model).__name__} are on the meta device, '{missing[0]}' the first. "
            "Scores need the real weights: load them before adding the adapter."
        )


def on_meta(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_meta and offload_hook(module) is None
    ]
