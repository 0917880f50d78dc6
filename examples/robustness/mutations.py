"""The ways in which a saved adapter is damaged: the same for every method, each from a seeded generator."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from formats import FILE, NUMEL, TARGETS, WIDTHS, Format, keys_of
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Mutation = Callable[[Path, Format, random.Random], None]


def _of_positions(change: Callable[[list[int], random.Random], None]) -> Mutation:
    """Other positions, written as the method writes them."""

    def mutate(folder: Path, form: Format, generator: random.Random) -> None:
        tensors, module = load_file(folder / FILE), generator.choice(TARGETS)
        key = keys_of(form, module)[1]
        positions = form.read(tensors[key], WIDTHS[module]) or []
        change(positions, generator)
        tensors[key] = form.write(positions, WIDTHS[module])
        save_file(tensors, folder / FILE)

    return mutate


def _of_tensors(change: Callable[[Tensors, str, str, random.Random], None]) -> Mutation:
    """Other tensors; the change gets the names of a module's values and positions."""

    def mutate(folder: Path, form: Format, generator: random.Random) -> None:
        tensors = load_file(folder / FILE)
        change(tensors, *keys_of(form, generator.choice(TARGETS)), generator)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / FILE)

    return mutate


def _of_bytes(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Mutation:
    def mutate(folder: Path, form: Format, generator: random.Random) -> None:
        content = (folder / FILE).read_bytes()
        (folder / FILE).write_bytes(change(bytearray(content), generator))

    return mutate


def _out_of_range(positions: list[int], generator: random.Random) -> None:
    at = NUMEL + generator.randrange(40) if generator.random() < 0.5 else 1 << generator.randrange(9, 30)
    positions[generator.choice([-1, generator.randrange(len(positions))])] = at


def _negative(positions: list[int], generator: random.Random) -> None:
    positions[generator.choice([0, generator.randrange(len(positions))])] = -generator.randint(1, 40)


def _duplicate(positions: list[int], generator: random.Random) -> None:
    at = generator.randrange(1, len(positions))
    positions[at] = positions[at - 1]


def _unsorted(positions: list[int], generator: random.Random) -> None:
    one, other = generator.sample(range(len(positions)), 2)
    positions[one], positions[other] = positions[other], positions[one]


def _float_index(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    tensors[index] = tensors[index].float() + generator.choice([0.3, 0.7, -0.5])


def _missing(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    del tensors[index if generator.random() < 0.7 else values]


def _not_finite(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    number = generator.choice([float("nan"), float("inf"), -float("inf")])
    tensors[values][generator.randrange(len(tensors[values]))] = number


def _wrong_length(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    key = generator.choice([values, index])
    length = generator.randrange(2 * tensors[key].shape[-1])
    length += length >= tensors[key].shape[-1]
    tensors[key] = torch.cat([tensors[key]] * 2, dim=-1)[..., :length]


def _wrong_shape(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    key = generator.choice([values, index])
    tensors[key] = tensors[key].reshape(generator.choice([(-1, 1), (1, -1), (1, 1, -1), (-1, 1, 1)]))


def _wrong_dtype(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    key, dtypes = generator.choice([(values, [torch.int32, torch.uint8, torch.bool]), (index, [torch.bool])])
    tensors[key] = tensors[key].to(generator.choice(dtypes))


def _extra(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    head = {key.replace(".up.", ".head.").replace(".down.", ".head."): tensors[key].clone() for key in (values, index)}
    base = "base_model.model."
    tensors |= generator.choice(
        [
            {f"{base}head.weight": torch.ones(4, 12)},
            {f"{base}up.base_layer.weight": torch.ones(20, 12)},
            {f"{base}up.base_layer.bias": torch.ones(20)},
            head,
            {f"{base}up.lora_A.weight": torch.ones(2, 12)},
        ]
    )


def _renamed(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    key = generator.choice([values, index])
    name = key + "x" if generator.random() < 0.5 else key.replace("up.", "u.").replace("down.", "dow.")
    tensors[name] = tensors.pop(key)


def _flip_bits(content: bytearray, generator: random.Random) -> bytearray:
    for _ in range(generator.randint(1, 4)):
        content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    return content


def _truncate(content: bytearray, generator: random.Random) -> bytearray:
    return content[: generator.randrange(len(content))]


def _header_bytes(content: bytearray, generator: random.Random) -> bytearray:
    end = 8 + _header_length(content)
    for _ in range(generator.randint(1, 3)):
        content[generator.randrange(end)] ^= generator.randrange(1, 256)
    return content


def _header_fields(content: bytearray, generator: random.Random) -> bytes:
    """A header that can be read, whose entry of one tensor says something else."""
    length = _header_length(content)
    header = json.loads(content[8 : 8 + length])
    entry = header[generator.choice(sorted(header.keys() - {"__metadata__"}))]
    field = generator.choice(["dtype", "shape", "data_offsets"])
    if field == "dtype":
        entry["dtype"] = generator.choice(["F32", "I32", "U32", "I64", "F64", "BOOL", "U8", "I8", "F8_E4M3"])
    else:
        numbers = entry[field]
        numbers[generator.randrange(len(numbers))] = generator.choice([0, 1, 2, 12, 24, 32, 240, 2**32, 2**62, -1])
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


def _header_length(content: bytearray) -> int:
    return struct.unpack("<Q", content[:8])[0]


MUTATIONS: dict[str, Mutation] = {
    "index out of range": _of_positions(_out_of_range),
    "negative index": _of_positions(_negative),
    "one index twice": _of_positions(_duplicate),
    "unsorted indices": _of_positions(_unsorted),
    "indices that are no whole numbers": _of_tensors(_float_index),
    "indices or values missing": _of_tensors(_missing),
    "NaN or infinite values": _of_tensors(_not_finite),
    "wrong length": _of_tensors(_wrong_length),
    "wrong shape": _of_tensors(_wrong_shape),
    "wrong dtype": _of_tensors(_wrong_dtype),
    "a tensor more": _of_tensors(_extra),
    "a tensor renamed": _of_tensors(_renamed),
    "flipped bits": _of_bytes(_flip_bits),
    "truncated": _of_bytes(_truncate),
    "other bytes in the header": _of_bytes(_header_bytes),
    "other fields in the header": _of_bytes(_header_fields),
}
