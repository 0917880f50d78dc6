"""Bytes on disk of a saved adapter per trained weight, Dowser beside the other sparse tuners.

    python examples/benchmarks/adapter_size.py --output size.json

A Llama of about 100 million parameters, all linears of its layers at rho = 0.1, values saved as bfloat16. Everything
that `save_pretrained` writes counts, configuration and metadata included; the model card does not.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import LINEARS, in_fresh_process, llama, report
from peft import PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model

from peft_dowser import DowserConfig

METHODS = ("shira", "super-tuning", "dowser")


def config_of(method: str, update_ratio: float, hidden: int) -> PeftConfig:
    rank = max(1, round(update_ratio * hidden / 2))
    return {
        "shira": ShiraConfig(r=rank, target_modules=LINEARS, random_seed=0),
        "super-tuning": SupertuningConfig(sparsity=1 - update_ratio, target_modules=LINEARS),
        "dowser": DowserConfig(
            update_ratio=update_ratio, score="random", save_dtype="bfloat16", target_modules=LINEARS
        ),
    }[method]


def measure_size(method: str, update_ratio: float) -> dict[str, float]:
    model = llama(768, layers=13, vocabulary=10_000)
    parameters = model.num_parameters()
    model = get_peft_model(model, config_of(method, update_ratio, 768))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if method != "dowser":  # which has an option for it
        for parameter in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    count = sum(parameter.numel() for parameter in trained)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        written = sum(path.stat().st_size for path in Path(folder).iterdir() if path.name != "README.md")
    return {"parameters": parameters, "trained": count, "bytes": written, "bytes_per_trained_weight": written / count}


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes on disk of a saved adapter.")
    parser.add_argument("--update-ratio", type=float, default=0.1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = {method: in_fresh_process(measure_size, method, options.update_ratio) for method in METHODS}
    report("adapter size", {"update_ratio": options.update_ratio, "methods": results}, options.output)


if __name__ == "__main__":
    main()
