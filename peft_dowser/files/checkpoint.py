"""Safetensors checkpoints of transformers models, read one tensor at a time by the names that the model gives them."""

import json
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .._transformers import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    tied_weights,
)
from ..delta.format import printable, quoted
from ..delta.safe_files import open_tensors

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

# Dtypes of weights that a delta can be added to, as safetensors writes them.
FLOAT_DTYPES = ("F16", "BF16", "F32", "F64")

# What makes a folder of weights a model: configurations, tokenizer (its files by the names of transformers' classes),
# processor, templates, and the code that a configuration may name.
_TOKENIZERS = ["*.txt", "*.model", "*.tiktoken", "*.spm", "bpe.codes", "prophetnet.tokenizer"]

_COMPANIONS = ["*.json", *_TOKENIZERS, "*.jinja", "additional_chat_templates/*.jinja", "*.py"]

# What describes other weights in the same folder.
_NO_COMPANIONS = ["*.index.json", "adapter_config.json", "trainer_state.json"]

# What an adapter does not decide, though it may lie in the folder of a model.
_OF_A_BASE = ["config.json", "generation_config.json", "*.py"]


def model_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class of a model that its config names; refuses a config that names none, or one that transformers does not
    have.
    """
    if not config.architectures:
        raise ValueError(f"The config of '{name}' names no architecture, so its model class is unknown.")
    found = getattr(transformers, config.architectures[0], None)
    if found is None:
        raise ValueError(
            f"'{name}' is a {printable(config.architectures[0])}, which this version of transformers does not know."
        )
    return found


@dataclass
class Checkpoint:
    """An open checkpoint.

    Attributes:
        name: its folder or Hub id.
        model: its architecture, on the meta device.
        files: by the name in the checkpoint, the open file that holds a tensor.
        tensors: by the name in the model, a tensor's name in the checkpoint.
        pieces: by the name of a fused parameter that is in the checkpoint as one tensor per expert, or several, their
            names in the checkpoint, in the order in which they lie in the memory of the parameter.
        tied: by the name of a tied tensor, the name that it is tied to; both ways.
    """

    name: str
    model: PreTrainedModel
    files: dict[str, Any]
    tensors: dict[str, str]
    pieces: dict[str, list[str]]
    tied: dict[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or self.tied.get(name) in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, which is not read, as safetensors writes it: "BF16"."""
        return self._slice(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU: memory of the file, which must not be written."""
        return self.tensor(self.key(name))

    def key(self, name: str) -> str:
        """The name in the checkpoint of a tensor, or of the one that it is tied to."""
        return self.tensors[name if name in self.tensors else self.tied[name]]

    def pieces_of(self, name: str) -> list[str]:
        """The names in the checkpoint of what makes up a tensor, in the order of its memory; empty where it is not."""
        return self.pieces.get(name) or ([self.key(name)] if name in self else [])

    def tensor(self, key: str) -> Tensor:
        """A tensor by its name in the checkpoint, as `read` gives it."""
        return self.files[key].get_tensor(key)

    def _slice(self, name: str) -> Any:
        key = self.key(name)
        return self.files[key].get_slice(key)


def open_checkpoint(name: str, files: ExitStack) -> Checkpoint:
    """Open a checkpoint in a folder or, by its id, on the Hub; `files` closes it.

    Raises:
        OSError: there is no such checkpoint, or it is not in safetensors files.
        ValueError: a file is damaged, or the architecture is not known.
    """
    folder, paths = _locate(name)
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(config, name)(config)
    opened: dict[str, Any] = {}
    for path in paths:
        file = open_tensors(path, files)
        opened.update(dict.fromkeys(file.keys(), file))
    names, pieces = _names(opened, model)
    tensors: dict[str, str] = {}
    for key, given in names.items():
        tensors.setdefault(given, key)  # of two for one name transformers loads the first
    tied = tied_weights(model)
    return Checkpoint(name, model, opened, tensors, pieces, tied=tied | {other: one for one, other in tied.items()})


def fetched(name: str, wanted: list[str]) -> Path:
    """The folder of that name, or a Hub id's snapshot with the wanted files, as far as they exist."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise OSError(f"'{name}' is neither a folder nor a model on the Hub that can be read ({error}).") from error


def copy_companions(name: str, work: Path, of_adapter: bool = False) -> None:
    """Copy the files that go with the weights of a model; of an adapter, its tokenizer and templates."""
    folder = fetched(name, _COMPANIONS)
    left_out = _NO_COMPANIONS + (_OF_A_BASE if of_adapter else [])
    for path in {path for pattern in _COMPANIONS for path in folder.glob(pattern)}:
        if not any(map(path.match, left_out)):
            to = work / path.relative_to(folder)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, to)


def _locate(name: str) -> tuple[Path, list[Path]]:
    folder = fetched(name, ["config.json", SINGLE_FILE, INDEX_FILE])
    if (folder / SINGLE_FILE).is_file():
        return folder, [folder / SINGLE_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise FileNotFoundError(
            f"'{name}' holds neither {SINGLE_FILE} nor {INDEX_FILE}. Load the model and write it with "
            "save_pretrained(), which makes one of them."
        )
    try:
        shards = sorted(set(json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{folder / INDEX_FILE}' is not an index of a sharded checkpoint ({error!r}).") from error
    folder = fetched(name, shards)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(
            f"'{name}' lacks {len(missing)} of its {len(shards)} shards, such as {quoted(missing[0])}."
        )
    return folder, [folder / shard for shard in shards]


def _names(keys: Iterable[str], model: PreTrainedModel) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The name in the model of every tensor in a checkpoint, renamed as transformers does on load; and the pieces.

    Tensors that the model does not have are left out. One that transformers converts on load is not a parameter of the
    model by itself, and gets a name that no parameter has.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str] = {}
    converted: dict[str, dict[str, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name in known:
            names[key] = name if pattern is None else f"{key} (a part of {name})"
        if name in known and pattern is not None:
            converted.setdefault(name, {}).setdefault(pattern, []).append(key)
    return names, {name: order for name, parts in converted.items() if (order := _in_memory(parts, converters))}


def _in_memory(parts: dict[str, list[str]], converters: list[WeightConverter]) -> list[str] | None:
    """The tensors that make up a parameter, in the order of its memory; None where it is not just a stack of them.

    `parts` has the tensors by the pattern that their names match, in the order of the experts.
    """
    converter = next(converter for converter in converters if parts.keys() <= set(converter.source_patterns))
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    stacks = operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    if not stacks or len({len(keys) for keys in parts.values()}) != 1:
        return None
    ordered = [parts[pattern] for pattern in converter.source_patterns if pattern in parts]
    return [key for expert in zip(*ordered, strict=True) for key in expert]
