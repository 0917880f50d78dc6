"""The index code: byte for byte what its specification says, and out of no bytes an invalid position."""

import random
import re
from itertools import combinations, count

import pytest
import torch

from peft_dowser import DeltaFormatError
from peft_dowser.delta import codec
from peft_dowser.delta.codec import code_length, decode, encode, position_dtype

NUMELS = [1, 2, 7, 8, 9, 63, 64, 65, 1001, 100_003]
RATIOS = [0.001, 0.01, 0.03, 0.1, 0.25, 0.3, 0.35, 0.5, 0.9]
CASES = sorted({(n, k) for n in NUMELS for k in [0, 1, n - 1, n, *(round(r * n) for r in RATIOS)] if k >= 0})
# Codes of both layouts, with and without padding, small enough for every kind of damage.
SMALL = [(12, 5), (16, 7), (64, 3), (100, 2), (100, 8), (300, 9), (1 << 33, 3)]


# The specification, in Python integers


def bits(numbers, length: int) -> bytes:
    """Bytes in which these bits are set, numbered from the least significant bit of the first byte."""
    packed = bytearray(-(-length // 8))
    for number in numbers:
        packed[number // 8] |= 1 << number % 8
    return bytes(packed)


def low_bits(numel: int, nnz: int) -> int:
    """The largest l with 2^l <= numel / nnz."""
    return next(width for width in count() if nnz << (width + 1) > numel)


def low_length(numel: int, nnz: int) -> int:
    return -(-nnz // 8) * low_bits(numel, nnz)


def elias_fano(positions: list[int], numel: int) -> bytes:
    nnz, width = len(positions), low_bits(numel, len(positions))
    low = (i * width + bit for i, at in enumerate(positions) for bit in range(width) if at >> bit & 1)
    high = ((at >> width) + i for i, at in enumerate(positions))
    return bits(low, 8 * low_length(numel, nnz)) + bits(high, nnz + (numel >> width) + 1)


def is_mask(numel: int, nnz: int) -> bool:
    high_length = -(-(nnz + (numel >> low_bits(numel, nnz)) + 1) // 8)
    return -(-numel // 8) <= low_length(numel, nnz) + high_length


def written(positions: list[int], numel: int) -> bytes:
    """What `encode` should write."""
    if not positions:
        return b""
    return bits(positions, numel) if is_mask(numel, len(positions)) else elias_fano(positions, numel)


def ones(packed: bytes) -> list[int]:
    return [8 * number + bit for number, byte in enumerate(packed) for bit in range(8) if byte >> bit & 1]


def read(code: bytes, numel: int, nnz: int) -> list[int] | None:
    """The positions whose code these bytes are, or None where they are no code."""
    found = ones(code)
    if not is_mask(numel, nnz):
        width, split = low_bits(numel, nnz), low_length(numel, nnz)
        low = int.from_bytes(code[:split], "little")
        found = [(one - i << width) + (low >> i * width) % (1 << width) for i, one in enumerate(ones(code[split:]))]
    rising = all(a < b for a, b in zip([-1, *found], [*found, numel], strict=True))
    return found if rising and len(found) == nnz and written(found, numel) == code else None


# Between bytes and tensors


def sample(numel: int, nnz: int, seed: int = 0) -> list[int]:
    return sorted(random.Random(seed).sample(range(numel), nnz))


def encoded(positions: list[int], numel: int) -> bytes:
    code = encode(torch.tensor(positions, dtype=position_dtype(numel)), numel)
    assert (code.dtype, code.dim()) == (torch.uint8, 1)
    return bytes(code.tolist())


def tensor(code: bytes) -> torch.Tensor:
    return torch.tensor(list(code), dtype=torch.uint8)


def decoded(code: bytes, numel: int, nnz: int) -> list[int] | None:
    """Positions, or None where the code is refused; any other error fails the test."""
    try:
        return decode(tensor(code), numel, nnz).tolist()
    except DeltaFormatError:
        return None


# Writing and reading back


@pytest.mark.parametrize(("numel", "nnz"), CASES)
def test_the_bytes_are_those_of_the_specification_and_come_back(numel: int, nnz: int) -> None:
    positions = sample(numel, nnz)
    code = written(positions, numel)
    assert encoded(positions, numel) == code
    found = decode(tensor(code), numel, nnz)
    assert (found.dtype, found.shape) == (torch.int32, (nnz,))
    assert found.tolist() == positions


@pytest.mark.parametrize("numel", range(1, 11))
def test_every_mask_of_a_tiny_weight_is_written_and_read(numel: int) -> None:
    masks = [list(mask) for nnz in range(numel + 1) for mask in combinations(range(numel), nnz)]
    assert len(masks) == 2**numel
    assert [encoded(mask, numel) for mask in masks] == [written(mask, numel) for mask in masks]
    assert [decoded(written(mask, numel), numel, len(mask)) for mask in masks] == masks


@pytest.mark.parametrize("low", [1, 2, 7, 8, 9, 22, 23, 24, 25, 27, 31, 32, 33, 40, 56, 57, 59])
@pytest.mark.parametrize("nnz", [1, 8, 11])
def test_low_parts_of_every_width_come_back(low: int, nnz: int) -> None:
    numel = (nnz << low) + (nnz << low) // 4
    positions = sorted({0, numel - 1, *sample(numel, nnz)})[-nnz:]
    assert encoded(positions, numel) == written(positions, numel)
    found = decode(tensor(written(positions, numel)), numel, nnz)
    assert found.dtype == position_dtype(numel)
    assert found.tolist() == positions


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**31 + 1, 2**40, 2**62])
@pytest.mark.parametrize("nnz", [1, 2, 1000])
def test_a_huge_weight_costs_only_what_its_positions_cost(numel: int, nnz: int) -> None:
    positions = [*sample(numel - 1, nnz - 1), numel - 1]
    code = written(positions, numel)
    assert len(code) < 8 * nnz + 64
    assert encoded(positions, numel) == code
    found = decode(tensor(code), numel, nnz)
    assert found.dtype == (torch.int32 if numel < 2**31 else torch.int64)
    assert found.tolist() == positions


@pytest.mark.parametrize("positions", [[0, 1, 2], [97, 98, 99], [0, 99], [0, 50, 99], [63, 64]])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_positions_of_any_integer_type_have_one_code(dtype: torch.dtype, positions: list[int]) -> None:
    given = torch.tensor(positions, dtype=dtype)
    assert bytes(encode(given, 100).tolist()) == written(positions, 100)
    assert given.tolist() == positions


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("nnz", [10, 101, 700])
def test_positions_do_not_depend_on_the_block(nnz: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_BLOCK", block)
    monkeypatch.setattr(codec, "_GROUPS", block)
    assert decoded(written(sample(1001, nnz), 1001), 1001, nnz) == sample(1001, nnz)


# Length


@pytest.mark.parametrize(("numel", "nnz"), CASES)
def test_the_length_depends_on_the_counts_alone(numel: int, nnz: int) -> None:
    spread = [numel * i // max(nnz, 1) for i in range(nnz)]
    kinds = [list(range(nnz)), list(range(numel - nnz, numel)), spread]
    assert {len(encoded(positions, numel)) for positions in kinds} == {code_length(numel, nnz)}


@pytest.mark.parametrize("numel", [10_000, 99_991, 4096 * 4096, 11008 * 4096])
def test_a_position_takes_less_than_five_and_a_half_bits_at_the_default_ratio(numel: int) -> None:
    nnz = round(0.1 * numel)
    assert 4.69 * nnz < 8 * code_length(numel, nnz) <= 5.4 * nnz


@pytest.mark.parametrize("numel", [1, 7, 8, 1000, 4099])
def test_no_code_is_longer_than_a_bit_mask(numel: int) -> None:
    lengths = [code_length(numel, nnz) for nnz in range(numel + 1)]
    assert lengths[0] == 0
    assert max(lengths) == lengths[-1] == -(-numel // 8)


# Damage: exactly the bytes that the specification writes are read, all others are refused


@pytest.mark.parametrize(("numel", "nnz"), SMALL)
@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_refused_or_gives_valid_positions(numel: int, nnz: int, seed: int) -> None:
    code = written(sample(numel, nnz, seed), numel)
    whole = int.from_bytes(code, "little")
    damaged = [(whole ^ 1 << bit).to_bytes(len(code), "little") for bit in range(8 * len(code))]
    found = [decoded(bad, numel, nnz) for bad in damaged]
    assert found == [read(bad, numel, nnz) for bad in damaged]
    assert None in found


@pytest.mark.parametrize(("numel", "nnz"), SMALL)
def test_two_exchanged_bits_are_refused_or_give_valid_positions(numel: int, nnz: int) -> None:
    code = written(sample(numel, nnz), numel)
    whole = int.from_bytes(code, "little")
    pairs = [(a, b) for a, b in combinations(range(8 * len(code)), 2) if (whole >> a ^ whole >> b) & 1]
    pairs = random.Random(0).sample(pairs, min(len(pairs), 400))
    damaged = [(whole ^ 1 << a ^ 1 << b).to_bytes(len(code), "little") for a, b in pairs]
    found = [decoded(bad, numel, nnz) for bad in damaged]
    assert found == [read(bad, numel, nnz) for bad in damaged]
    assert any(found)


@pytest.mark.parametrize(("numel", "nnz"), SMALL)
def test_random_bytes_are_refused_or_give_valid_positions(numel: int, nnz: int) -> None:
    generator = random.Random(0)
    codes = [generator.randbytes(code_length(numel, nnz)) for _ in range(400)]
    assert [decoded(code, numel, nnz) for code in codes] == [read(code, numel, nnz) for code in codes]


@pytest.mark.parametrize("numel", range(1, 9))
def test_of_all_bytes_exactly_the_masks_are_read(numel: int) -> None:
    accepted = {byte for byte in range(256) if decoded(bytes([byte]), numel, numel // 2 + 1) is not None}
    assert accepted == {byte for byte in range(2**numel) if byte.bit_count() == numel // 2 + 1}


GOOD = tensor(written([5, 99], 100))


def raised(code: bytes, byte: int, bit: int) -> bytes:
    """The code with one more bit set."""
    assert not code[byte] >> bit & 1
    return code[:byte] + bytes([code[byte] | 1 << bit]) + code[byte + 1 :]


@pytest.mark.parametrize(
    ("code", "numel", "nnz", "message"),
    [
        (GOOD.to(torch.int8), 100, 2, "must be one row of uint8, got torch.int8 of (6,)"),
        (GOOD.float(), 100, 2, "must be one row of uint8, got torch.float32 of (6,)"),
        (GOOD.view(1, 6), 100, 2, "must be one row of uint8, got torch.uint8 of (1, 6)"),
        (torch.tensor(0, dtype=torch.uint8), 8, 4, "must be one row of uint8, got torch.uint8 of ()"),
        (GOOD[:-1], 100, 2, "of 2 of 100 positions takes 6 bytes, got 5"),
        (GOOD, 200, 2, "of 2 of 200 positions takes 7 bytes, got 6"),
        (GOOD, 100, 9, "of 9 of 100 positions takes 9 bytes, got 6"),
        (GOOD, 100, 0, "of 0 of 100 positions takes 0 bytes, got 6"),
        (GOOD[:0], 100, 2, "of 2 of 100 positions takes 6 bytes, got 0"),
        (torch.zeros(6, dtype=torch.uint8), 100, 2, "selects 0 positions, expected 2"),
        (tensor(raised(written([5, 99], 100), 5, 7)), 100, 2, "selects 3 positions, expected 2"),
        (tensor(written([1, 3, 4], 7)), 7, 4, "selects 3 positions, expected 4"),
        (tensor(raised(written([1, 2, 3, 4], 7), 0, 7)), 7, 4, "selects 5 positions, expected 4"),
        (tensor(bits([1, 3, 4, 7], 8)), 7, 4, "damaged: position 7 lies outside of the 7 that there are"),
        (tensor(elias_fano([5, 100], 100)), 100, 2, "damaged: position 100 lies outside of the 100 that there are"),
        (tensor(elias_fano([37, 33], 100)), 100, 2, "damaged: positions are not strictly increasing"),
        (tensor(elias_fano([33, 33], 100)), 100, 2, "damaged: positions are not strictly increasing"),
        (tensor(raised(written([5, 99], 100), 1, 2)), 100, 2, "has bits beyond its last position"),
        (tensor(raised(written([5, 99], 100), 4, 7)), 100, 2, "has bits beyond its last position"),
    ],
)
def test_a_damaged_code_is_refused_with_its_fault(code: torch.Tensor, numel: int, nnz: int, message: str) -> None:
    with pytest.raises(DeltaFormatError, match="^the index code .*" + re.escape(message) + "$"):
        decode(code, numel, nnz)


@pytest.mark.parametrize(
    ("positions", "problem"),
    [
        ([0, 100], "position 100 lies outside of the 100 that there are"),
        ([-1, 5], "position -1 lies outside of the 100 that there are"),
        ([-3, 500], "position -3 lies outside of the 100 that there are"),
        ([5, 5], "positions are not strictly increasing"),
        ([7, 3], "positions are not strictly increasing"),
        ([1, 200, 50], "positions are not strictly increasing"),
        ([0, -5, 50], "positions are not strictly increasing"),
        ([*range(99), 98], "positions are not strictly increasing"),
    ],
)
def test_positions_that_are_no_mask_are_not_written(positions: list[int], problem: str) -> None:
    with pytest.raises(ValueError, match=rf"^Cannot encode positions: {problem}\.$"):
        encode(torch.tensor(positions), 100)


def test_more_values_than_weights_are_refused() -> None:
    with pytest.raises(DeltaFormatError, match="there are 6 values, but the weight has only 5 entries"):
        decode(torch.zeros(1, dtype=torch.uint8), 5, 6)


@pytest.mark.parametrize("numel", [2**29, 2**30, 2**31 - 1, 2**31, 2**40])
def test_one_position_has_one_code(numel: int) -> None:
    code = encode(torch.tensor([813]), numel)
    accepted = []
    for high in range(256):
        other = code.clone()
        other[-1] = high
        try:
            accepted.append(int(decode(other, numel, 1)))
        except DeltaFormatError:
            continue
    assert len(set(accepted)) == len(accepted)
    assert 813 in accepted
