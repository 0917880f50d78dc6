"""The cost of a probe compared with its floor: one forward and R backwards of activation gradients, written by hand;
and with the paper's code: a forward for each of the R backwards, gradients of the weights too, and a dense accumulator
for every weight.

All take the same prompts in one batch; generating prompts is measured on its own. The peak of memory is given for two
widths: statistics grow with (out + in), weights with (out x in).
"""

import gc
import statistics
from typing import Any

import torch
from measure import LINEARS, Memory, device, in_fresh_process, linear_weights, llama, no_heap, seconds

from peft_dowser import DowserConfig, probe


def by_hand(model: torch.nn.Module, ids: torch.Tensor, num_rademacher: int) -> None:
    """The arithmetic that no probe can do without."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=1).logits[:, -1]
    for number in range(num_rademacher):
        signs = torch.randint(2, logits.shape, device=logits.device).to(logits.dtype) * 2 - 1
        torch.autograd.grad(logits, embedded, signs, retain_graph=number + 1 < num_rademacher)


def by_the_authors(model: torch.nn.Module, ids: torch.Tensor, num_rademacher: int) -> dict[str, torch.Tensor]:
    """The paper's code in short, with its batches of four prompts."""
    layers = {name: model.get_submodule(name) for name, _ in model.named_modules() if name.endswith(tuple(LINEARS))}
    scores = {name: torch.zeros_like(layer.weight, dtype=torch.float32) for name, layer in layers.items()}
    activity: dict[str, torch.Tensor] = {}
    sensitivity: dict[str, torch.Tensor] = {}

    def tap(name: str, hidden: torch.Tensor, output: torch.Tensor) -> None:
        activity[name] = hidden.detach().float().abs().mean((0, 1))
        output.register_hook(lambda grad: sensitivity.update({name: grad.float().abs().mean((0, 1))}))

    hooks = [
        layer.register_forward_hook(lambda _, args, output, name=name: tap(name, args[0], output))
        for name, layer in layers.items()
    ]
    for batch in ids.split(4):
        for _ in range(num_rademacher):
            logits = model(input_ids=batch, use_cache=False).logits[:, -1]
            (logits * (torch.randint(2, logits.shape, device=logits.device) * 2 - 1)).sum().backward()
            for name, layer in layers.items():
                scores[name] += layer.weight.detach().abs() * sensitivity[name][:, None] * activity[name]
            model.zero_grad()
    for hook in hooks:
        hook.remove()
    return scores


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        found = [in_fresh_process(measure_time, 1024, dtype, 8, 64, 8) for _ in range(rounds)]
        row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        for hidden in (1024, 2048):
            with no_heap():
                memory = in_fresh_process(measure_memory, hidden, dtype, 8, 64)
            rows.append({"dtype": dtype, "hidden": hidden, **(row if hidden == 1024 else {}), **memory})
    return rows


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
    model.requires_grad_(True)
    authors = seconds(lambda: by_the_authors(model, ids, num_rademacher), 3)
    model.requires_grad_(False)
    without = seconds(lambda: probe(model, one_backward, prompts=rows), 3)
    with_generation = seconds(lambda: probe(model, generated), 3)
    return {
        "by_hand_seconds": (floor + floor_again) / 2,
        "probe_seconds": ours,
        "time_over_limit": 2 * ours / (floor + floor_again),
        "authors_over_ours": authors / ours,
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
