"""Time and memory of one training step, Dowser beside its peers at the same number of trained weights.

    python examples/benchmarks/training_step.py --output step.json

Time: Llama of hidden size 1024, float32, 512 tokens. Memory: hidden size 2048, bfloat16, 128 tokens; the peak above the
loaded base, in bytes per weight of the adapted linears. Every measurement has a process of its own; the times of
several rounds are pooled. All four layers' linears are adapted, at rho = 0.1 unless told otherwise.
"""

import argparse
import gc
import statistics
from pathlib import Path

import torch
from measure import LINEARS, Memory, device, in_fresh_process, linear_weights, llama, report, seconds
from peft import LoraConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model

from peft_dowser import DowserConfig

METHODS = ("full", "lora", "shira", "super-tuning", "dowser")


def config_of(method: str, update_ratio: float, hidden: int) -> PeftConfig | None:
    """The peers' configs; the low-rank ones get the rank that comes closest to the same number of weights."""
    # Square matrices of (hidden, hidden): r * 2 * hidden weights against rho * hidden^2.
    rank = max(1, round(update_ratio * hidden / 2))
    return {
        "full": None,
        "lora": LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEARS),
        "shira": ShiraConfig(r=rank, target_modules=LINEARS, random_seed=0),
        "super-tuning": SupertuningConfig(sparsity=1 - update_ratio, select_top=False, target_modules=LINEARS),
        # Which weights train makes no difference to the cost of a step, so the probe is left out.
        "dowser": DowserConfig(update_ratio=update_ratio, score="magnitude", target_modules=LINEARS),
    }[method]


def measure_step(
    method: str, update_ratio: float, hidden: int, tokens: int, dtype: str, repetitions: int
) -> dict[str, float]:
    """One method in this process: seconds per step, and bytes at the peak per base weight."""
    model = llama(hidden, dtype=dtype)
    count = linear_weights(model)
    gc.collect()
    memory = Memory()
    config = config_of(method, update_ratio, hidden)
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.removesuffix(".weight").endswith(tuple(LINEARS)))
    else:
        model = get_peft_model(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(1000, (1, tokens), device=device())
    gc.collect()
    memory.restart()

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    elapsed = seconds(step, repetitions, warmups=2)
    return {
        "seconds": elapsed,
        "bytes_per_weight": memory.peak() / count,
        "trained": sum(parameter.numel() for parameter in trained) / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a training step.")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--update-ratio", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {method: [] for method in options.methods}
    for _ in range(options.rounds):
        for method in options.methods:
            found = in_fresh_process(measure_step, method, options.update_ratio, 1024, 512, "float32", 7)
            times[method].append(found["seconds"])
    for method in options.methods:
        found = in_fresh_process(measure_step, method, options.update_ratio, 2048, 128, "bfloat16", 2)
        results[method] = {
            "seconds": statistics.median(times[method]),
            "bytes_per_weight": found["bytes_per_weight"],
            "trained": found["trained"],
        }
    for peer in ("full", "super-tuning"):
        if peer in results:
            for found in results.values():
                found[f"time_over_{peer}"] = found["seconds"] / results[peer]["seconds"]
                found[f"memory_over_{peer}"] = found["bytes_per_weight"] / results[peer]["bytes_per_weight"]
    report("training step", {"update_ratio": options.update_ratio, "methods": results}, options.output)


if __name__ == "__main__":
    main()
