"""Combining adapters of a model into a new one: what may be combined, and the deltas and the config of the result."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch

from ..base.target import layouts_of
from ..config import DowserConfig
from ..delta.apply import Delta
from ..delta.arithmetic import CombinationType, SignMethod, combine
from ..delta.layout import Granularity
from ..delta.seeds import derived_seed
from ..layers.layer import DowserLayer
from .merging import check_unmerged


def check_sources(
    configs: Mapping[str, DowserConfig], layers: Iterable[DowserLayer], adapters: Sequence[str], adapter_name: str
) -> None:
    if unknown := sorted(set(adapters) - set(configs)):
        raise ValueError(f"Unknown adapters {unknown}; the model has {sorted(configs)}.")
    if adapter_name in configs:
        raise ValueError(f"Adapter '{adapter_name}' exists already. Choose another adapter_name, or delete it first.")
    check_unmerged(layers, "combining adapters")
    for name in adapters:
        if also := configs[name].also_trains:
            raise ValueError(
                f"Adapter '{name}' also trains {also}, which no sparse delta holds, so it would be lost in "
                f"'{adapter_name}'. Combine adapters that train sparse deltas only."
            )


def combined_deltas(
    layers: Iterable[DowserLayer],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: CombinationType,
    density: float | None,
    majority_sign_method: SignMethod,
    seed: int,
) -> dict[str, Delta]:
    """The combined deltas by module, without the empty ones; the arguments are as in
    `DowserModel.add_weighted_adapter`.
    """
    deltas = {}
    for layer in layers:
        sources = [layer.delta(name) for name in adapters]
        own_seed = derived_seed(seed, "combine", layer.module_name)
        delta = combine(sources, weights, combination_type, density, majority_sign_method, own_seed)
        for term in (*sources, delta):
            _check_finite(term, layer.module_name)
        if delta.values.numel():
            deltas[layer.module_name] = delta
    if not deltas:
        raise ValueError(f"No value of adapters {list(adapters)} is left at density={density}; use a larger density.")
    return deltas


def combined_config(
    configs: Sequence[DowserConfig], deltas: Mapping[str, Delta], layers: Iterable[DowserLayer]
) -> DowserConfig:
    """The config of a combined adapter: the config of the first one, with the targets and counts of the result.

    It trains input channels where all of them do, and single weights otherwise.

    With its `nnz_pattern` it counts as the config of a saved adapter, so the mask is never probed for.
    """
    targets = [layer.target for layer in layers if layer.module_name in deltas]
    whole = all(config.granularity == "input_channel" for config in configs)
    granularity: Granularity = "input_channel" if whole else "weight"
    layouts = layouts_of({target.name: target for target in targets}, granularity)
    counts = {name: layouts[name].stored(delta).values.numel() for name, delta in deltas.items()}
    fused = [target.name for target in targets if target.kind == "fused"]
    return dataclasses.replace(
        configs[0],
        update_ratio=sum(counts.values()) / sum(target.numel for target in targets),
        granularity=granularity,
        channels=None,
        ratio_pattern={},
        target_modules=set(counts) - set(fused),
        target_parameters=fused or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        last_layers=None,
        ensure_weight_tying=any(config.ensure_weight_tying for config in configs),
        statistics=None,
        nnz_pattern=counts,
        manifest=None,
    )


def _check_finite(delta: Delta, module_name: str) -> None:
    if bad := int((~torch.isfinite(delta.values)).sum()):
        raise ValueError(
            f"An adapter, or the combination, has {bad} values that are not finite in module '{module_name}'. Use "
            "smaller weights, or leave out the adapter that is broken."
        )
