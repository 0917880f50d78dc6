"""The only judge of a saved adapter: whether its counts, names, manifest, deltas and whole tensors fit a base.

The adapter may be a file (`files.adapter`) or tensors that PEFT or transformers load (`tuner.loading`,
`tuner.whole_tensors`): those fetch what a check needs, and every rule is here. Where transformers puts tensors into the
model first, `layers.state` refuses what cannot be read, by the rules of the format alone (`delta.codec`,
`delta.format`). A failed check is a `DeltaFormatError`, and changes nothing.
"""

import math
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from ..base.module_names import embedding_tensors
from ..config import DowserConfig
from ..delta.codec import VALUE_DTYPES, DeltaFormatError, check_values, is_finite
from ..delta.format import PREFIX, few, is_delta, is_sample, quoted, read_positions, unlike_samples
from ..delta.layout import Granularity, Layout, StoredDelta

# More than any weight has: thousands of times a position in such a one still fits 64 bits.
_MOST_ENTRIES = 2**50


def read_delta(
    values: Tensor,
    code: Tensor,
    layout: Layout,
    nnz: int,
    code_digest: str | None,
    where: str,
    dtype: torch.dtype = torch.float32,
) -> StoredDelta:
    """The delta of one module, from its two tensors in a file, for a weight of this layout; its values become `dtype`.

    `code_digest` is the SHA-256 of the index code by the manifest, if there is one; `where` begins the message.
    """
    with errors_at(where):
        count = layout.count(nnz)
        check_values(values, layout.values_shape(count), dtype)
        return StoredDelta(read_positions(code, layout, count, code_digest), values.to(dtype))


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    try:
        yield
    except DeltaFormatError as error:
        raise DeltaFormatError(f"{where}: {error}.") from error


def check_fits(
    counts: Mapping[str, int], layouts: Mapping[str, Layout], manifest: Mapping[str, Any] | None, where: str
) -> None:
    """Refuse an adapter whose modules, counts or shapes a model does not have; reads no tensor.

    `counts` are its trained weights by module, `layouts` what its positions mean in the targets of its config in the
    model, `manifest` what its config says of its tensors, if anything.
    """
    check_counts(counts, where)
    if unknown := [name for name in counts if name not in layouts]:
        raise DeltaFormatError(
            f"{where} has values for {len(unknown)} modules that are not targets in this model: {few(unknown)}. It was "
            "made for another base model, or its config was edited."
        )
    for name, nnz in counts.items():
        try:
            layouts[name].count(nnz)
        except DeltaFormatError as error:
            raise DeltaFormatError(
                f"{where}, module {quoted(name)}, whose weight has shape {layouts[name].shape}: {error}. It was made "
                "for another base model, or its config was edited."
            ) from error
    if manifest is None:
        return
    _check_modules(manifest, counts, where)
    for name in counts:
        shape, entry = layouts[name].shape, manifest["modules"][name]
        if entry.get("shape") != list(shape):
            raise DeltaFormatError(
                f"{where}: module {quoted(name)} has a weight of shape {shape} here, the adapter was made for "
                f"{str(entry.get('shape'))[:100]}. It belongs to another base model."
            )
        if entry.get("channel_dim") != layouts[name].channel_dim:
            raise _other_granularity(name, _granularity(layouts[name].channel_dim), entry.get("channel_dim"), where)


def check_counts(counts: Mapping[str, Any], where: str) -> None:
    if not counts:
        raise DeltaFormatError(
            f"{where} was saved with values for no module. The file is incomplete, or its config was edited."
        )
    for name, nnz in counts.items():
        if type(nnz) is not int or nnz < 1:
            raise DeltaFormatError(
                f"{where} has {repr(nnz)[:100]} trained weights for module {quoted(name)}, which must be an integer of "
                "at least 1. The file is damaged, or its config was edited."
            )


def check_keys(expected: Collection[str], found: Collection[str], where: str) -> None:
    missing = [key for key in expected if key not in found]
    if missing:
        number = "none of them" if len(missing) == len(expected) else f"{len(expected) - len(missing)}"
        raise DeltaFormatError(
            f"{where}: the file should have {len(expected)} Dowser tensors and has {number}; missing: "
            f"{few(missing)}. The file is incomplete, or belongs to another adapter or base model."
        )
    known = set(expected)
    unknown = [key for key in found if is_delta(key) and key not in known]
    if unknown:
        raise DeltaFormatError(
            f"{where}: the file has {len(unknown)} Dowser tensors that this adapter does not have: {few(unknown)}. It "
            "belongs to another adapter or base model."
        )


def check_names_in_file(names: Collection[str], expected: Collection[str], where: str) -> None:
    """Refuse a file with names that a model gives the Dowser tensors of an adapter: a file does not know the adapter's
    name.
    """
    found = {name.removeprefix(PREFIX) for name in names}
    if odd := [key for key in expected if key.removeprefix(PREFIX) in found]:
        raise DeltaFormatError(f"{where}: the file has {len(odd)} tensors that no file of an adapter has: {few(odd)}.")


def described_layouts(
    manifest: Mapping[str, Any], counts: Mapping[str, int], granularity: Granularity, where: str
) -> dict[str, Layout]:
    """What positions mean by module, where no base is at hand: as the manifest says, if it describes the adapter."""
    _check_modules(manifest, counts, where)
    shapes = {module: manifest["modules"][module].get("shape") for module in counts}
    for module, shape in shapes.items():
        if not _is_shape(shape):
            raise DeltaFormatError(
                f"{where}: the manifest gives module {quoted(module)} the shape {str(shape)[:100]}, which no weight "
                "has. adapter_config.json was edited."
            )
    dims = {module: manifest["modules"][module].get("channel_dim") for module in counts}
    for module, dim in dims.items():
        if dim is not None and not (type(dim) is int and dim in (0, 1) and len(shapes[module]) == 2):
            raise DeltaFormatError(
                f"{where}: the manifest gives module {quoted(module)} the input channels {str(dim)[:100]}, which a "
                f"weight of shape {shapes[module]} does not have. adapter_config.json was edited."
            )
        if (dim is None) != (granularity == "weight"):
            own = "single weights" if granularity == "weight" else "input channels"
            raise _other_granularity(module, own, dim, where)
    layouts = {module: Layout(tuple(shapes[module]), dim) for module, dim in dims.items()}
    for module, layout in layouts.items():
        with errors_at(f"{where}, module {quoted(module)}"):
            layout.count(counts[module])
    return layouts


def _other_granularity(module: str, own: str, described: Any, where: str) -> DeltaFormatError:
    return DeltaFormatError(
        f"{where}: module {quoted(module)} trains {own} by its config, and {_granularity(described)} by its manifest. "
        "adapter_config.json was edited, or it belongs to another base model."
    )


def _granularity(channel_dim: Any) -> str:
    return "single weights" if channel_dim is None else f"input channels along dimension {str(channel_dim)[:20]}"


def _check_modules(manifest: Mapping[str, Any], counts: Mapping[str, int], where: str) -> None:
    modules = manifest["modules"]
    if modules.keys() != counts.keys():
        raise DeltaFormatError(
            f"{where}: its manifest and its counts disagree on {few(sorted(modules.keys() ^ counts.keys()))}. "
            "adapter_config.json was edited."
        )
    for name, found in modules.items():
        hashes = (found.get("code_sha256"), found.get("values_sha256"))
        sample = found.get("base_sample")
        if not all(isinstance(text, str) for text in hashes) or not (sample is None or is_sample(sample)):
            raise DeltaFormatError(f"{where}: the manifest of module {quoted(name)} is damaged.")
        if found.get("nnz") != counts[name]:
            raise DeltaFormatError(
                f"{where}: module {quoted(name)} has {counts[name]} values, its manifest says {found.get('nnz')!r}. "
                "adapter_config.json and the adapter's file are not of one save."
            )


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    return (
        isinstance(shape, list)
        and len(shape) in (2, 3)
        and all(type(size) is int and size > 0 for size in shape)
        and math.prod(shape) < _MOST_ENTRIES
    )


def other_base(manifest: Mapping[str, Any], samples: Mapping[str, str | None], where: str) -> str | None:
    """What to say where weights of a base are not those that the adapter was made for, in whatever float dtype."""
    different = unlike_samples({name: manifest["modules"][name].get("base_sample") for name in samples}, samples)
    if not different:
        return None
    return (
        f"{where} was made for other weights than this base model has in {len(different)} of "
        f"{len(manifest['modules'])} modules: {few(different)}. The base is another checkpoint of the same shapes, was "
        "trained further, or has an adapter merged in."
    )


def warn_of_other_base(manifest: Mapping[str, Any], samples: Mapping[str, str | None], where: str) -> None:
    if problem := other_base(manifest, samples, where):
        warnings.warn(problem, stacklevel=2)


def check_whole_tensor(tensor: Tensor, own: Tensor, key: str, where: str) -> None:
    """Refuse a whole tensor of a file, such as a bias, that cannot take the place of the model's own."""
    problem = None
    if tensor.shape != own.shape:
        problem = (
            f"has shape {tuple(tensor.shape)}, the model's has {tuple(own.shape)}. It belongs to another base model."
        )
    elif tensor.dtype != own.dtype and not {tensor.dtype, own.dtype} <= set(VALUE_DTYPES):
        problem = f"is {tensor.dtype}, the model's is {own.dtype}. The file was edited."
    elif own.is_floating_point() and not tensor.is_meta and not is_finite(tensor, own.dtype):
        problem = f"has entries that are not finite in {own.dtype}. The file is damaged."
    if problem:
        raise DeltaFormatError(f"{where}: the tensor {quoted(key)} {problem}")


def check_foreign(foreign: list[str], where: str) -> None:
    if foreign:
        raise DeltaFormatError(
            f"{where}: the file has {len(foreign)} tensors that the adapter does not train: {few(foreign)}. Loading "
            "them could overwrite the base model. The file was edited, or its config has lost its bias or "
            "modules_to_save."
        )


def check_missing(missing: list[str], where: str) -> None:
    if missing:
        raise DeltaFormatError(
            f"{where}: the file lacks {len(missing)} tensors of modules that the adapter trains as a whole, or of "
            f"their tokens (modules_to_save, trainable_token_indices): {few(missing)}. The file or its config was "
            "edited; copy the adapter again."
        )


def foreign_to(base: nn.Module, keys: Collection[str], config: DowserConfig, modules: Iterable[str]) -> list[str]:
    """Those of the whole tensors of a saved adapter, by their names in the base, that it does not train."""
    own = {*in_modules_to_save(base, config), *embedding_tensors(base)}
    if config.bias == "dowser_only":
        own |= {f"{module}.bias" for module in modules}
    return [key for key in keys if key not in own and not (config.bias == "all" and f".{key}".endswith(".bias"))]


def in_modules_to_save(base: nn.Module, config: DowserConfig) -> Iterator[str]:
    """Names in the base, without adapters, of the tensors of the modules that an adapter trains as a whole."""
    for name, module in base.named_modules(remove_duplicate=False):
        if name.endswith(tuple(config.modules_to_save or [])):  # as PEFT matches
            yield from (f"{name}.{key}" for key in module.state_dict())
