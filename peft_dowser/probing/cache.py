"""The cache of probes and prompts: what was made once is read from the user's cache folder, bit for bit.

`DOWSER_CACHE` names another folder, or is "off". A file is found by a digest of everything that its content depends
on, so nothing in the folder ever has to be brought up to date, and all of it may be deleted.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._peft import adapter_parts
from .._transformers import implementations
from .._version import __version__
from ..base.storage import backend_of, onloaded
from ..delta.format import base_name
from .prompts import Prompt
from .settings import ProbeSettings
from .statistics import ProbeStatistics

logger = logging.getLogger(__name__)

# Files, by a digest of what their content depends on, statistics also by their backwards; others in the folder are left
# alone.
_NAMES = ("probe-{}-{}.safetensors", "prompts-{}.safetensors")

# Bytes of all cached files; the oldest are deleted beyond it.
_LIMIT = 4_000_000_000

# The integers of as many bytes as an entry.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def statistics_paths(model: nn.Module, samples: Mapping[str, str | None], settings: ProbeSettings) -> list[Path]:
    """The files in the cache that may hold what a probe with synthetic prompts measures; the first is its own.

    A probe with backwards has measured what forwards alone measure too; the opposite does not hold. There are none
    where the cache is off, or a digest cannot tell everything that the statistics depend on: what a quantized weight
    stands for, what a hook does, or which image processor lies in a folder. The base is not sharded; `samples`
    are the samples of the target weights by name.
    """
    if None in samples.values():
        return []
    forwards = replace(settings, num_rademacher=0, gradient=False)
    found = _folder_and_digest(model, settings, [list(samples), astuple(forwards)])
    if found is None:
        return []
    folder, digest = found
    backwards = f"{settings.num_rademacher}{'-gradient' if settings.gradient else ''}"
    own = folder / _NAMES[0].format(digest, backwards)
    others = [] if settings.backward else sorted(folder.glob(_NAMES[0].format(digest, "*")))
    return [own, *(path for path in others if path != own)]


def prompts_path(model: nn.Module, settings: ProbeSettings) -> Path | None:
    """The file in the cache for the prompts that a base writes, whose adapters, if it has any, are disabled.

    None where the cache is off, or a digest cannot tell everything that the prompts depend on, as for a probe.
    """
    found = _folder_and_digest(model, settings, [settings.num_probes, settings.probe_length, settings.seed])
    return None if found is None else found[0] / _NAMES[1].format(found[1])


def _folder_and_digest(model: nn.Module, settings: ProbeSettings, depends_on: Sequence[Any]) -> tuple[Path, str] | None:
    """The folder of the cache, and a digest of the model and of whatever else something depends on."""
    folder = os.environ.get("DOWSER_CACHE") or f"{HF_HOME}/dowser"
    if folder.lower() == "off" or settings.probe_images or not isinstance(model, PreTrainedModel):
        return None
    if any(backend_of(part) is not None or _has_hooks(part) for part in model.modules()):
        return None
    digest = hashlib.sha256(json.dumps([*_surroundings(model), *depends_on]).encode())
    for line in _weights(model):
        digest.update(line)
    return Path(folder).expanduser(), digest.hexdigest()


def read(paths: Sequence[Path], names: Sequence[str], samples: Mapping[str, str | None]) -> ProbeStatistics | None:
    """The statistics in the first of some files that can be used, in the order of the names; None where none can."""
    found = (_read(path, names, samples) for path in paths if path.exists())
    return next((statistics for statistics in found if statistics is not None), None)


def _read(path: Path, names: Sequence[str], samples: Mapping[str, str | None]) -> ProbeStatistics | None:
    """The statistics in a file; None, with a warning, where it is damaged."""
    try:
        statistics = ProbeStatistics.load(path)
        modules = statistics.modules
        if statistics.samples != samples or not modules.keys() <= set(names):
            raise ValueError("it holds the statistics of other weights")
    except (OSError, ValueError) as error:
        logger.warning("Probing again, because the cached statistics '%s' cannot be used: %s", path, error)
        return None
    logger.info("The statistics were read from the cache, and not probed: '%s'. DOWSER_CACHE=off probes anew.", path)
    return replace(statistics, modules={name: modules[name] for name in names if name in modules})


def read_prompts(path: Path) -> list[Prompt] | None:
    """The prompts in a file of the cache, on the CPU; None where there is no such file, or a damaged one."""
    if not path.exists():
        return None
    try:
        rows = load_file(path)["input_ids"]
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("Writing prompts again, because those in the cache, '%s', cannot be used: %s", path, error)
        return None
    logger.info("The prompts were read from the cache, and not written: '%s'. DOWSER_CACHE=off writes anew.", path)
    return [{"input_ids": row[None]} for row in rows]


def write(statistics: ProbeStatistics, path: Path) -> None:
    """Write statistics into the cache, whole or not at all; a folder that cannot be written is a warning."""
    _write("statistics", statistics.save, path)


def write_prompts(prompts: Sequence[Prompt], path: Path) -> None:
    """Write prompts of token ids alone, which are all of one length, into the cache, as `write` writes statistics."""
    rows = torch.cat([prompt["input_ids"] for prompt in prompts])
    _write("prompts", lambda file: save_file({"input_ids": rows}, file), path)


def _write(content: str, save: Callable[[Path], None], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".probe-", dir=path.parent) as work:
            save(Path(work) / path.name)
            size = (Path(work) / path.name).stat().st_size
            if size > _LIMIT:
                logger.info("The %s are not cached: %.1f GB is more than the cache may hold.", content, size / 1e9)
                return
            _make_room(path.parent, size)
            (Path(work) / path.name).replace(path)
    except OSError as error:
        logger.warning("The %s are not cached in '%s' (%s); DOWSER_CACHE names another folder.", content, path, error)
        return
    logger.info(
        "The %s are cached in '%s': %.1f MB, of at most %.1f GB in that folder. DOWSER_CACHE=off turns it off.",
        content,
        path,
        size / 1e6,
        _LIMIT / 1e9,
    )


def _make_room(folder: Path, size: int) -> None:
    """Delete the oldest files until there is room for as many bytes more."""
    digest = "[0-9a-f]" * 64
    ours = (file for name in _NAMES for file in folder.glob(name.format(digest, "*")))
    newest = sorted(ours, key=lambda file: file.stat().st_mtime, reverse=True)
    for file in newest:
        size += file.stat().st_size
        if size > _LIMIT:
            file.unlink(missing_ok=True)


def _surroundings(model: PreTrainedModel) -> Iterator[Any]:
    """What the outputs of a model depend on besides its weights: its class and config, and what computes them."""
    yield f"{type(model).__module__}.{type(model).__qualname__}"
    yield [model.config.name_or_path, str(model.config), str(getattr(model, "generation_config", None))]
    yield implementations(model)
    yield [__version__, torch.__version__, transformers.__version__]


def _weights(model: nn.Module) -> Iterator[bytes]:
    """Every tensor of the base: its name, dtype, shape and device, and the exact sum of the bits of every row.

    Not of samples: the outputs depend on all weights, and a merge may have changed only a few of them.
    """
    of_adapters = set(adapter_parts(model))
    for path, module in model.named_modules():
        if module in of_adapters:
            continue
        with onloaded(module):
            tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
            tensors |= dict(module.named_buffers(recurse=False))
            for name, tensor in tensors.items():
                name = base_name(f"{path}.{name}")
                yield f"{name} {tensor.dtype} {list(tensor.shape)} {_hardware(tensor.device)} ".encode()
                yield _row_sums(tensor.detach()).cpu().numpy().tobytes()


def _row_sums(tensor: Tensor) -> Tensor:
    """The sum of the bits of every row, modulo 2^64."""
    size = tensor.element_size()
    row, start = tensor.shape[-1:].numel() * size, tensor.storage_offset() * size
    fast = tensor.dim() and tensor.is_contiguous() and row % 8 == start % 8 == 0  # twenty times as fast in bfloat16
    return tensor.view(torch.int64 if fast else _INTEGERS.get(size, torch.uint8)).sum(-1, dtype=torch.int64)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
