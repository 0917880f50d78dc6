"""The command `peft-dowser`, which is installed beside the package, as `peft_dowser_cli`.

It reads the command line before the package, and so torch, is imported: `--help`, and a mistake in the options, need
not wait for that.
"""

import runpy
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    """Run `peft_dowser.commandline`, without its package."""
    spec = find_spec("peft_dowser")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("The package peft_dowser is not where its command is. Install peft-dowser again.")
    return runpy.run_path(str(Path(spec.origin).with_name("commandline.py")))["main"]()
