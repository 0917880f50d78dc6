"""Let PEFT find Dowser adapters in every program of this environment, without the import of this package.

    python -m peft_dowser.autoload enable | disable | status

PEFT reads no entry points: a program that loads a Dowser adapter must import this package, or PEFT ends in
`KeyError: 'DOWSER'`. Where programs cannot be changed, `enable` writes two small files into the site-packages of the
running Python: a `.pth` file, whose line Python runs at every start, and what it imports, which waits for the import of
`peft` and imports this package after it. Nothing else is changed, and `disable` removes both.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import cache_from_source
from pathlib import Path

NAME = "peft_dowser_autoload.pth"
LINE = "import peft_dowser_autoload\n"
MODULE = "peft_dowser_autoload.py"
# Every start of Python runs this, so it imports nothing that is not there already.
SOURCE = '''"""Imports peft_dowser after peft. Made by `python -m peft_dowser.autoload enable`, removed by `disable`."""

import sys


class _After:
    """The loader of peft, and the import of peft_dowser after it."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            import peft_dowser
        except Exception as error:
            if getattr(error, "name", None) == "peft_dowser":
                return  # it was uninstalled
            import warnings

            warnings.warn(f"peft_dowser cannot be loaded together with peft: {error!r}")


class _Finder:
    """Waits for peft. It stays after a look-up, since one may ask for peft without importing it."""

    def find_spec(self, name, path=None, target=None):
        if name != "peft" or "peft_dowser" in sys.modules:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _After(spec.loader)
                return spec
        return None


sys.meta_path.insert(0, _Finder())
'''


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 on success, 1 where `status` finds it disabled, 2 where the folder cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m peft_dowser.autoload",
        description="Let PEFT find Dowser adapters without `import peft_dowser`, in every program of this environment.",
    )
    parser.add_argument("action", choices=["enable", "disable", "status"])
    parser.add_argument("--folder", type=Path, default=Path(sysconfig.get_path("purelib")), help="site-packages")
    options = parser.parse_args(arguments)
    line, module = options.folder / NAME, options.folder / MODULE
    try:
        # The line is there only while the module is: without it, every start of Python would complain.
        if options.action == "enable":
            module.write_text(SOURCE)
            line.write_text(LINE)
        elif options.action == "disable":
            line.unlink(missing_ok=True)
            module.unlink(missing_ok=True)
            Path(cache_from_source(str(module))).unlink(missing_ok=True)
    except OSError as error:
        print(f"peft_dowser.autoload: {error}", file=sys.stderr)
        return 2
    enabled = line.is_file() and module.is_file()
    print(f"{'enabled' if enabled else 'disabled'} in {options.folder}")
    return 1 if options.action == "status" and not enabled else 0


if __name__ == "__main__":
    sys.exit(main())
