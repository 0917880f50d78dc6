"""The sparse delta as data: positions and values of one matrix, how they are added, written, saved and combined.

May import nothing of the package; needs torch, numpy and safetensors only. The file format is in FORMAT.md.
"""

from .apply import Delta
from .arithmetic import combine
from .codec import DeltaFormatError, decode, encode

__all__ = ["Delta", "DeltaFormatError", "combine", "decode", "encode"]
