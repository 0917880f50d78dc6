"""Making, saving, loading and merging an adapter: seconds, and bytes on disk per trained weight.

Llamas of about 100 million and one billion parameters (the larger one in bfloat16, and without the peers, which take
minutes to choose its weights), all linears of their layers at rho = 0.1, values in bfloat16. Everything that
`save_pretrained` writes counts, configuration and metadata included; the model card does not. The limits: two bytes per
value and the entropy of its position; and for the time, that of safetensors for the same bytes, to which loading adds
the decoding. What PEFT takes for the same tensors without this package's digests, checks, decoding and model card is
given as well ("peft"): no save or load by PEFT is faster. Times are medians of several calls in one process, into
folders of their own; those of the first call are apart.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measure import in_fresh_process, linear_weights, llama
from peers import adapted
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file

from peft_dowser import DowserConfig, DowserModel
from peft_dowser.delta.codec import decode
from peft_dowser.layers.layer import DowserLayer
from peft_dowser.layers.state import Index

# Method, hidden size, layers, dtype of the base, and repetitions in one process.
RUNS = (
    ("shira", 768, 13, "float32", 3),
    ("super-tuning", 768, 13, "float32", 3),
    ("dowser", 768, 13, "float32", 9),
    ("dowser", 2048, 20, "bfloat16", 5),
)


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for method, *run in RUNS:
        found = [in_fresh_process(measure_files, method, 0.1, *run) for _ in range(rounds)]
        rows.append({"method": method} | {key: statistics.median(one[key] for one in found) for key in found[0]})
    return rows


class Times:
    """Seconds of all calls of some functions, by name."""

    def __init__(self) -> None:
        self.all: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments)
        self.all.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def row(self) -> dict[str, float]:
        """The median of the calls after the first, and the first of saves and loads."""
        row = {f"{name}_seconds": statistics.median(times[1:] or times) for name, times in self.all.items()}
        return row | {f"first_{name}_seconds": self.all[name][0] for name in ("save", "load")}


def measure_files(
    method: str, update_ratio: float, hidden: int, layers: int, dtype: str, repetitions: int
) -> dict[str, float]:
    times = Times()
    base = llama(hidden, layers=layers, dtype=dtype, vocabulary=10_000)
    weights = linear_weights(base)
    model = times.timed("make", adapted, method, update_ratio, base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in trained)
    with tempfile.TemporaryDirectory() as kept:
        times.timed("save", model.save_pretrained, kept)
        written = sum(path.stat().st_size for path in Path(kept).iterdir() if path.name != "README.md")
        file = f"{kept}/adapter_model.safetensors"
        tensors = load_file(file)
        ours = [layer for layer in model.modules() if isinstance(layer, DowserLayer)]
        indices = [layer.index("default") for layer in ours]
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory() as folder:
                times.timed("save", model.save_pretrained, f"{folder}/save")
                times.timed("safetensors_write", save_file, tensors, f"{folder}/again.safetensors")
                if ours:
                    with peft_alone():
                        times.timed("peft_save", model.save_pretrained, f"{folder}/peft")
            times.timed("safetensors_read", load_file, file)
            times.timed("decode", lambda: [decode(index.code, index.layout.size, index.count) for index in indices])
        base = model.unload()
        for _ in range(repetitions):
            base = times.timed("load", PeftModel.from_pretrained, base, kept).unload()
            if ours:
                with unchecked():
                    base = times.timed("unchecked_load", PeftModel.from_pretrained, base, kept).unload()
                with peft_alone():
                    base = times.timed("peft_load", PeftModel.from_pretrained, base, kept).unload()
        model = PeftModel.from_pretrained(base, kept)
    times.timed("merge", model.merge_and_unload)
    row = {"base_weights": weights, "file_bytes": written, **times.row()}
    if ours:
        row["decoded_per_second"] = sum(index.nnz for index in indices) / row["decode_seconds"]
        row["checks_over_load"] = 1 - row["unchecked_load_seconds"] / row["load_seconds"]
    entropy = -math.log2(update_ratio) - (1 - update_ratio) / update_ratio * math.log2(1 - update_ratio)
    row["bytes_per_trained_weight"] = written / count
    row["bytes_over_limit"] = written / count / (2 + entropy / 8)
    limits = {"save": row["safetensors_write_seconds"], "load": row["safetensors_read_seconds"] + row["decode_seconds"]}
    for name, limit in limits.items():
        row[f"{name}_over_limit"] = row[f"{name}_seconds"] / limit
        if ours:
            row[f"peft_{name}_over_limit"] = row[f"peft_{name}_seconds"] / limit
    return row


@contextmanager
def unchecked() -> Iterator[None]:
    """Load without a look at the order of positions, at values, digests, and samples of the base."""
    with ExitStack() as patches:
        for check in (
            "files.checks.check_values",
            "delta.format._check_digest",
            "delta.codec._order_problem",
            "tuner.injection.warn_of_other_base",
        ):
            patches.enter_context(patch(f"peft_dowser.{check}", lambda *arguments: None))
        yield


@contextmanager
def peft_alone() -> Iterator[None]:
    """Save and load as PEFT does, and leave out what this package adds: the adapter that is loaded cannot be used."""
    with ExitStack() as patches:
        for owner, name, instead in (
            (DowserModel, "_get_adapter_state_dict", vars(BaseTuner)["_get_adapter_state_dict"]),
            (DowserConfig, "save_pretrained", PeftConfig.save_pretrained),
            (DowserModel, "_remap_adapter_state_dict_for_load", vars(BaseTuner)["_remap_adapter_state_dict_for_load"]),
            (Index, "_follow_code", lambda index, is_known: None),
        ):
            patches.enter_context(patch.object(owner, name, instead))
        patches.enter_context(patch("peft_dowser.tuner.injection.warn_of_other_base"))
        yield
