"""Time of a training step with a rehearsal in every n-th step, compared with the arithmetic.

A Llama of hidden size 256 with 2 layers trains on 512 tokens; a rehearsal reads 2 texts of 64 tokens, the defaults of
`RehearsalCallback`. n steps with one rehearsal and n steps without take turns, so "step" is a ratio in which a busy
machine cancels. "arithmetic" is the ratio that one forward without a graph and one forward and backward over the 128
tokens would give, each of them measured in the same turns. With full fine-tuning the base is a second model.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import LINEARS, device, in_fresh_process, llama, seconds_in_turn
from peers import adapted
from peft import get_peft_model
from transformers import TrainerControl, TrainerState, TrainingArguments

from peft_dowser import DowserConfig, RehearsalCallback

EVERY = (1, 2, 4, 8)
METHODS = ("full", "lora r=16", "dowser", "channels")


def measure(rounds: int) -> list[dict[str, Any]]:
    return [row for method in METHODS for row in in_fresh_process(measure_method, method, 0.1, 256, 8 * rounds)]


def measure_method(method: str, update_ratio: float, hidden: int, repetitions: int) -> list[dict[str, Any]]:
    model = llama(hidden, layers=2)
    channels = DowserConfig(granularity="input_channel", score="random", target_modules=LINEARS)
    model = get_peft_model(model, channels) if method == "channels" else adapted(method, update_ratio, model)
    model.train()
    base = llama(hidden, layers=2).eval() if method == "full" else None
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    ids = torch.randint(1000, (1, 512), device=device())
    texts = torch.randint(1000, (2, 64))
    hook: Any = (TrainingArguments(report_to=[]), TrainerState(), TrainerControl())

    def backward(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def steps(count: int, callback: RehearsalCallback | None = None) -> None:
        for number in range(count):
            hook[1].global_step = number
            if callback is not None:
                callback.on_step_begin(*hook, model=model)
            backward(ids)
            optimizer.step()
            optimizer.zero_grad()

    def pieces() -> None:
        """What the arithmetic counts of a rehearsal."""
        with torch.no_grad():
            (model if base is None else base)(input_ids=texts.to(device()), use_cache=False)
        backward(texts.to(device()))

    share = _ratio(pieces, partial(steps, 1), repetitions)
    rows = []
    for every in EVERY:
        callback = RehearsalCallback(list(texts), every_n_steps=every, base=base)
        callback.on_train_begin(*hook, model=model)
        found = _ratio(partial(steps, every, callback), partial(steps, every), max(1, repetitions // every))
        rows.append({"method": method, "every": every, "step": found, "arithmetic": 1 + share / every})
    return rows


def _ratio(one: Callable[[], None], other: Callable[[], None], repetitions: int) -> float:
    return statistics.median(first / second for first, second in seconds_in_turn(one, other, repetitions))
