"""The index code: sorted flat positions of a sparse delta, as few bytes as their count allows.

Two layouts, chosen by size alone, so that `(numel, nnz)` fixes the length in bytes and nothing else has to be stored:

- Elias-Fano. With `l = floor(log2(numel / nnz))`, each position is split into `l` low bits and a high part. The low
  bits of eight entries fill one group of `l` bytes; entry `i` with high part `h` sets bit `h + i` of a bit array of
  `nnz + (numel >> l) + 1` bits. 5.25 bits per position at a ratio of 0.1 (entropy 4.69).
- Bit mask, one bit per weight, where that is no longer than Elias-Fano (ratios from 1/4 on).

Bits are numbered from the least significant bit of the first byte. Everything runs on the device of its input. On a
CPU, reading is left to numpy: it lets go of the interpreter, and starts no threads of its own, so that modules can be
read side by side.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_Item = TypeVar("_Item")

_Result = TypeVar("_Result")

# Parts of the items for each thread: few, for each costs about as much as hashing 20 kB, but enough to share the work.
_PARTS = 4

# Bytes of bits, and groups of eight low parts, that a CPU unpacks at a time: what they become stays in its cache, and
# in memory that is there already, whatever the size of the matrix.
_BLOCK = 1 << 16

_GROUPS = 1 << 15

# What values may be saved as; they are loaded as float32. With integers of their size, and the bits of their exponent,
# which are all set in infinities and NaNs, and in no other number.
_EXPONENTS = {
    torch.float32: (torch.int32, 0xFF << 23),
    torch.bfloat16: (torch.int16, 0xFF << 7),
    torch.float16: (torch.int16, 0x1F << 10),
    torch.float64: (torch.int64, 0x7FF << 52),
}

VALUE_DTYPES = tuple(_EXPONENTS)


def side_by_side(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> list[_Result]:
    """Call a function for every item, and give the results in their order; the exception of the first item that fails
    is raised.

    The function lets go of the interpreter for most of its time, as hashing and numpy do, and uses no threads of torch.
    """
    number = torch.get_num_threads()
    size = max(1, -(-len(items) // (_PARTS * number)))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(number) as threads:
        return [result for part in threads.map(lambda part: [work(item) for item in part], parts) for result in part]


class DeltaFormatError(ValueError):
    """A file is damaged, or does not fit the model that it is loaded into."""


def position_dtype(numel: int) -> torch.dtype:
    """Integer type that can hold a position in a weight of `numel` entries."""
    return torch.int32 if numel <= torch.iinfo(torch.int32).max else torch.int64


def code_length(numel: int, nnz: int) -> int:
    """Length in bytes of the index code of `nnz` positions in a weight of `numel` entries."""
    return _mask_length(numel) if _is_mask(numel, nnz) else sum(_elias_fano_lengths(numel, nnz))


def encode(positions: Tensor, numel: int) -> Tensor:
    """Encode sorted flat positions.

    Args:
        positions: strictly increasing positions in `[0, numel)`, shape `(nnz,)`, int32 or int64.
        numel: number of entries of the weight.

    Returns:
        The code, shape `(code_length(numel, nnz),)`, uint8, on the device of `positions`.

    Raises:
        ValueError: positions are out of range or not strictly increasing.
    """
    nnz = positions.numel()
    if problem := _order_problem(positions, numel):
        raise ValueError(f"Cannot encode positions: {problem}.")
    if nnz == 0:
        return positions.new_empty(0, dtype=torch.uint8)
    if _is_mask(numel, nnz):
        return _pack_bits(positions, 8 * _mask_length(numel))
    low_bits = _low_bits(numel, nnz)
    ranks = torch.arange(nnz, device=positions.device)
    high = _pack_bits((positions.long() >> low_bits) + ranks, 8 * _elias_fano_lengths(numel, nnz)[1])
    return torch.cat([_pack_low(positions, low_bits), high])


def decode(code: Tensor, numel: int, nnz: int) -> Tensor:
    """Decode and check an index code.

    Args:
        code: bytes written by `encode`, uint8, shape `(code_length(numel, nnz),)`.
        numel: number of entries of the weight; taken from the base model, never from a file.
        nnz: number of positions.

    Returns:
        Positions, strictly increasing, shape `(nnz,)`, int32 (int64 where `numel > 2**31 - 1`), on the device of
        `code`.

    Raises:
        DeltaFormatError: wrong dtype or length, wrong number of set bits, a set padding bit, or positions that are
            out of range or not strictly increasing. No invalid position is ever returned.
    """
    if code.dtype != torch.uint8 or code.dim() != 1:
        raise DeltaFormatError(f"the index code must be one row of uint8, got {code.dtype} of {tuple(code.shape)}")
    if nnz > numel:
        raise DeltaFormatError(f"there are {nnz} values, but the weight has only {numel} entries")
    expected = code_length(numel, nnz)
    if code.numel() != expected:
        raise DeltaFormatError(
            f"the index code of {nnz} of {numel} positions takes {expected} bytes, got {code.numel()}"
        )
    if nnz == 0:
        return code.new_empty(0, dtype=position_dtype(numel))
    low_length = 0 if _is_mask(numel, nnz) else _elias_fano_lengths(numel, nnz)[0]
    positions = _set_bits(code[low_length:], nnz, position_dtype(numel))
    if low_length:
        # A last bit after that of the largest position, joined with its low bits, could wrap around in int32.
        if int(positions[-1]) - (nnz - 1) > numel >> _low_bits(numel, nnz):
            raise DeltaFormatError("the index code has bits beyond its last position")
        _join_low(_array(positions), code[:low_length], _low_bits(numel, nnz))
    if problem := _order_problem(positions, numel):
        raise DeltaFormatError(f"the index code is damaged: {problem}")
    return positions


def check_values(values: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    """Refuse values, as they are in a file, that are not floating-point numbers of this shape, finite once they become
    `dtype`.
    """
    if values.dtype not in VALUE_DTYPES or tuple(values.shape) != shape:
        raise DeltaFormatError(
            f"expected {math.prod(shape)} floating-point values of shape {shape}, the file has {values.dtype} of shape "
            f"{tuple(values.shape)}; the adapter in the file was made with another update_ratio, granularity or base "
            "model"
        )
    if not is_finite(values, dtype):
        raise DeltaFormatError("the file has values that are not finite")


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all floating-point entries of a tensor are finite, also once they are converted to `dtype`."""
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        tensor = tensor.to(dtype)
    if tensor.dtype not in _EXPONENTS:  # float8, which torch.isfinite does not support
        return bool(tensor.float().isfinite().all())
    integers, exponent = _EXPONENTS[tensor.dtype]
    return not bool(((_array(tensor.detach().view(integers)) & exponent) == exponent).any())


def _is_mask(numel: int, nnz: int) -> bool:
    return nnz > 0 and _mask_length(numel) <= sum(_elias_fano_lengths(numel, nnz))


def _mask_length(numel: int) -> int:
    return -(-numel // 8)


def _low_bits(numel: int, nnz: int) -> int:
    return (numel // nnz).bit_length() - 1


def _elias_fano_lengths(numel: int, nnz: int) -> tuple[int, int]:
    if nnz == 0:
        return 0, 0
    low_bits = _low_bits(numel, nnz)
    return -(-nnz // 8) * low_bits, -(-(nnz + (numel >> low_bits) + 1) // 8)


def _order_problem(positions: Tensor, numel: int) -> str | None:
    """Why `positions` is not strictly increasing within `[0, numel)`, or None."""
    if positions.numel() == 0:
        return None
    first, last, entries = int(positions[0]), int(positions[-1]), _array(positions)
    if first < 0 or last >= numel:
        return f"position {first if first < 0 else last} lies outside of the {numel} that there are"
    if not bool((entries[1:] > entries[:-1]).all()):
        return "positions are not strictly increasing"
    return None


def _pack_bits(positions: Tensor, num_bits: int) -> Tensor:
    bits = torch.zeros(num_bits, dtype=torch.uint8, device=positions.device)
    bits[positions.long()] = 1
    bits = bits.view(-1, 8)
    packed = bits[:, 0].clone()
    for bit in range(1, 8):
        packed |= bits[:, bit] << bit
    return packed


def _set_bits(packed: Tensor, expected: int, dtype: torch.dtype) -> Tensor:
    """Numbers of the set bits, increasing; refuses another number of them than expected."""
    if not packed.is_cpu:
        bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
        found = ((packed[:, None] >> bit) & 1).view(-1).nonzero().view(-1).to(dtype)
        _check_number(found.numel(), expected)
        return found
    found = torch.empty(expected, dtype=dtype, device="cpu")
    entries, data, number = found.numpy(), packed.numpy(), 0
    for start in range(0, data.size, _BLOCK):
        # numpy finds them without a branch per bit: eight times faster than torch
        block = np.flatnonzero(np.unpackbits(data[start : start + _BLOCK], bitorder="little").view(np.bool_))
        here = entries[number : number + block.size]
        here[:] = block[: here.size]
        here += 8 * start
        number += block.size
    _check_number(number, expected)
    return found


def _check_number(found: int, expected: int) -> None:
    if found != expected:
        raise DeltaFormatError(f"the index code selects {found} positions, expected {expected}")


def _pack_low(positions: Tensor, low_bits: int) -> Tensor:
    """The low bits of every position: groups of eight entries, `low_bits` bytes each."""
    groups = -(-positions.numel() // 8)
    low = torch.zeros(groups * 8, dtype=torch.int64, device=positions.device)
    low[: positions.numel()] = positions.long() & ((1 << low_bits) - 1)
    low = low.view(groups, 8)
    packed = torch.zeros(groups, low_bits, dtype=torch.uint8, device=positions.device)
    for entry in range(8):
        first, shift = divmod(entry * low_bits, 8)
        for byte in range(first, -(-(entry + 1) * low_bits // 8)):
            offset = 8 * (byte - first) - shift
            part = low[:, entry] >> offset if offset >= 0 else low[:, entry] << -offset
            packed[:, byte] |= (part & 0xFF).to(torch.uint8)
    return packed.view(-1)


def _join_low(entries: Any, packed: Tensor, low_bits: int) -> None:
    """Turn an array of the numbers of the bits into positions, in place: less their rank, then the low bits of
    `packed`.
    """
    words = _array(packed).reshape(-1, low_bits)
    step = min(len(words), _GROUPS) if packed.is_cpu else len(words)
    wide = torch.int32 if low_bits <= 23 else torch.int64
    columns = _array(torch.empty(low_bits, step, dtype=wide, device=packed.device))
    low = _array(torch.empty(step, 8, dtype=wide, device=packed.device))
    if packed.is_cpu:
        ranks = np.arange(8 * step, dtype=entries.dtype)
    else:
        ranks = torch.arange(8 * step, dtype=entries.dtype, device=packed.device)
    for start in range(0, len(words), step):
        group = words[start : start + step]
        _unpack_low(group.T, columns[:, : len(group)], low[: len(group)], low_bits)
        here, parts = entries[8 * start : 8 * (start + step)], low[: len(group)].reshape(-1)
        here -= ranks[: len(here)]
        here -= 8 * start
        here <<= low_bits
        here += parts[: len(here)]
        if bool(parts[len(here) :].any()):
            raise DeltaFormatError("the index code has bits beyond its last position")


def _unpack_low(packed: Any, columns: Any, low: Any, low_bits: int) -> None:
    """Unpack groups of eight entries of `low_bits` bytes.

    Args:
        packed: the bytes, shape `(low_bits, groups)`.
        columns: room for them as wider integers, of the same shape.
        low: where the entries go, shape `(groups, 8)`.
    """
    columns[:] = packed
    for entry in range(8):
        first, shift = divmod(entry * low_bits, 8)
        value = columns[first] >> shift
        for byte in range(first + 1, -(-(entry + 1) * low_bits // 8)):
            value |= columns[byte] << (8 * (byte - first) - shift)
        value &= (1 << low_bits) - 1
        low[:, entry] = value


def _array(tensor: Tensor) -> Any:
    """What computes with the entries of a tensor: numpy on a CPU, torch elsewhere; both in the same memory."""
    return tensor.numpy() if tensor.is_cpu else tensor
