"""Let PEFT find Dowser adapters in every program of this environment, without the import of this package.

    python -m peft_dowser.autoload enable | disable | status

PEFT reads no entry points: a program that loads a Dowser adapter must import this package, or PEFT ends in
`KeyError: 'DOWSER'`. Where programs cannot be changed, `enable` writes two small files into the site-packages of the
running Python: a `.pth` file, whose line Python runs at every start, and what it imports, which waits for the import of
`peft` and imports this package after it. Nothing else is changed, and `disable` removes both. Programs that do not
import PEFT pay a look into a list.
"""

import argparse
import sys
import sysconfig
from collections.abc import Sequence
from importlib.util import cache_from_source
from pathlib import Path

NAME = "peft_dowser_autoload.pth"
# Python runs a line of a .pth file that begins with "import" at every start, so it must not fail and must be fast.
LINE = "import importlib.util as u; u.find_spec('peft_dowser') and __import__('peft_dowser_autoload')\n"
MODULE = "peft_dowser_autoload.py"
SOURCE = '''"""Imports peft_dowser after peft. Made by `python -m peft_dowser.autoload enable`, removed by `disable`."""

import importlib.abc
import importlib.util
import sys


class _After(importlib.abc.Loader):
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
            import warnings

            warnings.warn(f"peft_dowser cannot be loaded together with peft: {error!r}")


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for peft. It stays after a look-up, since one may ask for peft without importing it."""

    searching = False

    def find_spec(self, name, path=None, target=None):
        if name != "peft" or self.searching or "peft_dowser" in sys.modules:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader)
        return spec


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
    files = {options.folder / NAME: LINE, options.folder / MODULE: SOURCE}
    try:
        for path, text in files.items():
            if options.action == "enable":
                path.write_text(text)
            elif options.action == "disable":
                path.unlink(missing_ok=True)
                Path(cache_from_source(str(path))).unlink(missing_ok=True)
    except OSError as error:
        print(f"peft_dowser.autoload: {error}. Nothing else was changed.", file=sys.stderr)
        return 2
    enabled = all(path.is_file() for path in files)
    print(f"{'enabled' if enabled else 'disabled'} in {options.folder}")
    return 1 if options.action == "status" and not enabled else 0


if __name__ == "__main__":
    sys.exit(main())
