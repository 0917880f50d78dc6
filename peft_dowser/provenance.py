"""The manifest of an adapter beside the model: written when it is saved, compared when it is loaded."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from .codec import DeltaFormatError
from .layer import DowserLayer
from .manifest import entry, is_sample, manifest, unlike_samples
from .names import CODE, PREFIX, VALUES, few, named, quoted
from .statistics import ProbeStatistics
from .threads import side_by_side


def described(layers: Sequence[DowserLayer], tensors: Mapping[str, Tensor], adapter_name: str) -> dict[str, Any]:
    """The manifest of what is about to be saved.

    Args:
        layers: those that carry the adapter.
        tensors: its tensors, their keys with its name.
        adapter_name: its name.
    """
    code, values = named(CODE, adapter_name), named(VALUES, adapter_name)

    def entry_of(layer: DowserLayer) -> dict[str, Any]:
        name = layer.module_name
        start = name if name + values in tensors else PREFIX + name
        return entry(tensors[start + code], tensors[start + values], layer.base_shape, layer.base_sample)

    return manifest(dict(zip([layer.module_name for layer in layers], side_by_side(entry_of, layers), strict=True)))


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


def warn_of_other_weights(statistics: ProbeStatistics, samples: Mapping[str, str | None], where: str) -> None:
    """Warn once where weights are not those that were probed."""
    if different := statistics.unlike(samples):
        warnings.warn(
            f"The probe statistics '{where}' are of other weights than this model has in {len(different)} of "
            f"{len(samples)} modules: {few(different)}. They are those of another checkpoint of the same shapes, so "
            "the mask will not be the one for this model: probe it too.",
            UserWarning,
            stacklevel=2,
        )
