"""Time of 64 new tokens with an adapter that is not merged, relative to the bare base, which takes turns with it.

Llama of hidden size 1024, 4 layers, one prompt of 16 tokens. The limit is the base's own time.
"""

import statistics
from typing import Any

import torch
from measure import device, in_fresh_process, llama, seconds_in_turn
from peers import METHODS, adapted

SETTINGS = [(dtype, ratio) for dtype in ("float32", "bfloat16") for ratio in (0.01, 0.1, 0.5)]


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype, ratio in SETTINGS:
        for method in METHODS[1:]:
            found = [in_fresh_process(measure_generation, method, ratio, 1024, dtype, 64) for _ in range(rounds)]
            row = {key: statistics.median(one[key] for one in found) for key in found[0]}
            rows.append({"dtype": dtype, "rho": ratio, "method": method, **row})
    return rows


def measure_generation(method: str, update_ratio: float, hidden: int, dtype: str, tokens: int) -> dict[str, float]:
    base = llama(hidden, dtype=dtype).eval()
    peft = adapted(method, update_ratio, llama(hidden, dtype=dtype)).eval()
    prompt = torch.randint(3, 1000, (1, 16), device=device())
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt)
    pairs = seconds_in_turn(
        lambda: base.generate(input_ids=prompt, **options),
        lambda: peft.generate(input_ids=prompt, **options),
        repetitions=3,
    )
    return {
        "seconds_per_token": statistics.median(adapter for _, adapter in pairs) / tokens,
        "base_seconds_per_token": statistics.median(bare for bare, _ in pairs) / tokens,
        "time_over_base": statistics.median(adapter / bare for bare, adapter in pairs),
    }
