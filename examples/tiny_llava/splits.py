"""Which material is for training and which is for testing."""

import zlib
from typing import Literal

Split = Literal["train", "test"]


def split_of(text: str, one_in: int) -> Split:
    """The side `text` is on, always and everywhere: about one text in `one_in` is for testing."""
    return "test" if zlib.crc32(text.encode()) % one_in == 0 else "train"
