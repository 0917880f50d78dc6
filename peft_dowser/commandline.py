"""The options of `peft-dowser`; `launcher` reads them before anything else is imported."""

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, and run the command: see `peft_dowser.cli.run`."""
    options = _parser().parse_args(arguments)
    try:
        from peft_dowser.cli import run

        return run(options)
    except KeyboardInterrupt:
        sys.stderr.write(f"peft-dowser: {options.command} was interrupted.\n")
        return 130  # as shells say it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-dowser", description="Model-Dowser for Hugging Face PEFT.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

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

    inspect = commands.add_parser("inspect", help="list what a saved adapter trains")
    inspect.add_argument("adapter", help="folder or Hub id of the adapter")
    inspect.add_argument("--base", help="folder or Hub id of its base: count the values that vanish in bfloat16")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of a table")

    diff = commands.add_parser("diff", help="compare two saved adapters: what both train, and whether they agree")
    diff.add_argument("a", metavar="A", help="folder or Hub id of an adapter")
    diff.add_argument("b", metavar="B", help="folder or Hub id of another one")
    diff.add_argument("--json", action="store_true", help="print JSON instead of a table")

    report = commands.add_parser("report", help="draw what a saved adapter trains: one page that needs no other file")
    report.add_argument("adapter", help="folder or Hub id of the adapter")
    report.add_argument("-o", "--output", required=True, help="file for the page (HTML)")
    report.add_argument(
        "--statistics", metavar="FILE", help="of `peft-dowser probe`: draw what the probe found as well"
    )

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

    plan = commands.add_parser("plan", help="what a fine-tuning will take, from the config of a model alone")
    plan.add_argument("model", help="folder or Hub id of the base model; only its config.json is read")
    plan.add_argument("--update-ratio", type=float, default=0.1, help="rho, fraction that trains (default: 0.1)")
    plan.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="module names, or all-linear (default: as in DowserConfig)"
    )
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

    merge = commands.add_parser("merge", help="write the base with an adapter added, without loading it whole")
    merge.add_argument("adapter", help="folder or Hub id of the adapter")
    merge.add_argument("-o", "--output", required=True, help="folder for the merged model, new or empty")
    merge.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    merge.add_argument("--max-shard-size", default="5GB", help="bound on a file and on the memory (default: 5GB)")

    verify = commands.add_parser("verify", help="check an adapter, and a merged model, without loading a model")
    verify.add_argument("adapter", help="folder or Hub id of the adapter")
    verify.add_argument("--base", help="folder or Hub id of the base model (default: the one that the adapter names)")
    verify.add_argument("--merged", help="folder or Hub id of a model that must be base + adapter, bit for bit")
    verify.add_argument("--json", action="store_true", help="print JSON: ok, and a list of problems")
    return parser
