"""The modules of an adapter in the order of their layers, and grouped by kind and by layer."""

import re
from collections.abc import Iterable

# The layer of modules that are outside the layers.
OUTSIDE = -1


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of the layers: layer 2 before layer 10."""
    return sorted(names, key=_numbers_as_numbers)


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    # A stranger may have written the name: Python refuses to read numbers of thousands of digits.
    return [(int(part), "") if re.fullmatch("[0-9]{1,9}", part) else (OUTSIDE, part) for part in name.split(".")]


def kinds_and_layers(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """For each module, its kind, which is its name in its layer, and the number of the layer, or `OUTSIDE`.

    'model.layers.3.mlp.up_proj' is the 'mlp.up_proj' of layer 3. Where there are several stacks of layers, such as an
    encoder and a decoder, the name of the stack is in front of the kind.
    """
    found = {name: re.fullmatch(r"(.*?)\.?\b([0-9]{1,9})\.(.+?)(\[\d+\])?", name) for name in names}
    stacks = {match[1] for match in found.values() if match}
    return {
        name: (name, OUTSIDE)
        if match is None
        else (match[3] if len(stacks) == 1 else f"{match[1]}: {match[3]}", int(match[2]))
        for name, match in found.items()
    }


def groups(names: Iterable[str]) -> dict[str, list[str]]:
    """The modules of each kind in all layers, then the modules of each layer, by what to call the group."""
    kinds: dict[str, list[str]] = {}
    layers: dict[int, list[str]] = {}
    for name, (kind, layer) in kinds_and_layers(names).items():
        kinds.setdefault(f"all {kind}", []).append(name)
        layers.setdefault(layer, []).append(name)
    outside = {"all outside the layers": layers.pop(OUTSIDE)} if OUTSIDE in layers else {}
    return kinds | {f"all of layer {layer}": layers[layer] for layer in sorted(layers)} | outside
