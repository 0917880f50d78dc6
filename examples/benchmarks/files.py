"""Making, saving, loading and merging an adapter: seconds, and bytes on disk per trained weight.

A Llama of about 100 million parameters, all linears of its layers at rho = 0.1, values saved as bfloat16. Everything
that `save_pretrained` writes counts, configuration and metadata included; the model card does not. The limits: two
bytes per value and the entropy of its position; and for the time, that of safetensors for the same bytes, to which
loading adds the decoding.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, llama
from peers import adapted
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_dowser.codec import check_values, decode
from peft_dowser.layer import DowserLayer
from peft_dowser.manifest import check_code, digest, same_base

METHODS = ("shira", "super-tuning", "dowser")


def measure(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        found = [in_fresh_process(measure_files, method, 0.1, 768, 13) for _ in range(rounds)]
        rows.append({"method": method} | {key: statistics.median(one[key] for one in found) for key in found[0]})
    return rows


def measure_files(method: str, update_ratio: float, hidden: int, layers: int) -> dict[str, float]:
    row: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        row[f"{name}_seconds"] = time.perf_counter() - started
        return result

    base = llama(hidden, layers=layers, vocabulary=10_000)
    model = timed("make", lambda: adapted(method, update_ratio, base))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in trained)
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: model.save_pretrained(folder))
        written = sum(path.stat().st_size for path in Path(folder).iterdir() if path.name != "README.md")
        tensors = timed("safetensors_read", lambda: load_file(f"{folder}/adapter_model.safetensors"))
        timed("safetensors_write", lambda: save_file(tensors, f"{folder}/again.safetensors"))
        ours = [layer for layer in model.modules() if isinstance(layer, DowserLayer)]
        indices = [layer.index("default") for layer in ours]
        digests = [digest(index.code) for index in indices]
        timed("checks", lambda: [check(layer, code) for layer, code in zip(ours, digests, strict=True)])
        base = model.unload()
        timed("decode", lambda: [decode(index.code, index.numel, index.nnz) for index in indices])
        model = timed("load", lambda: PeftModel.from_pretrained(base, folder))
    timed("merge", model.merge_and_unload)
    if ours:
        row["decoded_per_second"] = sum(index.nnz for index in indices) / row["decode_seconds"]
        row["checks_over_load"] = row["checks_seconds"] / row["load_seconds"]
    entropy = -math.log2(update_ratio) - (1 - update_ratio) / update_ratio * math.log2(1 - update_ratio)
    row["bytes_per_trained_weight"] = written / count
    row["bytes_over_limit"] = written / count / (2 + entropy / 8)
    row["save_over_limit"] = row["save_seconds"] / row["safetensors_write_seconds"]
    row["load_over_limit"] = row["load_seconds"] / (row["safetensors_read_seconds"] + row["decode_seconds"])
    return row


def check(layer: DowserLayer, expected: str) -> None:
    """What loading an adapter checks of one layer beside decoding it."""
    index, values = layer.index("default"), layer.dowser_values["default"].weight
    check_code(index.code, expected)
    check_values(values, index.nnz)
    positions = index.decoded()
    if not bool((positions[1:] > positions[:-1]).all()) or not same_base(layer.target.sample(), layer.base_sample):
        raise RuntimeError("The adapter that was just made is damaged.")
