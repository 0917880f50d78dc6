"""Time and memory of one training step, Dowser compared with its peers.

Time: Llama of hidden size 1024, 4 layers, 512 tokens. Memory: hidden size 2048, 128 tokens; the peak above the loaded
base, in bytes per weight of the adapted linears, compared with the 20 bytes per trained weight of values, gradients,
AdamW and positions in float32. Every measurement has a process of its own; the times of several rounds are pooled.
"""

import gc
import statistics
from typing import Any

import torch
from measure import Memory, device, in_fresh_process, linear_weights, llama, no_heap, seconds
from peers import METHODS, adapted

# (dtype, rho, variant)
USUAL = [("float32", 0.1, "plain"), ("bfloat16", 0.1, "plain")]
RATIOS = [(dtype, ratio, "plain") for dtype in ("float32", "bfloat16") for ratio in (0.01, 0.5)]
VARIANTS = [("float32", 0.1, "checkpointed"), ("bfloat16", 0.1, "checkpointed"), ("float32", 0.1, "compiled")]


def measure(rounds: int, settings: list[tuple[str, float, str]]) -> list[dict[str, Any]]:
    rows = []
    for dtype, ratio, variant in settings:
        times: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(rounds):
            for method in METHODS:
                found = in_fresh_process(measure_step, method, ratio, 1024, 512, dtype, 7, variant)
                times[method].append(found["seconds"])
        group = []
        for method in METHODS:
            with no_heap():
                found = in_fresh_process(measure_step, method, ratio, 2048, 128, dtype, 2, variant)
            group.append(
                {
                    "dtype": dtype,
                    "rho": ratio,
                    "variant": variant,
                    "method": method,
                    "trained": found["trained"],
                    "seconds": statistics.median(times[method]),
                    "bytes_per_weight": found["bytes_per_weight"],
                    "memory_over_state": found["bytes_per_weight"] / (20 * found["trained"]),
                }
            )
        rows += with_ratios(group)
    return rows


def with_ratios(group: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One setting's rows, each with Dowser's time and memory relative to it."""
    (ours,) = (row for row in group if row["method"] == "dowser")
    for row in group:
        row["dowser_time"] = ours["seconds"] / row["seconds"]
        row["dowser_memory"] = ours["bytes_per_weight"] / row["bytes_per_weight"]
    return group


def measure_step(
    method: str, update_ratio: float, hidden: int, tokens: int, dtype: str, repetitions: int, variant: str = "plain"
) -> dict[str, float]:
    """One method in this process: seconds per step, and bytes at the peak per base weight."""
    model = llama(hidden, dtype=dtype)
    count = linear_weights(model)
    gc.collect()
    memory = Memory()
    model = adapted(method, update_ratio, model).train()
    if variant == "checkpointed":
        # transformers 5.24 renames the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(1000, (1, tokens), device=device())
    forward = torch.compile(model) if variant == "compiled" else model
    gc.collect()
    memory.restart()

    def step() -> None:
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    elapsed = seconds(step, repetitions, warmups=2)
    return {
        "seconds": elapsed,
        "bytes_per_weight": memory.peak() / count,
        "trained": sum(parameter.numel() for parameter in trained) / count,
    }
