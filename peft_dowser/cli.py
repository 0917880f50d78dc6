"""The command `peft-dowser`: plan a fine-tuning; probe a model once; make, inspect, verify and merge adapters."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 2 on an error of the user's, which is printed as one line."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (OSError, ValueError) as error:
        print(f"peft-dowser: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dowser", description="Model-Dowser for Hugging Face PEFT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    probe = commands.add_parser("probe", help="measure a model once; any update ratio can be chosen from the result")
    probe.add_argument("model", help="folder or Hub id of the base model")
    probe.add_argument("-o", "--output", required=True, help="file for the statistics (safetensors)")
    probe.add_argument("--num-probes", type=int, default=64, help="N, synthetic prompts (default: 64)")
    probe.add_argument("--num-rademacher", type=int, default=8, help="R, projections per prompt (default: 8)")
    probe.add_argument("--probe-length", type=int, default=64, help="T, tokens per prompt (default: 64)")
    probe.add_argument("--probe-images", type=float, default=0.0, help="share with a noise image (default: 0)")
    probe.add_argument("--last-layers", type=int, help="probe only the last L layers")
    probe.add_argument(
        "--target-parameters", nargs="+", metavar="NAME", help="fused weights of experts to probe as well"
    )
    probe.add_argument("--seed", type=int, default=0, help="seed of prompts and projections (default: 0)")
    probe.add_argument("--device", help="device to probe on (default: where the model loads)")
    probe.set_defaults(run=_probe)

    inspect = commands.add_parser("inspect", help="list what a saved adapter trains")
    inspect.add_argument("adapter", help="folder or Hub id of the adapter")
    inspect.add_argument("--base", help="folder or Hub id of its base: count the values that vanish in bfloat16")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")
    inspect.set_defaults(run=_inspect)

    diff = commands.add_parser("diff", help="compare two saved adapters: what both train, and whether they agree")
    diff.add_argument("a", metavar="A", help="folder or Hub id of an adapter")
    diff.add_argument("b", metavar="B", help="folder or Hub id of another one")
    diff.add_argument("--json", action="store_true", help="print JSON instead of a table")
    diff.set_defaults(run=_diff)

    report = commands.add_parser("report", help="draw what a saved adapter trains: one page that needs no other file")
    report.add_argument("adapter", help="folder or Hub id of the adapter")
    report.add_argument("-o", "--output", required=True, help="file for the page (HTML)")
    report.add_argument(
        "--statistics", metavar="FILE", help="of `peft-dowser probe`: draw what the probe found as well"
    )
    report.set_defaults(run=_report)

    extract = commands.add_parser("extract", help="make an adapter of what separates a fine-tuned model from its base")
    extract.add_argument("base", help="folder or Hub id of the base model (safetensors)")
    extract.add_argument("tuned", help="folder or Hub id of the fine-tuned model (safetensors)")
    extract.add_argument("-o", "--output", required=True, help="folder for the adapter, new or empty")
    extract.add_argument("--update-ratio", type=float, default=0.1, help="rho, fraction to keep (default: 0.1)")
    extract.add_argument(
        "--method",
        choices=["top_delta", "dare", "graft"],
        default="top_delta",
        help="keep the largest changes of each matrix, random ones, or the largest of all (default: top_delta)",
    )
    extract.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="module names, or all-linear (default: as in DowserConfig)"
    )
    extract.add_argument("--scale", type=float, default=1.0, help="factor on what is kept (default: 1)")
    extract.add_argument("--seed", type=int, default=0, help="seed of dare (default: 0)")
    extract.set_defaults(run=_extract)

    plan = commands.add_parser("plan", help="what a fine-tuning will take, from the config of a model alone")
    plan.add_argument("model", help="folder or Hub id of the base model; only its config.json is read")
    plan.add_argument("--update-ratio", type=float, default=0.1, help="rho, fraction that trains (default: 0.1)")
    plan.add_argument("--target-modules", nargs="+", metavar="NAME", help="module names (default: as in DowserConfig)")
    plan.add_argument("--target-parameters", nargs="+", metavar="NAME", help="fused weights of experts as well")
    plan.add_argument("--last-layers", type=int, help="train only the last L layers")
    plan.add_argument("--optimizer", default="adamw", help="adamw, adamw_8bit, adafactor or sgd (default: adamw)")
    plan.add_argument("--dtype", default="bfloat16", help="of the base model (default: bfloat16)")
    plan.add_argument("--values-dtype", default="float32", help="of the trained values (default: float32)")
    plan.add_argument("--quantization", default="none", help="of the base: none, 8bit or 4bit (default: none)")
    plan.add_argument("--batch", type=int, default=1, help="examples in a step (default: 1)")
    plan.add_argument("--tokens", type=int, default=512, help="tokens of an example (default: 512)")
    plan.add_argument("--gradient-checkpointing", action="store_true", help="keep only the inputs of each layer")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(run=_plan)

    merge = commands.add_parser("merge", help="write the base with an adapter added, without loading it whole")
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("-o", "--output", required=True, help="folder for the merged model, new or empty")
    merge.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    merge.add_argument("--max-shard-size", default="5GB", help="bound on a file and on the memory (default: 5GB)")
    merge.set_defaults(run=_merge)

    verify = commands.add_parser("verify", help="check an adapter, and a merged model, without loading a model")
    verify.add_argument("adapter", help="folder or Hub id of the adapter")
    verify.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    verify.add_argument("--merged", help="folder or Hub id of a model that must be base + adapter, bit for bit")
    verify.add_argument("--json", action="store_true", help="print JSON: ok, and a list of problems")
    verify.set_defaults(run=_verify)
    return parser


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

    try:
        counts = extract(
            options.base,
            options.tuned,
            options.output,
            update_ratio=options.update_ratio,
            method=options.method,
            target_modules="all-linear" if options.target_modules == ["all-linear"] else options.target_modules,
            scale=options.scale,
            seed=options.seed,
        )
    except TypeError as error:  # a target module is no linear
        raise ValueError(error) from error
    size = (Path(options.output) / "adapter_model.safetensors").stat().st_size
    print(f"{len(counts)} modules, {sum(counts.values())} values, {size} bytes: {options.output}")


def _plan(options: argparse.Namespace) -> None:
    from .config import DowserConfig
    from .plan import OPTIMIZERS, bytes_per_weight, plan

    found = plan(
        options.model,
        DowserConfig(
            update_ratio=options.update_ratio,
            target_modules=options.target_modules,
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
    print(f"step      {found.step_flops / 1e12:.1f} TFLOP")
    print(f"adapter   {found.file / 1e9:.3f} GB on disk (bfloat16 values)")


def _merge(options: argparse.Namespace) -> None:
    from .merging import merge

    counts = merge(options.adapter, options.output, base=options.base, max_shard_size=options.max_shard_size)
    print(f"{len(counts)} modules, {sum(counts.values())} values merged: {options.output}")


def _verify(options: argparse.Namespace) -> int:
    from .merging import verify

    try:
        problems = verify(options.adapter, base=options.base, merged=options.merged)
    except (OSError, ValueError) as error:
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


def _check_output(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"'{path.parent}' is no folder, so '{path}' cannot be written.")


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
        bits = row["index_bits"] / max(1, row["trained"])
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
    _check_output(Path(options.output))
    try:
        from .report import report
    except ImportError as error:  # matplotlib is missing
        raise ValueError(error) from error
    report(options.adapter, options.output, statistics=options.statistics)
    print(f"{Path(options.output).stat().st_size} bytes: {options.output}")


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)
