"""The versions that the suite has passed with, and a word where a newer one is installed."""

import json
import logging
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

logger = logging.getLogger(__name__)

# Written by `.ci/tested`: by run ("lowest" and "newest"), its date and the versions by package.
TESTED = json.loads(Path(__file__).with_name("tested.json").read_text(encoding="utf-8"))

# The packages whose private names this one uses, see `_peft` and `_transformers`.
_WATCHED = ("peft", "transformers")


def report_untested() -> None:
    """Say which of PEFT and transformers is of a newer minor release than the newest that was tested.

    Called by the import of the package, and so once in a process.
    """
    newest = TESTED["newest"]["versions"]
    newer = [f"{name} {found}" for name in _WATCHED if _minor(found := _installed(name)) > _minor(newest[name])]
    if newer:
        tested = ", ".join(f"{name} {newest[name]}" for name in _WATCHED)
        logger.warning(
            "%s: newer than what this release of peft-dowser was tested with (%s). It may work; where it does not, "
            "upgrade peft-dowser, or install the tested version.",
            " and ".join(newer),
            tested,
        )


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # on the path without being installed
        return ""


def _minor(text: str) -> tuple[int, ...]:
    """The first two numbers of a version: of "5.25.0.dev0" 5 and 25."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
