"""The gate: a saved adapter is checked against the model as a whole, before a single tensor of it is loaded."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeGuard, cast

from torch import Tensor, nn

from .codec import DeltaFormatError, check_values
from .layer import DowserLayer
from .names import CODE, PREFIX, VALUES, few, is_delta, named
from .state import Values
from .target import Target
from .threads import side_by_side


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


def check_file(
    layers: Sequence[tuple[str, DowserLayer]],
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    names: Collection[str],
) -> None:
    """Check every tensor of a saved adapter against the layers that it is loaded into.

    The positions that this decodes are left with the layers, which so need not decode them again.

    Args:
        layers: those that carry the adapter, with their names in the model.
        adapter_name: its name.
        state_dict: its tensors, as the model calls them.
        names: their names in the file.

    Raises:
        ValueError: the adapter is merged.
        DeltaFormatError: modules are missing or unknown, or a tensor has the wrong type, length or content.
    """
    check_unmerged([layer for _, layer in layers], adapter_name)
    where = f"Adapter '{adapter_name}'"
    values, code = named(VALUES, adapter_name), named(CODE, adapter_name)
    expected = [name + part for name, _ in layers for part in (values, code)]
    check_keys(expected, state_dict, where)
    found = {name.removeprefix(PREFIX) for name in names}
    # A file does not know how its adapter will be called.
    if odd := [key for key in expected if key.removeprefix(PREFIX) in found]:
        raise DeltaFormatError(f"{where}: the file has {len(odd)} tensors that no file of an adapter has: {few(odd)}.")

    def read(named_layer: tuple[str, DowserLayer]) -> Tensor:
        name, layer = named_layer
        index = layer.index(adapter_name)
        try:
            check_values(state_dict[name + values], index.nnz, layer.values(adapter_name).dtype)
            return index.read(state_dict[name + code])
        except DeltaFormatError as error:
            raise DeltaFormatError(f"{where}, module '{layer.module_name}': {error}.") from error

    # On a GPU all threads would share it, and each would take memory of its own there.
    on_cpu = all(tensor.is_cpu for tensor in state_dict.values())
    found = side_by_side(read, layers) if on_cpu else list(map(read, layers))
    for (name, layer), positions in zip(layers, found, strict=True):
        layer.index(adapter_name).checked = (state_dict[name + code], positions)


def check_unmerged(layers: Iterable[DowserLayer], adapter_name: str) -> None:
    """Refuse to replace an adapter that is merged: its positions say where to put back what the merge overwrote."""
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(
            f"Adapter '{adapter_name}' is merged into the base. Call unmerge_adapter() before replacing it."
        )


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


def check_loaded(model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter that was not loaded, or not as a whole."""
    missing, loaded = [], 0
    for name, layer in adapted(model, adapter_name):
        has_values = not cast(Values, layer.dowser_values[adapter_name]).awaited
        has_code = layer.index(adapter_name).positions is not None
        missing += [f"{name}{part}" for part, found in ((VALUES, has_values), (CODE, has_code)) if not found]
        loaded += has_values + has_code
    if missing:
        raise DeltaFormatError(
            f"Adapter '{adapter_name}': {len(missing)} of {loaded + len(missing)} Dowser tensors were not loaded: "
            f"{few(missing)}. The file lacks them, or has them in another shape; it is incomplete, or belongs to "
            "another adapter or base model."
        )


def adapted(model: nn.Module, adapter_name: str) -> list[tuple[str, DowserLayer]]:
    """The layers that carry an adapter, with their names in the model."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, DowserLayer) and adapter_name in layer.dowser_values
    ]
