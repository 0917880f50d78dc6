"""A whole fine-tuning of a model of a billion parameters in bfloat16, and the peak of memory at each of its stages.

The model is random, with the shape of TinyLlama-1.1B; all linears of its layers are adapted. The peaks are those of the
whole process, Python and libraries included, compared with what `peft_dowser.files.planning` predicts for a step.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import Memory, device, in_fresh_process, process_peak
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_dowser import DowserConfig, probe
from peft_dowser.files.planning import plan


def architecture(layers: int, hidden: int) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=32_000,
    )


def measure(rounds: int) -> list[dict[str, Any]]:
    """One round only, whatever the number asked for: it takes minutes."""
    found = in_fresh_process(fine_tune, architecture(22, 2048), 0.1, 128, 8, 2)
    stages = found.pop("stages")
    return [{"stage": name, **stage, **found} for name, stage in stages.items()]


class Stages:
    """Runs the stages of the fine-tuning, with the time and the peak of each."""

    def __init__(self) -> None:
        self.memory = Memory()
        self.results: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any]) -> Any:
        gc.collect()
        self.memory.restart()
        started = time.perf_counter()
        result = work()
        self.results[name] = {"seconds": time.perf_counter() - started, "peak_bytes": process_peak()}
        return result


def fine_tune(known: LlamaConfig, update_ratio: float, tokens: int, probes: int, rademacher: int) -> dict[str, Any]:
    stages = Stages()
    torch.manual_seed(0)
    with torch.device(device()), tempfile.TemporaryDirectory() as folder:
        base = stages.run("build", lambda: LlamaForCausalLM._from_config(known, dtype=torch.bfloat16))
        config = DowserConfig(num_probes=probes, num_rademacher=rademacher, probe_length=32)
        path = f"{folder}/statistics.safetensors"
        stages.run("probe", lambda: probe(base, config).save(path))
        config = DowserConfig(update_ratio=update_ratio, statistics=path, save_dtype="bfloat16")
        model = stages.run("select", lambda: get_peft_model(base, config))
        ids = torch.randint(3, known.vocab_size, (1, tokens))
        stages.run("step", lambda: one_step(model, ids))
        stages.run("save", lambda: model.save_pretrained(f"{folder}/adapter"))
        trained = model.get_nb_trainable_parameters()[0]
        written = (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size
        base = model.unload()
        del model
        model = stages.run("load", lambda: PeftModel.from_pretrained(base, f"{folder}/adapter"))
        stages.run("merge", model.merge_and_unload)
    return {
        "parameters": base.num_parameters(),
        "trained": trained,
        "file_bytes": written,
        "stages": stages.results,
        "planned_step_bytes": plan(known, DowserConfig(update_ratio=update_ratio), tokens=tokens).total,
    }


def one_step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
