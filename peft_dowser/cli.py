"""The command `peft-dowser`: plan a fine-tuning; probe a model; make, compare, draw, check, merge and send adapters.

The launcher runs this file on its own, so `--help` and a mistake in the options do not wait for the import of the
package and of torch. Each command imports what it needs.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from runpy import run_module, run_path
from tempfile import TemporaryFile
from typing import Any


def main(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line and run the command.

    Returns:
        The exit code: 0 on success, 2 on a mistake of the user, which is printed as one line; for `run` the return
        value of the program.
    """
    options = _parser().parse_args(arguments)
    if options.command == "run":
        return _run(options.program)
    try:
        code = _COMMANDS[options.command](options) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _complain(f"{options.command} was interrupted.")
        return 130  # the code of shells for Ctrl-C
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 0
    except _mistakes() as error:
        return _complain(_line(error))


def _mistakes() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import StrictDataclassError  # of a config

    # TypeError: a target module that is not linear. RuntimeError: a prompt that does not fit into memory, or weights
    # that do not fit the config. ImportError: a library that the model or a command needs.
    return OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError, StrictDataclassError


def _complain(message: str) -> int:
    print(f"peft-dowser: {message}", file=sys.stderr)
    return 2


def _run(words: list[str]) -> Any:
    """Run another program in this process, in which PEFT knows Dowser. Its return value and errors are passed on."""
    words = words[words[:1] == ["--"] :]
    is_module = words[:1] == ["-m"]
    name, *arguments = words[is_module:] or [""]
    if not name:
        return _complain("Name the program to run after --, such as: peft-dowser run -- lm_eval --model hf")
    scripts = [] if is_module else list(entry_points(group="console_scripts", name=name))
    if not scripts:  # as Python does: the current folder, or the folder of the script, comes first
        sys.path.insert(0, str(Path.cwd() if is_module else Path(name).resolve().parent))
    if is_module and not _is_importable(name):
        return _complain(f"There is no module '{name}' in this environment or folder.")
    if not is_module and not scripts and not Path(name).is_file():
        return _complain(
            f"'{name}' is not a console script of this environment, and not a file. Give a module as: run -- -m {name}"
        )

    import peft_dowser  # noqa: F401

    sys.argv[:] = [name, *arguments]
    if scripts:
        return scripts[0].load()()
    if is_module:
        run_module(name, run_name="__main__", alter_sys=True)
    else:
        run_path(name, run_name="__main__")
    return 0


def _is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its package does not import, or this is not a name
        return False


def _probe(options: argparse.Namespace) -> None:
    from peft_dowser.config import DowserConfig
    from peft_dowser.probing.run import probe

    given = _arguments(options, leave_out=("model", "output", "dtype", "device_map", "quantization"))
    config = DowserConfig(**given)
    _check_output(Path(options.output))
    statistics = probe(_load(options), config)
    statistics.save(options.output)
    info = statistics.info
    kind = "" if info.num_rademacher else " of forwards only"
    text = "{modules:,} modules, {probes:,} probes" + kind + ", {bytes}"
    _tell(options, text, modules=len(statistics.modules), probes=info.num_probes)


def _extract(options: argparse.Namespace) -> None:
    from peft_dowser.files.extraction import extract

    _tell_values(options, extract(**_arguments(options)))


def _export_lora(options: argparse.Namespace) -> None:
    from peft_dowser.files.lora_export import export_lora

    counts = export_lora(**_arguments(options))
    _tell(
        options, "LoRA of rank {rank} for {modules:,} modules, {bytes}", rank=max(counts.values()), modules=len(counts)
    )


# What the parts of a plan are.
_PARTS = {
    "weights": "the base",
    "values": "what trains",
    "gradients": "of the values",
    "optimizer": "its state",
    "buckets": "copies that DDP sends",
    "positions": "which weights train",
    "activations": "kept from forward to backward",
    "temporary": "the loss, or one layer at work",
    "update": "what a step of the optimizer takes beyond its state",
    "total": "the first six, and the larger of activations + temporary and update",
}


def _plan(options: argparse.Namespace) -> None:
    from peft_dowser.config import DowserConfig
    from peft_dowser.files.planning import OPTIMIZERS, STATE, ProbeCost, bytes_per_weight, plan

    given = _arguments(options)
    of_config = ("update_ratio", "granularity", "channels", "target_modules", "target_parameters", "last_layers")
    found = plan(config=DowserConfig(**{name: given.pop(name) for name in of_config}), **given)
    if options.json:
        print(json.dumps(asdict(found) | {"total": found.total}, indent=2))
        return
    print(f"trained {found.trained:,} of {found.adapted:,} adapted weights ({found.parameters:,} parameters)\n")
    print("memory of a training step, GB")
    for part in (*STATE, "activations", "temporary", "update", "total"):
        print(f"  {part:<12} {getattr(found, part) / 1e9:9.3f}  {_PARTS[part]}")
    print(
        f"counted for {options.batch} x {options.tokens} tokens, a base in {options.dtype}, {options.optimizer}, "
        f"granularity '{options.granularity}'; other settings: peft-dowser plan --help"
    )
    print("\nstate per base weight, bytes      float32   bfloat16 values")
    for name in OPTIMIZERS:
        wide, narrow = (bytes_per_weight(options.update_ratio, name, dtype) for dtype in ("float32", "bfloat16"))
        print(f"  {name:<30} {wide:8.2f} {narrow:10.2f}")
    print("\nprobe, by score       forwards  backwards      TFLOP  statistics, GB  as training on tokens")
    costs: dict[ProbeCost, list[str]] = {}
    for score, cost in found.probes.items():
        costs.setdefault(cost, []).append(score)
    for cost, names in costs.items():
        counts = f"{cost.forwards:>10,} {cost.backwards:>10,} {cost.flops / 1e12:10.1f}"
        print(f"  {', '.join(names):<18} {counts} {cost.statistics / 1e9:15.3f} {cost.training_tokens:>22,}")
    print(f"\nstep      {found.step_flops / 1e12:.1f} TFLOP; all count the adapted matrices only")
    wide = found.file + 2 * found.trained  # what is saved by default
    print(f"adapter   {wide / 1e9:.3f} GB on disk, {found.file / 1e9:.3f} GB with save_dtype='bfloat16'")


def _merge(options: argparse.Namespace) -> None:
    from peft_dowser.files.merging import merge

    _tell_values(options, merge(**_arguments(options)))


def _patch(options: argparse.Namespace) -> None:
    from peft_dowser.files.patching import write_patch

    for path in filter(None, (options.output, options.revert)):
        _check_output(Path(path))
    counts = write_patch(**_arguments(options))
    text = "{tensors:,} tensors, {values:,} values, {bytes}"
    _tell(options, text, tensors=len(counts), values=sum(counts.values()))


def _verify(options: argparse.Namespace) -> int:
    from peft_dowser.files.merging import verify

    try:
        problems = verify(**_arguments(options))
    except _mistakes() as error:
        if not options.json:
            raise
        problems = [str(error)]
    if options.json:
        print(json.dumps({"adapter": options.adapter, "ok": not problems, "problems": problems}, indent=2))
        return 2 if problems else 0
    for problem in problems:
        print(_line(problem))
    if not problems:
        also = f", and '{options.merged}' is their sum" if options.merged else ""
        print(f"OK: '{options.adapter}' fits {repr(options.base) if options.base else 'its base'}{also}.")
    return 2 if problems else 0


def _arguments(options: argparse.Namespace, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The options of a command, which have the names of the function's parameters or the config's fields."""
    given = {name: value for name, value in vars(options).items() if name not in ("command", "json", *leave_out)}
    if given.get("target_modules") == ["all-linear"]:
        given["target_modules"] = "all-linear"
    return given


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder, but the output is a file. Name a file in it.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"'{path.parent}' is not a folder, so '{path}' cannot be written.")
    TemporaryFile(dir=path.absolute().parent).close()  # raises where nothing can be written


def _load(options: argparse.Namespace) -> Any:
    """Load a model with the class that its config names, as the options say."""
    from transformers import AutoConfig, BitsAndBytesConfig

    from peft_dowser.files.checkpoint import fetched, model_class

    fetched(options.model, ["config.json"])  # says which of the two a name is not: a folder, a model on the Hub
    known = model_class(AutoConfig.from_pretrained(options.model), options.model)
    if options.device_map not in (None, "auto"):
        _check_device(options.device_map)
    quantized = {
        "none": lambda: None,
        "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "4bit": lambda: BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
        ),
    }
    return known.from_pretrained(
        options.model,
        dtype=options.dtype,
        device_map=options.device_map,
        quantization_config=quantized[options.quantization](),
    )


def _check_device(name: str) -> None:
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        raise ValueError(f"--device-map {name} is neither 'auto' nor a device of this machine ({error}).") from error


def _inspect(options: argparse.Namespace) -> None:
    from peft_dowser.delta.format import printable
    from peft_dowser.files.inspection import inspect

    found = inspect(**_arguments(options))
    if options.json:
        print(json.dumps(found, indent=2))
        return
    measured = {f"{name} in training": value for name, value in found["measured"].items()}
    own = {key: value for key, value in found.items() if key not in ("bytes", "measured", "groups", "modules")}
    for key, value in (own | {"trained": f"{found['trained']:,}", "size": _size(found["bytes"])} | measured).items():
        if value is not None:
            print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {printable(str(value))}")
    columns = f"{'trained':>12} {'ratio':>8} {'dtype':>8} {'size':>10} {'bits/weight':>11} {'|delta|':>10}"
    print(f"{columns} {'vanish':>7}  module")
    groups = found["groups"] if len(found["modules"]) > _LONG else []
    for row in groups + found["modules"]:
        bits = row["index_bits"] / row["trained"]
        print(
            f"{row['trained']:>12,} {_shown(row['ratio'], '.4f'):>8} {row['dtype']:>8} {_size(row['bytes']):>10} "
            f"{bits:>11.2f} {row['delta_norm']:>10.4g} {_shown(row['vanished'], '.1%'):>7}  "
            f"{printable(row['module' if 'module' in row else 'group'])}"
        )


def _diff(options: argparse.Namespace) -> None:
    from peft_dowser.delta.format import printable
    from peft_dowser.files.grouping import groups
    from peft_dowser.files.inspection import diff
    from peft_dowser.files.inspection import total_overlap as total

    found = diff(**_arguments(options))
    together = total(found.values())
    if options.json:
        modules = [{"module": name} | one.summary() for name, one in found.items()]
        print(json.dumps({"a": options.a, "b": options.b} | together.summary() | {"modules": modules}, indent=2))
        return
    print(f"{'shared':>12} {'only in A':>12} {'only in B':>12} {'conflicts':>12} {'cosine':>8}  module")
    summary = {name: total(found[one] for one in names) for name, names in groups(found).items()}
    for name, one in ((summary if len(found) > _LONG else {}) | found | {"all": together}).items():
        counts = f"{one.shared:>12,} {one.only_a:>12,} {one.only_b:>12,} {one.conflicts:>12,}"
        print(f"{counts} {_shown(one.cosine, '.4f'):>8}  {printable(name)}")


def _report(options: argparse.Namespace) -> None:
    from peft_dowser.report.page import report

    _check_output(Path(options.output))
    report(**_arguments(options))
    _tell(options, "{bytes}")


def _tell_values(options: argparse.Namespace, counts: dict[str, int]) -> None:
    text = "{modules:,} modules, {values:,} values, {bytes}"
    _tell(options, text, modules=len(counts), values=sum(counts.values()))


def _tell(options: argparse.Namespace, text: str, **counts: int) -> None:
    """Say what was written: one line for people, `text` with the counts in it; with --json the exact counts."""
    output = Path(options.output)
    size = sum(path.stat().st_size for path in (output.glob("*.safetensors") if output.is_dir() else [output]))
    if options.json:
        print(json.dumps({"output": options.output, **counts, "bytes": size}, indent=2))
    else:
        print(f"{text.format(**counts, bytes=_size(size))}: {options.output}")


def _size(count: int) -> str:
    """A number of bytes with three or four digits."""
    if count < 1000:
        return f"{count} bytes"
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.1f} {'kMGT'[power - 1]}B"


def _line(message: object) -> str:
    """A message in one line, also where it quotes names with line breaks."""
    from peft_dowser.delta.format import printable

    return printable(" ".join(str(message).split()))


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


# Modules in a list that needs a summary before it.
_LONG = 20

_COMMANDS = {
    "probe": _probe,
    "inspect": _inspect,
    "diff": _diff,
    "report": _report,
    "export-lora": _export_lora,
    "extract": _extract,
    "plan": _plan,
    "merge": _merge,
    "patch": _patch,
    "verify": _verify,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dowser", description="Model-Dowser for Hugging Face PEFT.")
    version = run_path(str(Path(__file__).with_name("_version.py")))["__version__"]
    parser.add_argument("--version", action="version", version=f"%(prog)s {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, meaning: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=meaning)
        command.add_argument("--json", action="store_true", help="print JSON, with exact numbers")
        return command

    probe = add("probe", "measure a model once; any update ratio can be chosen from the result")
    probe.add_argument("model", help="folder or Hub id of the base model")
    probe.add_argument("-o", "--output", required=True, help="file for the statistics (safetensors)")
    probe.add_argument(
        "--score",
        default="dowser",
        help="score that the statistics are for: those of activity and wanda take forwards only, and serve these two; "
        "those of dowser and shift serve all but gradient (default: dowser)",
    )
    probe.add_argument("--num-probes", type=int, default=64, help="N, synthetic prompts (default: 64)")
    probe.add_argument("--num-rademacher", type=int, default=8, help="R, projections per prompt (default: 8)")
    probe.add_argument("--probe-length", type=int, default=64, help="T, tokens per prompt (default: 64)")
    probe.add_argument("--probe-images", type=float, default=0.0, help="share of noise images (default: 0)")
    probe.add_argument(
        "--batch-size",
        type=int,
        dest="probe_batch_size",
        metavar="B",
        help="prompts per batch (default: what fits into the free memory)",
    )
    probe.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="module names, or all-linear (default: as in DowserConfig)"
    )
    probe.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="modules to leave out")
    probe.add_argument("--last-layers", type=int, help="probe only the last L layers")
    probe.add_argument(
        "--target-parameters", nargs="+", metavar="NAME", help="fused weights of experts to probe as well"
    )
    probe.add_argument("--seed", type=int, default=0, help="seed of prompts and projections (default: 0)")
    probe.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="dtype to load the model in (default: auto, the dtype of its files)",
    )
    probe.add_argument(
        "--device-map", help="a device such as cuda, or auto: all GPUs, and the CPU for the rest (default: the CPU)"
    )
    probe.add_argument(
        "--quantization",
        choices=["none", "8bit", "4bit"],
        default="none",
        help="load the model quantized by bitsandbytes (default: none)",
    )

    inspect = add("inspect", "list what a saved adapter trains")
    inspect.add_argument("adapter", help="folder or Hub id of the adapter")
    inspect.add_argument("--base", help="folder or Hub id of its base: count the values that vanish in bfloat16")
    inspect.add_argument("--bits", type=int, choices=[4, 8], help="count those that vanish in 4 or 8 bits instead")

    diff = add("diff", "compare two saved adapters: what both train, and whether they agree")
    diff.add_argument("a", metavar="A", help="folder or Hub id of an adapter")
    diff.add_argument("b", metavar="B", help="folder or Hub id of another adapter")

    report = add("report", "draw what a saved adapter trains: one page that needs no other file")
    report.add_argument("adapter", help="folder or Hub id of the adapter")
    report.add_argument("-o", "--output", required=True, help="file for the page (HTML)")
    report.add_argument(
        "--statistics", metavar="FILE", help="file of `peft-dowser probe`: also draw what the probe found"
    )

    extract = add("extract", "make an adapter of the changes from a base to a fine-tuned model")
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

    export = add("export-lora", "write an adapter that trains input channels as a LoRA adapter")
    export.add_argument("adapter", help="folder or Hub id of an adapter with granularity='input_channel'")
    export.add_argument("-o", "--output", required=True, help="folder for the LoRA adapter, new or empty")

    plan = add("plan", "what a fine-tuning takes, from the config of a model alone")
    plan.add_argument("model", help="folder or Hub id of the base model; only its config.json is read")
    plan.add_argument("--update-ratio", type=float, default=0.1, help="rho, fraction that trains (default: 0.1)")
    plan.add_argument("--granularity", default="weight", help="weight or input_channel (default: weight)")
    plan.add_argument("--channels", type=int, help="input channels per module, with --granularity input_channel")
    plan.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="module names, or all-linear (default: as in DowserConfig)"
    )
    plan.add_argument("--target-parameters", nargs="+", metavar="NAME", help="fused weights of experts to train too")
    plan.add_argument("--last-layers", type=int, help="train only the last L layers")
    plan.add_argument("--optimizer", default="adamw", help="adamw, adamw_8bit, adafactor or sgd (default: adamw)")
    plan.add_argument("--dtype", default="bfloat16", help="dtype of the base model (default: bfloat16)")
    plan.add_argument("--values-dtype", default="float32", help="dtype of the trained values (default: float32)")
    plan.add_argument("--quantization", default="none", help="of the base: none, 8bit or 4bit (default: none)")
    plan.add_argument("--batch", type=int, default=1, help="examples per step (default: 1)")
    plan.add_argument("--tokens", type=int, default=512, help="tokens per example (default: 512)")
    plan.add_argument("--gradient-checkpointing", action="store_true", help="keep only the inputs of each layer")
    plan.add_argument("--ddp", action="store_true", help="train with DDP, which copies the gradients")

    merge = add("merge", "write the base with an adapter added, without loading it whole")
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("-o", "--output", required=True, help="folder for the merged model, new or empty")
    merge.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    merge.add_argument("--max-shard-size", default="5GB", help="limit for each file and for the memory (default: 5GB)")

    patch = add("patch", "write what an adapter changes in its base, for a server such as vLLM")
    patch.add_argument("adapter", help="folder or Hub id of the adapter")
    patch.add_argument("-o", "--output", required=True, help="file for the patch (safetensors)")
    patch.add_argument("--revert", metavar="FILE", help="also write the patch that makes it the base again")
    patch.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")

    verify = add("verify", "check an adapter, and a merged model, without loading a model")
    verify.add_argument("adapter", help="folder or Hub id of the adapter")
    verify.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    verify.add_argument("--merged", help="folder or Hub id of a model that must be base + adapter, bit for bit")

    run = commands.add_parser("run", help="run another program in a process in which PEFT knows Dowser")
    run.add_argument(
        "program",
        nargs=argparse.REMAINDER,
        metavar="-- PROGRAM",
        help="a console script, -m and a module, or a script file, with its arguments: run -- lm_eval --model hf",
    )
    return parser
