"""English text: the docstrings of Python's standard library.

They are read from the running interpreter, so the text differs a little between Python versions. A
paragraph's side of the split is a hash of the paragraph, so it is the same on every version; and
windows are drawn by consistent hashing, so a paragraph that came or went changes only the few draws
that fall on it.
"""

import ast
import zlib
from bisect import bisect
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from splits import Split, split_of

WINDOW = 16  # characters

# Modules with much prose, and with plain source files in Python 3.10 to 3.14 (`os` is frozen).
MODULES = (
    "_pydecimal argparse ast base64 bdb bisect calendar collections concurrent.futures._base "
    "configparser contextlib copy csv dataclasses difflib doctest email.message enum "
    "fractions ftplib functools gettext heapq html.parser http.client http.cookiejar imaplib "
    "inspect ipaddress locale logging mailbox mimetypes optparse pdb pickletools platform "
    "random sched shutil smtplib socket socketserver ssl statistics string subprocess tarfile "
    "tempfile textwrap threading timeit tokenize trace traceback typing unittest.case "
    "unittest.mock urllib.parse urllib.request uuid warnings weakref xmlrpc.client"
).split()


def draw_window(rng: np.random.Generator, split: Split) -> str:
    """Draw `WINDOW` consecutive characters of a paragraph.

    One paragraph in ten is for testing, without what it shares word for word with the others.
    """
    # The next window after a random hash: the draw hardly depends on which other windows exist.
    keys, windows = _windows(split)
    return windows[bisect(keys, rng.integers(2**32)) % len(windows)]


@cache
def _windows(split: Split) -> tuple[list[int], list[str]]:
    """The split's windows of text and their hashes, in order of the hashes."""
    windows = _cut("train") if split == "train" else _cut("test") - _cut("train")
    hashed = sorted((zlib.crc32(window.encode()), window) for window in windows)
    return [key for key, _ in hashed], [window for _, window in hashed]


def _cut(split: Split) -> set[str]:
    """Cut the split's paragraphs into windows, each overlapping the next by one half."""
    return {
        paragraph[start : start + WINDOW]
        for module in MODULES
        for paragraph in _paragraphs(module)
        if split_of(paragraph, one_in=10) == split
        for start in range(0, len(paragraph) - WINDOW + 1, WINDOW // 2)
    }


def _paragraphs(module: str) -> Iterator[str]:
    """The paragraphs of a module's docstrings, each on one line; only ASCII and no doctests.

    The source is parsed, not imported, so it works under `python -OO` too.
    """
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                line = " ".join(paragraph.split())
                if line.isascii() and line.isprintable() and ">>>" not in line:
                    yield line


def _source(module: str) -> str:
    """The source of a standard module, or nothing where this Python has no file of it."""
    spec = find_spec(module)
    origin = spec.origin if spec and spec.has_location else None
    return Path(origin).read_text(encoding="utf-8") if origin else ""
