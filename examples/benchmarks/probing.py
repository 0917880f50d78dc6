"""The cost of a probe beside its floor: one forward and R backwards of activation gradients, written out by hand.

    python examples/benchmarks/probing.py --output probing.json

Both take the same prompts in one batch; generating prompts is measured on its own. The peak of memory is given for two
widths: statistics grow with (out + in), weights with (out x in).
"""

import argparse
import gc
from pathlib import Path

import torch
from measure import LINEARS, Memory, device, in_fresh_process, linear_weights, llama, report, seconds

from peft_dowser import DowserConfig, probe


def by_hand(model: torch.nn.Module, ids: torch.Tensor, num_rademacher: int) -> None:
    """The arithmetic that no probe can do without."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[:, -1]
    for number in range(num_rademacher):
        signs = torch.randint(2, logits.shape, device=logits.device).to(logits.dtype) * 2 - 1
        torch.autograd.grad(logits, embedded, signs, retain_graph=number + 1 < num_rademacher)


def measure_time(hidden: int, dtype: str, probes: int, length: int, num_rademacher: int) -> dict[str, float]:
    model = llama(hidden, dtype=dtype).requires_grad_(False).eval()
    ids = torch.randint(1000, (probes, length), device=device())
    config = DowserConfig(num_rademacher=num_rademacher, probe_batch_size=probes, target_modules=LINEARS)
    generated = DowserConfig(
        num_probes=probes, num_rademacher=1, probe_length=length, probe_batch_size=probes, target_modules=LINEARS
    )
    rows = list(ids)
    one_backward = DowserConfig(num_rademacher=1, probe_batch_size=probes, target_modules=LINEARS)
    floor = seconds(lambda: by_hand(model, ids, num_rademacher), 5)
    ours = seconds(lambda: probe(model, config, prompts=rows), 5)
    floor_again = seconds(lambda: by_hand(model, ids, num_rademacher), 5)
    without = seconds(lambda: probe(model, one_backward, prompts=rows), 3)
    with_generation = seconds(lambda: probe(model, generated), 3)
    return {
        "by_hand_seconds": (floor + floor_again) / 2,
        "probe_seconds": ours,
        "ratio": 2 * ours / (floor + floor_again),
        "generation_seconds": with_generation - without,
    }


def measure_memory(hidden: int, dtype: str, probes: int, length: int) -> dict[str, float]:
    model = llama(hidden, dtype=dtype).requires_grad_(False).eval()
    ids = torch.randint(1000, (probes, length), device=device())
    config = DowserConfig(num_rademacher=2, probe_batch_size=probes, target_modules=LINEARS)
    gc.collect()
    memory = Memory()
    memory.restart()
    by_hand(model, ids, 2)
    floor = memory.peak()
    gc.collect()
    memory.restart()
    probe(model, config, prompts=list(ids))
    return {"linear_weights": linear_weights(model), "by_hand_peak_bytes": floor, "probe_peak_bytes": memory.peak()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of a probe.")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--num-probes", type=int, default=8)
    parser.add_argument("--num-rademacher", type=int, default=8)
    parser.add_argument("--probe-length", type=int, default=64)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    batch = (options.num_probes, options.probe_length)
    results = {
        "setting": {key: value for key, value in vars(options).items() if key != "output"},
        "time": in_fresh_process(measure_time, options.hidden, options.dtype, *batch, options.num_rademacher),
        "memory": {
            hidden: in_fresh_process(measure_memory, hidden, options.dtype, *batch)
            for hidden in (options.hidden, 2 * options.hidden)
        },
    }
    report("probing", results, options.output)


if __name__ == "__main__":
    main()
