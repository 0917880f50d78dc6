"""A saved adapter as data: the names of its tensors, and its manifest. See FORMAT.md."""

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._version import __version__
from .codec import DeltaFormatError, decode
from .layout import Layout

# The format that this release writes; it reads this one and all older ones.
FORMAT = 1

_SAMPLES = 16

# Fractional parts of i times this number over 2^64 are spread evenly, and follow no rows or columns of a matrix.
_GOLDEN = 0x9E3779B97F4A7C15

# What a checkpoint is commonly cast to.
_CASTS = (torch.bfloat16, torch.float16)

# How a saved adapter calls the tensors of a module: its values and its index code.
PREFIX, VALUES, CODE = "base_model.model.", ".dowser_values.weight", ".dowser_index.code"


def check_manifest(manifest: Any) -> None:
    """Refuse, with a DeltaFormatError, a manifest of a newer format, or something that is not a manifest."""
    version = manifest.get("format") if isinstance(manifest, dict) else None
    version = version if type(version) is int else 0
    if version > FORMAT:
        raise DeltaFormatError(
            f"the adapter is in format {version}, written by {str(manifest.get('written_by'))[:50]!r}; this release of "
            f"peft-dowser reads up to format {FORMAT}: upgrade it"
        )
    modules = manifest.get("modules") if version > 0 else None
    if not isinstance(modules, dict) or not all(isinstance(entry, dict) for entry in modules.values()):
        raise DeltaFormatError(
            "manifest must be what save_pretrained writes, with a format and modules; adapter_config.json was edited"
        )


def manifest_entry(code: Tensor, values: Tensor, layout: Layout, sample: str | None) -> dict[str, Any]:
    """What a manifest says of one module: its tensors as in the file, what they mean in the weight, and the
    `base_sample` of its unmodified weight.
    """
    channels = {} if layout.channel_dim is None else {"channel_dim": layout.channel_dim}
    return {
        "shape": list(layout.shape),
        **channels,
        "nnz": values.numel(),
        "code_sha256": digest(code),
        "values_sha256": digest(values),
        "base_sample": sample,
    }


def manifest_of(modules: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The manifest of an adapter, from its entries by module."""
    return {"format": FORMAT, "written_by": f"peft-dowser {__version__}", "modules": dict(modules)}


def digest(tensor: Tensor) -> str:
    """SHA-256 of the bytes of a tensor, in hexadecimal."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def read_positions(code: Tensor, layout: Layout, count: int, code_digest: str | None) -> Tensor:
    """The positions in an index code; refuses a code other than the one that the manifest describes, if it has a
    digest.
    """
    positions = decode(code, layout.size, count)
    if code_digest is not None:
        _check_digest(code, code_digest)
    return positions


def _check_digest(code: Tensor, expected: str) -> None:
    if digest(code) != expected:
        raise DeltaFormatError(
            "the index code is not the one that the manifest in adapter_config.json describes; the two files are not "
            "of one save, or were edited"
        )


def base_sample(weight: Tensor) -> str | None:
    """Sixteen entries of a weight, rounded to float32, little-endian, in hexadecimal; None where it has no float data.

    They are entries and not their hash, so that the same weight in another dtype can be recognized.
    """
    if weight.is_meta or not weight.is_floating_point() or weight.numel() == 0:
        return None
    # Not through a flat view, which a weight that is stored transposed does not have.
    sample = weight.detach().take(_sampled_positions(weight.numel()).to(weight.device)).float().cpu()
    return sample.numpy().tobytes().hex()


@cache
def _sampled_positions(numel: int) -> Tensor:
    return torch.tensor([(i * _GOLDEN % 2**64) * numel >> 64 for i in range(1, _SAMPLES + 1)], device="cpu")


def is_sample(text: Any) -> bool:
    """Whether this can be what `base_sample` has written."""
    return isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{8 * _SAMPLES}}}", text) is not None


def same_base(one: str, other: str) -> bool:
    """Whether two samples come from the same weight, allowing for casts to another float dtype.

    They do when they are equal, or equal after rounding to a dtype that one of them is in already. Neither of bfloat16
    and float16 holds the other: such samples have to be equal within the rounding of both.
    """
    if one == other:
        return True
    a, b = _numbers(one), _numbers(other)
    for dtype in _CASTS:
        rounded_a, rounded_b = a.to(dtype).float(), b.to(dtype).float()
        if torch.equal(rounded_a, rounded_b) and (torch.equal(rounded_a, a) or torch.equal(rounded_b, b)):
            return True
    mixed = (_is(a, torch.bfloat16) and _is(b, torch.float16)) or (_is(b, torch.bfloat16) and _is(a, torch.float16))
    return mixed and torch.allclose(a, b, rtol=2**-7, atol=2**-24)


def unlike_samples(then: Mapping[str, str | None], now: Mapping[str, str | None]) -> list[str]:
    """Names whose sample in `now` comes from another weight than the sample in `then`, where both are known."""
    pairs = ((name, then.get(name), sample) for name, sample in now.items())
    return [name for name, old, new in pairs if old is not None and new is not None and not same_base(old, new)]


def _numbers(sample: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(sample), dtype=torch.float32)


def _is(numbers: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(numbers.to(dtype).float(), numbers)


def with_adapter_name(part: str, adapter_name: str) -> str:
    """The name in the state dict of a model, which may have several adapters, for `VALUES` or `CODE` of a file."""
    stem, _, leaf = part.rpartition(".")
    return f"{stem}.{adapter_name}.{leaf}"


def is_delta(key: str) -> bool:
    """Whether a tensor is part of a delta; all others are biases and modules that were trained as a whole."""
    return ".dowser_values." in key or ".dowser_index." in key


def base_name(key: str) -> str:
    """The name in the base model of a tensor that is not part of a delta."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def counts_in(state_dict: Mapping[str, Tensor] | None) -> dict[str, int] | None:
    """Trained weights by module, read off the tensors of a saved adapter."""
    if state_dict is None:
        return None
    return {key.removesuffix(VALUES): value.numel() for key, value in state_dict.items() if key.endswith(VALUES)}


def quoted(name: object) -> str:
    """A name from a stranger's file in a message: its first letters, in quotes."""
    return f"'{printable(str(name)[:100])}'"


def printable(text: str) -> str:
    """A stranger's text with everything escaped that would move the cursor, begin a line or change what is shown."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def few(names: list[str]) -> str:
    """The first names of a list that may be long and come from a stranger's file."""
    shown = ", ".join(quoted(name) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
