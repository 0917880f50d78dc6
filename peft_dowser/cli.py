"""The commands of `peft-dowser`: plan a fine-tuning; probe a model; make, compare, draw, check and merge adapters."""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from huggingface_hub.errors import StrictDataclassError

# TypeError: a target module that is no linear. RuntimeError: a prompt that does not fit into memory, or weights that do
# not fit the config. ImportError: a library that the model or a command needs. StrictDataclassError: a config.
_MISTAKES = (OSError, ValueError, TypeError, RuntimeError, ImportError, StrictDataclassError)


def run(options: argparse.Namespace) -> int:
    """Run a command; 0 on success, 2 on an error of the user's, which is printed as one line."""
    try:
        return _COMMANDS[options.command](options) or 0
    except _MISTAKES as error:
        print(f"peft-dowser: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _probe(options: argparse.Namespace) -> None:
    from .config import DowserConfig
    from .probe import probe

    config = DowserConfig(
        num_probes=options.num_probes,
        num_rademacher=options.num_rademacher,
        probe_length=options.probe_length,
        probe_images=options.probe_images,
        last_layers=options.last_layers,
        target_parameters=options.target_parameters,
        seed=options.seed,
    )
    _check_output(Path(options.output))
    if options.device is not None:
        _check_device(options.device)
    model = _load(options.model)
    if options.device is not None:
        model.to(options.device)
    statistics = probe(model, config)
    statistics.save(options.output)
    size = Path(options.output).stat().st_size
    print(f"{len(statistics.modules)} modules, {statistics.info.num_probes} probes, {size} bytes: {options.output}")


def _extract(options: argparse.Namespace) -> None:
    from .extract import extract

    counts = extract(
        options.base,
        options.tuned,
        options.output,
        update_ratio=options.update_ratio,
        method=options.method,
        target_modules=_targets(options),
        scale=options.scale,
        seed=options.seed,
    )
    size = (Path(options.output) / "adapter_model.safetensors").stat().st_size
    print(f"{len(counts)} modules, {sum(counts.values())} values, {size} bytes: {options.output}")


def _plan(options: argparse.Namespace) -> None:
    from .config import DowserConfig
    from .plan import OPTIMIZERS, bytes_per_weight, plan

    found = plan(
        options.model,
        DowserConfig(
            update_ratio=options.update_ratio,
            target_modules=_targets(options),
            target_parameters=options.target_parameters,
            last_layers=options.last_layers,
        ),
        optimizer=options.optimizer,
        dtype=options.dtype,
        values_dtype=options.values_dtype,
        quantization=options.quantization,
        batch=options.batch,
        tokens=options.tokens,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    if options.json:
        print(json.dumps(vars(found) | {"total": found.total}, indent=2))
        return
    print(f"trained {found.trained:,} of {found.adapted:,} adapted weights ({found.parameters:,} parameters)\n")
    print("memory of a training step, GB")
    for part in ("weights", "values", "gradients", "optimizer", "positions", "activations", "temporary", "total"):
        print(f"  {part:<12} {getattr(found, part) / 1e9:9.3f}")
    print("\nstate per base weight, bytes      float32   bfloat16 values")
    for name in OPTIMIZERS:
        wide, narrow = (bytes_per_weight(options.update_ratio, name, dtype) for dtype in ("float32", "bfloat16"))
        print(f"  {name:<30} {wide:8.2f} {narrow:10.2f}")
    print(f"\nprobe     {found.probe_flops / 1e12:.1f} TFLOP, {found.statistics / 1e9:.3f} GB of statistics")
    print(f"step      {found.step_flops / 1e12:.1f} TFLOP; both count the adapted matrices only")
    wide = found.file + 2 * found.trained  # what is saved by default
    print(f"adapter   {wide / 1e9:.3f} GB on disk, {found.file / 1e9:.3f} GB with save_dtype='bfloat16'")


def _merge(options: argparse.Namespace) -> None:
    from .merging import merge

    counts = merge(options.adapter, options.output, base=options.base, max_shard_size=options.max_shard_size)
    print(f"{len(counts)} modules, {sum(counts.values())} values merged: {options.output}")


def _verify(options: argparse.Namespace) -> int:
    from .merging import verify

    try:
        problems = verify(options.adapter, base=options.base, merged=options.merged)
    except _MISTAKES as error:
        if not options.json:
            raise
        problems = [str(error)]
    if options.json:
        print(json.dumps({"adapter": options.adapter, "ok": not problems, "problems": problems}, indent=2))
        return 2 if problems else 0
    for problem in problems:
        print(" ".join(problem.split()))
    if not problems:
        also = f", and '{options.merged}' is their sum" if options.merged else ""
        print(f"OK: '{options.adapter}' fits {repr(options.base) if options.base else 'its base'}{also}.")
    return 2 if problems else 0


def _targets(options: argparse.Namespace) -> Any:
    return "all-linear" if options.target_modules == ["all-linear"] else options.target_modules


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder, and a file is to be written. Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"'{path.parent}' is no folder, so '{path}' cannot be written.")
    TemporaryFile(dir=path.absolute().parent).close()  # raises where nothing can be written


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ValueError(f"--device {name} is no device of this machine ({error}).") from error


def _load(name: str) -> Any:
    """Load a model with the class that its config names."""
    from transformers import AutoConfig

    from .checkpoints import model_class

    return model_class(AutoConfig.from_pretrained(name), name).from_pretrained(name, dtype="auto")


def _inspect(options: argparse.Namespace) -> None:
    from .inspection import inspect

    found = inspect(options.adapter, base=options.base)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        if key != "modules" and value is not None:
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    columns = f"{'trained':>12} {'ratio':>8} {'dtype':>8} {'bytes':>12} {'bits/index':>10} {'|delta|':>10}"
    print(f"{columns} {'vanish':>7}  module")
    for row in found["modules"]:
        bits = row["index_bits"] / row["trained"]
        print(
            f"{row['trained']:>12} {_shown(row['ratio'], '.4f'):>8} {row['dtype']:>8} {row['bytes']:>12} {bits:>10.2f} "
            f"{row['delta_norm']:>10.4g} {_shown(row['vanished'], '.1%'):>7}  {row['module']}"
        )


def _diff(options: argparse.Namespace) -> None:
    from .diff import diff, total

    found = diff(options.a, options.b)
    together = total(found.values())
    if options.json:
        modules = [{"module": name} | one.summary() for name, one in found.items()]
        print(json.dumps({"a": options.a, "b": options.b} | together.summary() | {"modules": modules}, indent=2))
        return
    print(f"{'shared':>12} {'only in A':>12} {'only in B':>12} {'conflicts':>12} {'cosine':>8}  module")
    for name, one in (found | {"all": together}).items():
        counts = f"{one.shared:>12} {one.only_a:>12} {one.only_b:>12} {one.conflicts:>12}"
        print(f"{counts} {_shown(one.cosine, '.4f'):>8}  {name}")


def _report(options: argparse.Namespace) -> None:
    from .report import report

    _check_output(Path(options.output))
    report(options.adapter, options.output, statistics=options.statistics)
    print(f"{Path(options.output).stat().st_size} bytes: {options.output}")


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


_COMMANDS = {
    "probe": _probe,
    "inspect": _inspect,
    "diff": _diff,
    "report": _report,
    "extract": _extract,
    "plan": _plan,
    "merge": _merge,
    "verify": _verify,
}
