"""What a training step asks of the host of a GPU: kernels to launch, numbers to wait for, and time. No GPU is needed.

Kernels of the linears of a Llama of 7 billion weights at 4096 tokens and rho = 0.1, counted with tensors that have
shapes and no data: operations that only look at memory in another way, or allocate it, do not count. What waits for a
number of such a tensor fails, so there is nothing of the kind. "checkpointed" runs the forward twice.

Kernels and waits of one layer of experts, 128 of which each token goes to 8, with small matrices of real numbers, the
base's own included: which experts have rows decides how many kernels a loop launches.

Host time of a small linear in bfloat16 and of its backward, above that of full fine-tuning: CPU time, in which the work
itself hardly counts. The methods take turns. The tensors say that they are not on a CPU, so that the way of a GPU runs;
it is the least of many repetitions, since what disturbs a machine only adds to a time.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_dowser import DowserConfig

# The linears of a layer of Llama-7B: shape, and how many there are.
LLAMA_7B = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
LAYERS = 32
TOKENS = 4096

LINEARS = 32  # of which the time is taken, one after the other

_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::_unsafe_view"}
_WAITS = ("item", "tolist", "nonzero", "unique", "cpu", "__int__", "__bool__", "__float__", "__index__", "__getitem__")


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = [linears(method, dtype) for dtype in ("bfloat16", "float32") for method in ("full", "lora r=16", "dowser")]
    rows += [experts(implementation, adapt) for implementation in ("eager", "grouped_mm") for adapt in (False, True)]
    for autocast in (False, True):
        rows += host_time(50 * rounds, autocast)
    return rows


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not func.is_view and name not in _ALLOCATIONS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_waits() -> Iterator[Counter[str]]:
    """Count what makes the host wait for numbers of a tensor, in a backward too, where torch leaves out modes."""
    counts: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            index = args[0] if name == "__getitem__" else None
            counts[name] += name != "__getitem__" or (isinstance(index, Tensor) and index.dim() == 0)
            return original(self, *args, **kwargs)

        return method

    with ExitStack() as patches:
        for name in _WAITS:
            patches.enter_context(patch.object(Tensor, name, counting(name)))
        yield counts


@contextmanager
def not_on_a_cpu() -> Iterator[None]:
    """Tensors on a CPU say that they are somewhere else."""
    with patch.object(Tensor, "is_cpu", False):
        yield


def config_of(method: str, **targets: Any) -> PeftConfig:
    if method == "dowser":
        return DowserConfig(score="random", **targets)
    return LoraConfig(r=16, **targets)


def adapted(method: str, model: nn.Sequential) -> nn.Module:
    """All linears of a sequence as a method trains them."""
    names = [str(number) for number in range(len(model))]
    return model if method == "full" else get_peft_model(model, config_of(method, target_modules=names))


def linears(method: str, dtype: str) -> dict[str, Any]:
    forward = backward = 0
    for (out, width), count in LLAMA_7B.items():
        linear = nn.Linear(width, out, bias=False, dtype=getattr(torch, dtype))
        model = adapted(method, nn.Sequential(linear)).to("meta")
        x = torch.empty(1, TOKENS, width, dtype=getattr(torch, dtype), device="meta", requires_grad=True)
        with Launches() as launched:
            output = model(x)
        forward += count * launched.counts.total()
        with Launches() as launched:
            output.backward(torch.empty_like(output))
        backward += count * launched.counts.total()
    return {
        "what": "7B",
        "method": method,
        "dtype": dtype,
        "kernels": LAYERS * (forward + backward),
        "checkpointed": LAYERS * (2 * forward + backward),
        "waits": 0,
    }


def experts(implementation: str, adapt: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=100,
    )
    model: Any = Qwen3MoeForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
    model.set_experts_implementation(implementation)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    if adapt:
        model = get_peft_model(model, config_of("dowser", target_modules=[], target_parameters=parameters))
    layer = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    x = torch.randn(1, 512, 32, dtype=torch.bfloat16, requires_grad=True)
    with not_on_a_cpu(), Launches() as launched, counted_waits() as waits:
        layer(x).sum().backward()
    return {
        "what": "experts",
        "method": "dowser" if adapt else "no adapter",
        "dtype": f"bfloat16, {implementation}",
        "kernels": launched.counts.total(),
        "waits": waits.total(),
    }


def host_time(repetitions: int, autocast: bool) -> list[dict[str, Any]]:
    with not_on_a_cpu():
        steps = {method: _small_step(method, autocast) for method in ("full", "lora r=16", "dowser")}
        times: dict[str, list[float]] = {method: [] for method in steps}
        for _ in range(repetitions):
            for method, step in steps.items():
                started = time.process_time()
                step()
                times[method].append(time.process_time() - started)
    least = {method: 1e6 * min(found) / LINEARS for method, found in times.items()}
    above = {method: found - least["full"] for method, found in least.items()}
    return [
        {
            "what": "host",
            "method": method,
            "dtype": "bfloat16" + ", autocast" * autocast,
            "microseconds": least[method],
            "above_full": above[method],
            "over_lora": above[method] / above["lora r=16"],
        }
        for method in steps
    ]


def _small_step(method: str, autocast: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    linears = [nn.Linear(16, 16, bias=False, dtype=torch.bfloat16) for _ in range(LINEARS)]
    model = adapted(method, nn.Sequential(*linears))
    x = torch.randn(1, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    grad: Tensor = torch.ones_like(x)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x)
        output.backward(grad)
        for parameter in model.parameters():
            parameter.grad = None

    return step
