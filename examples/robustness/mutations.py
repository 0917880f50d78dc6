"""The ways in which a saved adapter is damaged: the same for every method, each from a seeded generator."""

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from formats import CONFIG, FILE, NUMEL, TARGETS, WIDTHS, Format, keys_of, whole_keys
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


# Of an adapter with whole tensors. Whoever changes its file on purpose also changes what the config says of it.


def seal(folder: Path, form: Format) -> None:
    """Make counts, digests and numbers in the config those of the file, as far as the file has the tensors."""
    tensors, settings = load_file(folder / FILE), json.loads((folder / CONFIG).read_text())
    for module in TARGETS:
        values, index = (tensors.get(key) for key in keys_of(form, module))
        entry = settings["manifest"]["modules"][module]
        if values is not None:
            entry["values_sha256"] = _digest(values)
            entry["nnz"] = settings["nnz_pattern"][module] = values.numel()
        if index is not None:
            entry["code_sha256"] = _digest(index)
    (folder / CONFIG).write_text(json.dumps(settings))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())).hexdigest()


def _sealed(mutate: Mutation) -> Mutation:
    def mutate_and_seal(folder: Path, form: Format, generator: random.Random) -> None:
        mutate(folder, form, generator)
        seal(folder, form)

    return mutate_and_seal


def _of_whole(change: Callable[[Tensors, str, random.Random], None]) -> Mutation:
    """Other whole tensors; the change gets the name of one."""

    def mutate(folder: Path, form: Format, generator: random.Random) -> None:
        tensors = load_file(folder / FILE)
        change(tensors, generator.choice(whole_keys(tensors)), generator)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / FILE)

    return mutate


def _whole_not_finite(tensors: Tensors, key: str, generator: random.Random) -> None:
    number = generator.choice([float("nan"), float("inf"), -float("inf")])
    tensors[key].view(-1)[generator.randrange(tensors[key].numel())] = number


def _whole_wrong_shape(tensors: Tensors, key: str, generator: random.Random) -> None:
    shape = list(tensors[key].shape)
    at = generator.randrange(len(shape))
    kind = generator.randrange(3)
    if kind == 0:
        shape[at] = generator.choice([0, 1, shape[at] - 1, shape[at] + 1, 2 * shape[at]])
    elif kind == 1:
        shape.insert(at, 1)
    else:
        shape = [tensors[key].numel()] if len(shape) > 1 else [1, *shape]
    tensors[key] = torch.full(shape, 7.0)


def _whole_wrong_dtype(tensors: Tensors, key: str, generator: random.Random) -> None:
    dtypes = [torch.complex64, torch.bool, torch.int64, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.float64]
    tensors[key] = tensors[key].to(generator.choice(dtypes))
    if tensors[key].dtype == torch.float64:
        tensors[key] += 1e300


def _whole_missing(tensors: Tensors, key: str, generator: random.Random) -> None:
    # What PEFT saves a second time, the embeddings and biases may be left out.
    names = ["head.weight", "head.bias", "words.token_adapter.trainable_tokens_delta"]
    del tensors[f"base_model.model.{generator.choice(names)}"]


def _whole_renamed(tensors: Tensors, key: str, generator: random.Random) -> None:
    name = generator.choice(
        [
            key + "x",
            key.replace("base_model.model.", "base_model.model.x."),
            key.replace(".head.", ".headx.") + ".default",
        ]
    )
    tensors[name] = tensors.pop(key)


def _whole_extra(tensors: Tensors, key: str, generator: random.Random) -> None:
    name = generator.choice(
        [
            "fixed.weight",
            "fixed.bias",
            "up.base_layer.weight",
            "head.original_module.weight",
            "nowhere.bias",
            "x.weight",
        ]
    )
    tensors[f"base_model.model.{name}"] = torch.full((20, 12) if "up." in name else (12, 12), 7.0)


def _values_become_infinite(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    tensors[values] = tensors[values].double() + generator.choice([1e39, -1e300])


def _named_by_adapter(tensors: Tensors, values: str, index: str, generator: random.Random) -> None:
    key = generator.choice([values, index])
    stem, _, leaf = key.rpartition(".")
    tensors[f"{stem}.default.{leaf}"] = tensors.pop(key)


def _of_config(change: Callable[[dict[str, Any], random.Random], None]) -> Mutation:
    def mutate(folder: Path, form: Format, generator: random.Random) -> None:
        settings = json.loads((folder / CONFIG).read_text())
        change(settings, generator)
        (folder / CONFIG).write_text(json.dumps(settings))

    return mutate


ODD = [
    None,
    True,
    0,
    -1,
    3,
    2**70,
    1.5,
    1e300,
    "",
    "x",
    "up",
    "(",
    [],
    [""],
    ["up"],
    ["head", "fixed"],
    [None],
    [0],
    [-1],
]
ODD += [[3, 3], [10], {}, {"up": 24}, {"words": [0]}, {"": [1]}, {"up": [1, 4]}, [[]], [{}]]


def _odd_field(settings: dict[str, Any], generator: random.Random) -> None:
    # PEFT reads the type before it knows whose file it is.
    settings[generator.choice(sorted(settings.keys() - {"peft_type"}))] = generator.choice(ODD)


def _odd_whole(settings: dict[str, Any], generator: random.Random) -> None:
    changes: list[tuple[str, list[Any]]] = [
        ("modules_to_save", [None, [""], ["up"], ["words"], ["head", "fixed"], ["head", ""], ["fixed"], "head", [3]]),
        (
            "trainable_token_indices",
            [None, [-1, 4], [1, 1], [1, 10], [1], [1, 4, 5], {"fixed": [1, 4]}, {"head": [0, 1]}],
        ),
        ("bias", ["none", "dowser_only", "lora_only", None, ["all"]]),
        ("ensure_weight_tying", [True, None, 1]),
        (
            "target_modules",
            [["up"], ["head"], ["nope"], None, "all-linear", "up|down|head", [""], ["up", "down", "fixed"]],
        ),
        ("exclude_modules", [["up"], "up", [""], [3], "("]),
    ]
    field, values = generator.choice(changes)
    settings[field] = generator.choice(values)


def _odd_counts(settings: dict[str, Any], generator: random.Random) -> None:
    counts, modules = settings["nnz_pattern"], settings["manifest"]["modules"]
    module = generator.choice(TARGETS)
    kind = generator.randrange(4)
    if kind == 0:
        settings["nnz_pattern"] = generator.choice([None, {}, [], 24, {"up": 24}, {"": 24}])
    elif kind == 1:
        counts[module] = modules[module]["nnz"] = generator.choice(
            [0, -1, 1, 23, 25, 240, 241, 2**62, 24.0, True, "24"]
        )
    elif kind == 2:
        name = generator.choice(["head", "fixed", "words", "nope", "", "up.x", module + " "])
        counts[name], modules[name] = counts.pop(module), modules.pop(module)
    else:
        entry = modules[module]
        field = generator.choice(sorted(entry.keys() - {"values_sha256", "base_sample"}))
        entry[field] = generator.choice([value for value in [None, -1, [], [240], [12, 20], "00", {}, True, 1.5]])


def _odd_manifest(settings: dict[str, Any], generator: random.Random) -> None:
    settings["manifest"] = generator.choice(
        [{}, [], "x", 1, {"format": 1}, {"format": 2, "modules": {}}, {"modules": {}}]
    )


WHOLE_MUTATIONS: dict[str, Mutation] = {
    "whole tensor not finite": _sealed(_of_whole(_whole_not_finite)),
    "whole tensor of another shape": _sealed(_of_whole(_whole_wrong_shape)),
    "whole tensor of another dtype": _sealed(_of_whole(_whole_wrong_dtype)),
    "whole tensor missing": _sealed(_of_whole(_whole_missing)),
    "whole tensor renamed": _sealed(_of_whole(_whole_renamed)),
    "a whole tensor more": _sealed(_of_whole(_whole_extra)),
    "index out of range, sealed": _sealed(_of_positions(_out_of_range)),
    "one index twice, sealed": _sealed(_of_positions(_duplicate)),
    "unsorted indices, sealed": _sealed(_of_positions(_unsorted)),
    "wrong length, sealed": _sealed(_of_tensors(_wrong_length)),
    "wrong shape, sealed": _sealed(_of_tensors(_wrong_shape)),
    "values that become infinite, sealed": _sealed(_of_tensors(_values_become_infinite)),
    "named as in a model, sealed": _sealed(_of_tensors(_named_by_adapter)),
    "odd field of the config": _of_config(_odd_field),
    "odd whole modules in the config": _of_config(_odd_whole),
    "odd counts in the config": _of_config(_odd_counts),
    "odd manifest in the config": _of_config(_odd_manifest),
}


def mutations_of(form: Format) -> dict[str, Mutation]:
    if form.whole:
        return WHOLE_MUTATIONS
    return {kind: mutate for kind, mutate in MUTATIONS.items() if not (form.unordered and kind == "unsorted indices")}
