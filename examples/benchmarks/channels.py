"""Input channels compared with LoRA of the same ranks: a step, its memory, and the file.

The ranks are 16 in every linear, and a tenth of the inputs of each. Step: Llama of hidden size 1024, 4 layers, 512
tokens; both methods take turns in one process, and the ratio of each pair counts. Memory: hidden size 1024, 128 and
4,096 tokens, with and without gradient checkpointing; the peak of a step above the loaded base. File: about 100
million parameters, values in bfloat16; bytes with all metadata, and the times of loading and merging.
"""

import gc
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import LINEARS, Memory, device, in_fresh_process, linears, llama, no_heap, seconds_in_turn, seconds_once
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

from peft_dowser import DowserConfig

METHODS = ("channels", "lora")
RANKS = ("16", "0.1 in")
TOKENS = (128, 4096)


def config_of(method: str, rank: str) -> PeftConfig:
    """A config with the rank in every linear; "0.1 in" of a llama whose hidden size is given by `adapted`."""
    if method == "channels":
        share: dict[str, Any] = {"channels": 16} if rank == "16" else {"update_ratio": 0.1}
        return DowserConfig(
            granularity="input_channel", score="random", target_modules=LINEARS, task_type="CAUSAL_LM", **share
        )
    return LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")


def adapted(method: str, rank: str, model: torch.nn.Module) -> PeftModel:
    config = config_of(method, rank)
    if isinstance(config, LoraConfig) and rank == "0.1 in":
        hidden, inner = model.config.hidden_size, model.config.intermediate_size  # type: ignore[union-attr]
        config.r = config.lora_alpha = round(0.1 * hidden)
        config.rank_pattern = config.alpha_pattern = {"down_proj": round(0.1 * inner)}
    return get_peft_model(model, config)  # type: ignore[arg-type]


def step_of(model: torch.nn.Module, tokens: int) -> Callable[[], None]:
    """One step of training."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.randint(1000, (1, tokens), device=device())

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in ("float32", "bfloat16"):
        for rank in RANKS:
            pairs = [pair for _ in range(rounds) for pair in in_fresh_process(measure_step, rank, dtype)]
            ours, theirs = zip(*pairs, strict=True)
            rows.append(
                {
                    "dtype": dtype,
                    "rank": rank,
                    "seconds": statistics.median(ours),
                    "lora_seconds": statistics.median(theirs),
                    "time_over_lora": statistics.median(one / other for one, other in pairs),
                    **peaks(rank, dtype),
                }
            )
    return rows + [{"rank": rank} | in_fresh_process(measure_files, rank, 3 * rounds) for rank in RANKS]


def measure_step(rank: str, dtype: str) -> list[tuple[float, float]]:
    """Seconds of a step with input channels and of one with LoRA, pair by pair."""
    ours, theirs = (step_of(adapted(method, rank, llama(1024, dtype=dtype)).train(), 512) for method in METHODS)
    return seconds_in_turn(ours, theirs, 7, warmups=2)


def peaks(rank: str, dtype: str) -> dict[str, float]:
    found = {}
    for tokens in TOKENS:
        for checkpointing in (False, True):
            with no_heap():
                ours, theirs = (
                    in_fresh_process(measure_memory, method, rank, dtype, tokens, checkpointing) for method in METHODS
                )
            name = f"memory_over_lora_{tokens}" + ("_checkpointed" if checkpointing else "")
            found[name] = ours / theirs
    return found


def measure_memory(method: str, rank: str, dtype: str, tokens: int, checkpointing: bool) -> int:
    """Bytes at the peak of two steps above the loaded base."""
    base = llama(1024, dtype=dtype)
    base.config.max_position_embeddings = max(TOKENS)
    gc.collect()
    memory = Memory()
    model = adapted(method, rank, base).train()
    if checkpointing:
        # transformers 5.24 renames the method.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    step = step_of(model, tokens)
    gc.collect()
    memory.restart()
    step()
    step()
    return memory.peak()


def measure_files(rank: str, repetitions: int) -> dict[str, float]:
    """Size of a file per trained weight, and times of loading and merging over those of LoRA, in one process."""
    folders = {}
    bases = {}
    with tempfile.TemporaryDirectory() as work:
        for method in METHODS:
            model = adapted(method, rank, llama(768, layers=13, vocabulary=10_000))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn_like(parameter).mul_(1e-3).to(torch.bfloat16)
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            folders[method] = f"{work}/{method}"
            model.save_pretrained(folders[method])
            bases[method] = model.unload()
            if method == "channels":
                sizes = [path.stat().st_size for path in Path(folders[method]).iterdir() if path.name != "README.md"]
                row = {"bytes_per_trained_weight": sum(sizes) / trained}
                row["parameters"] = sum(parameter.numel() for parameter in linears(bases[method]))

        def load(method: str) -> None:
            bases[method] = PeftModel.from_pretrained(bases[method], folders[method]).unload()

        loads = seconds_in_turn(partial(load, "channels"), partial(load, "lora"), repetitions)
        models = {method: PeftModel.from_pretrained(bases[method], folders[method]) for method in METHODS}

        merges, unmerges = [], []
        for _ in range(repetitions):
            merges.append(tuple(seconds_once(models[method].merge_adapter) for method in METHODS))
            unmerges.append(tuple(seconds_once(models[method].unmerge_adapter) for method in METHODS))
    for name, pairs in (("load", loads), ("merge", merges), ("unmerge", unmerges)):
        row[f"{name}_seconds"] = statistics.median(ours for ours, _ in pairs)
        row[f"{name}_over_lora"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return row
