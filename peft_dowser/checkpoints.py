"""Safetensors checkpoints of transformers models, read one tensor at a time by the names that the model gives them."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def model_class(config: PreTrainedConfig, name: str) -> type[PreTrainedModel]:
    """The class of a model that its config names.

    Raises:
        ValueError: it names none, or one that transformers does not have.
    """
    if not config.architectures:
        raise ValueError(f"The config of '{name}' names no architecture, so its model class is unknown.")
    found = getattr(transformers, config.architectures[0], None)
    if found is None:
        raise ValueError(f"'{name}' is a {config.architectures[0]}, which this version of transformers does not know.")
    return found


@dataclass
class Checkpoint:
    """An open checkpoint.

    Attributes:
        name: its folder or Hub id.
        model: its architecture, on the meta device.
        tensors: by the name in the model, the open file that holds a tensor, and the tensor's name there.
        twins: by the name of a tied tensor, the name that it is tied to; both ways.
    """

    name: str
    model: PreTrainedModel
    tensors: dict[str, tuple[Any, str]]
    twins: dict[str, str]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors or self.twins.get(name) in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, which is not read."""
        file, key = self._entry(name)
        return tuple(file.get_slice(key).get_shape())

    def dtype(self, name: str) -> str:
        """Dtype of a tensor, which is not read, as safetensors writes it: "BF16"."""
        file, key = self._entry(name)
        return file.get_slice(key).get_dtype()

    def read(self, name: str) -> Tensor:
        """A copy of a tensor, on the CPU."""
        file, key = self._entry(name)
        return file.get_tensor(key)

    def _entry(self, name: str) -> tuple[Any, str]:
        return self.tensors[name if name in self.tensors else self.twins[name]]


def open_checkpoint(name: str, files: ExitStack) -> Checkpoint:
    """Open a checkpoint in a folder or, by its id, on the Hub.

    Args:
        name: the folder or the id.
        files: closes the files of the checkpoint.

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
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"'{path}' is not a readable safetensors file ({error}).") from error
        opened.update(dict.fromkeys(file.keys(), file))
    tensors = {given: (opened[key], key) for key, given in _names(opened, model).items()}
    tied = model.all_tied_weights_keys
    return Checkpoint(name, model, tensors, twins=tied | {other: one for one, other in tied.items()})


def _locate(name: str) -> tuple[Path, list[Path]]:
    """The folder of a checkpoint and its safetensors files, downloaded where `name` is a Hub id."""
    folder = _fetched(name, ["config.json", _SINGLE, _INDEX])
    if (folder / _SINGLE).is_file():
        return folder, [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(
            f"'{name}' holds neither {_SINGLE} nor {_INDEX}. Load the model and write it with save_pretrained(), "
            "which makes one of them."
        )
    try:
        shards = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{folder / _INDEX}' is no index of a sharded checkpoint ({error!r}).") from error
    folder = _fetched(name, shards)
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise FileNotFoundError(f"'{name}' lacks {len(missing)} of its {len(shards)} shards, such as '{missing[0]}'.")
    return folder, [folder / shard for shard in shards]


def _fetched(name: str, wanted: list[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:
        raise OSError(f"'{name}' is neither a folder nor a model on the Hub that can be read ({error}).") from error


def _names(keys: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """The name in the model of every tensor in a checkpoint, renamed as transformers does on load.

    Tensors that the model does not have are left out. One that transformers converts on load is no parameter of the
    model by itself, and gets a name that no parameter has.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known = model.state_dict()
    names = {}
    for key in sorted(keys, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, known)
        if name in known:
            names[key] = name if converter is None else f"{key} (a part of {name})"
    return names
