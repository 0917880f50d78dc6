"""The judge of a saved adapter: whether its counts, names, manifest and whole tensors fit a base."""

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

from ..base.parts import embedding_tensors
from ..base.target import Target
from ..config import DowserConfig
from ..delta.codec import VALUE_DTYPES, DeltaFormatError, is_finite
from ..delta.format import few, is_delta, is_sample, quoted, unlike_samples


def check_counts(counts: Mapping[str, int], targets: Mapping[str, Target], adapter_name: str) -> None:
    """Refuse a saved adapter that cannot belong to this model, before any module is replaced."""
    if not counts:
        raise DeltaFormatError(
            f"Adapter '{adapter_name}' is that of a saved adapter, but has values for no module. The file is "
            "incomplete, or its config was edited."
        )
    unknown = [name for name in counts if name not in targets]
    if unknown:
        raise DeltaFormatError(
            f"Adapter '{adapter_name}' has values for {len(unknown)} modules that are no targets in this model: "
            f"{few(unknown)}. It was made for another base model, or its config was edited."
        )
    for name, nnz in counts.items():
        numel = targets[name].numel
        if not is_count(nnz) or nnz > numel:
            raise DeltaFormatError(
                f"Adapter '{adapter_name}': the config gives {nnz!r} trained weights for module '{name}', whose "
                f"weight has {numel} entries {targets[name].shape}. It was made for another base "
                "model, or its config was edited."
            )


def is_count(nnz: object) -> TypeGuard[int]:
    """Whether this can be how many weights of a module train; a config may be a stranger's."""
    return isinstance(nnz, int) and not isinstance(nnz, bool) and nnz > 0


def check_keys(expected: Collection[str], found: Collection[str], where: str) -> None:
    """Refuse a file that lacks Dowser tensors, or has some that the adapter has not.

    Args:
        expected: names of the Dowser tensors that the adapter has.
        found: names of all tensors in the file.
        where: the adapter, for the message.
    """
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
            f"{where}: the file has {len(unknown)} Dowser tensors that this adapter has not: {few(unknown)}. It "
            "belongs to another adapter or base model."
        )


def check_modules(saved: Mapping[str, Any], counts: Mapping[str, int], where: str) -> None:
    """Refuse a manifest that is not of the adapter with these counts.

    Raises:
        DeltaFormatError: it lists other modules or counts, or has an entry that no release writes.
    """
    modules = saved["modules"]
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


def check_shapes(saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse an adapter that was made for weights of other shapes.

    Raises:
        DeltaFormatError: a shape differs; the message has both.
    """
    for name, shape in shapes.items():
        expected = saved["modules"][name].get("shape")
        if expected != list(shape):
            raise DeltaFormatError(
                f"{where}: module {quoted(name)} has a weight of shape {shape} here, the adapter was made for "
                f"{str(expected)[:100]}. It belongs to another base model."
            )


def unlike(saved: Mapping[str, Any], samples: Mapping[str, str | None]) -> list[str]:
    """The modules whose weight is not the one that the adapter was made for, in whatever float dtype either is."""
    return unlike_samples({name: saved["modules"][name].get("base_sample") for name in samples}, samples)


def other_base(modules: Collection[str], of: int, where: str) -> str:
    """What to say where the weights of some modules are not those that the adapter was made for."""
    return (
        f"{where} was made for other weights than this base model has in {len(modules)} of {of} modules: "
        f"{few(list(modules))}. The base is another checkpoint of the same shapes, was trained further, or has an "
        "adapter merged in."
    )


def compare(
    saved: Mapping[str, Any],
    counts: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    samples: Mapping[str, str | None],
    where: str,
) -> None:
    """Compare a manifest with the counts of its adapter and, by module, with the weights of a base.

    Raises:
        DeltaFormatError: it is not of this adapter, or for weights of other shapes. Where only their content differs, a
            warning says so.
    """
    check_modules(saved, counts, where)
    check_shapes(saved, shapes, where)
    warn_of_other_base(saved, samples, where)


def warn_of_other_base(saved: Mapping[str, Any], samples: Mapping[str, str | None], where: str) -> None:
    """Warn once where weights are not those that the adapter was made for."""
    if different := unlike(saved, samples):
        warnings.warn(other_base(different, len(samples), where), UserWarning, stacklevel=2)


def misfit(tensor: Tensor, own: Tensor) -> str | None:
    """Why a whole tensor of a file cannot take the place of one of the model; None where it can."""
    if tensor.shape != own.shape:
        return f"has shape {tuple(tensor.shape)}, the model's has {tuple(own.shape)}. It belongs to another base model."
    if tensor.dtype != own.dtype and not {tensor.dtype, own.dtype} <= set(VALUE_DTYPES):
        return f"is {tensor.dtype}, the model's is {own.dtype}. The file was edited."
    if own.is_floating_point() and not tensor.is_meta and not is_finite(tensor, own.dtype):
        return f"has entries that are not finite in {own.dtype}. The file is damaged."
    return None


def foreign_problem(foreign: list[str]) -> str:
    """What is wrong with whole tensors that an adapter does not train."""
    return (
        f"the file has {len(foreign)} tensors that the adapter does not train: {few(foreign)}. Loading them could "
        "overwrite the base model. The file was edited, or its config has lost its bias or modules_to_save."
    )


def foreign_tensors(config: DowserConfig, keys: Collection[str], layers: Iterable[str], base: nn.Module) -> str | None:
    """What a saved adapter has that it does not train in a base without adapters; None where there is nothing.

    Args:
        config: configuration of the adapter.
        keys: names of its tensors in the base.
        layers: names of the layers under its deltas.
        base: the base.
    """
    own = {*_in_modules_to_save(base, config), *embedding_tensors(base)}
    if config.bias == "dowser_only":
        own |= {f"{layer}.bias" for layer in layers}
    foreign = [key for key in keys if key not in own and not (config.bias == "all" and f".{key}".endswith(".bias"))]
    return foreign_problem(foreign) if foreign else None


def missing_tensors(config: DowserConfig, keys: Collection[str], base: nn.Module) -> str | None:
    """What a saved adapter lacks of the modules that it trains as a whole; None where nothing is missing.

    Args:
        config: configuration of the adapter.
        keys: names of its tensors in the base.
        base: the base.
    """
    missing = [name for name in _in_modules_to_save(base, config) if name not in keys]
    if not missing:
        return None
    return (
        f"the file lacks {len(missing)} tensors of modules that the adapter trains as a whole (modules_to_save): "
        f"{few(missing)}. The file was edited or is not that of the config; copy the adapter again."
    )


def _in_modules_to_save(base: nn.Module, config: DowserConfig) -> Iterator[str]:
    for name, module in base.named_modules(remove_duplicate=False):
        if name.endswith(tuple(config.modules_to_save or [])):  # as PEFT matches
            yield from (f"{name}.{key}" for key in module.state_dict())
