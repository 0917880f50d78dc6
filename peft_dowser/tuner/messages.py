"""What the tuner says: warnings where something would else go unnoticed, and one line on what it has chosen."""

import dataclasses
import logging
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._peft import get_pattern_key
from .._transformers import is_experts
from ..base.distributed import rank
from ..base.module_names import layer_of
from ..base.target import Target
from ..base.weight_readers import reader_of
from ..config import FORWARD_SCORES, DowserConfig
from ..delta.format import few
from ..layers.layer import DowserLayer
from ..probing.selection import digest_of
from ..probing.statistics import ProbeInfo, ProbeStatistics

logger = logging.getLogger(__name__)

_UNTRAINED = (
    "Adapter '%s': %d of %d modules got no gradient in the first optimizer step: %s. They may train later where this "
    "batch did not need them, as it is with some experts, or with an image tower on text. Otherwise the model reads "
    "their weights without calling them, or makes no use of them, and they will never train: leave them out "
    "(exclude_modules)."
)


def report_unmatched_ratios(config: DowserConfig, targets: Mapping[str, Target]) -> None:
    matched = {get_pattern_key(list(config.ratio_pattern), name) for name in targets}
    unmatched = sorted(set(config.ratio_pattern) - matched)
    if unmatched:
        warnings.warn(
            "The following ratio_pattern keys did not match any targeted module that no earlier key matches, and were "
            f"ignored: {unmatched}.",
            stacklevel=2,
        )


def report_bare_experts(fused: Mapping[str, Target]) -> None:
    # What transformers marks as experts; other parameters of three dimensions may be anything.
    fused = {name: target for name, target in fused.items() if is_experts(target.module)}
    if fused:
        logger.warning(
            "%.1f million weights of experts are not adapted: they are fused parameters, not linear layers. To train a "
            "part of them as well, set target_parameters=%s.",
            sum(target.numel for target in fused.values()) / 1e6,
            sorted({name.removeprefix(layer_of(name) + ".") for name in fused}),
        )


def report_other_probe(config: DowserConfig, info: ProbeInfo) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    asked = {name: getattr(config, name) for name in info.settings()}
    if config.score in FORWARD_SCORES:
        del asked["num_rademacher"]  # read by no such score
    asked = {name: value for name, value in asked.items() if value not in (defaults[name], info.settings()[name])}
    if asked:
        logger.warning(
            "The statistics '%s' were made with %s, and the config asks for %s. The statistics decide, and a saved "
            "adapter tells their settings.",
            config.statistics,
            ", ".join(f"{name}={info.settings()[name]}" for name in asked),
            ", ".join(f"{name}={value}" for name, value in asked.items()),
        )


def report_read(model: nn.Module, modules: Iterable[str], adapter_name: str) -> None:
    read = {name: reader for name in modules if (reader := reader_of(model, name)) is not None}
    if read:
        kinds = " and ".join(sorted(set(read.values())))
        warnings.warn(
            f"Adapter '{adapter_name}' changes modules {list(read)}, but {kinds} may read their weights without "
            "calling them: merge the adapter (merge_and_unload), or the change may have no effect there.",
            stacklevel=2,
        )


def report_untrained(layers: Sequence[DowserLayer], adapter_name: str) -> None:
    """Say once, after the first optimizer step, which layers of an adapter got no gradient in it.

    No optimizer is known to a tuner, so a hook waits for the step of any. It keeps no layer alive, and goes with the
    step or with the layers.
    """
    known = [weakref.ref(layer) for layer in layers]

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if known and (untrained := _untrained(optimizer, known, adapter_name)) is not None:
            if untrained and rank() == 0:
                logger.warning(_UNTRAINED, adapter_name, len(untrained), len(known), untrained)
            known.clear()
        # Torch is iterating over the hooks: only the last one can be removed from among them, others wait for a step.
        if not known and next(reversed(handle.hooks_dict_ref() or {}), None) == handle.id:
            handle.remove()

    handle = register_optimizer_step_post_hook(after_step)
    for layer in layers[:1]:
        weakref.finalize(layer, handle.remove)


def _untrained(
    optimizer: torch.optim.Optimizer, known: list["weakref.ref[DowserLayer]"], adapter_name: str
) -> list[str] | None:
    """Names of the layers without a gradient; None where the step was one of other weights."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [layer for reference in known if (layer := reference()) is not None]
    values = {layer.module_name: layer.values(adapter_name) for layer in layers if adapter_name in layer.dowser_values}
    # Of a flat parameter that FSDP1 has cut into pieces, a rank may have nothing of these values.
    ours = {name: value for name, value in values.items() if id(value) in stepped and value.numel()}
    untrained = [name for name, value in ours.items() if value.grad is None]
    waits = values and len(untrained) == len(ours)
    return None if waits else untrained


def report_selection(
    masks: Mapping[str, Tensor], counts: Mapping[str, int], targets: Mapping[str, Target], seconds: float
) -> None:
    """One line on the choice; the digest is the same wherever the same weights train."""
    if not logger.isEnabledFor(logging.INFO):
        return
    nnz = sum(counts.values())
    numel = sum(targets[name].numel for name in masks)
    logger.info(
        "Dowser trains %d of %d weights (%.2f %%) in %d modules; chosen in %.1f s, digest %s.",
        nnz,
        numel,
        100 * nnz / numel,
        len(masks),
        seconds,
        digest_of(masks)[:12],
    )


def warn_of_other_weights(statistics: ProbeStatistics, samples: Mapping[str, str | None], where: str) -> None:
    if different := statistics.unlike(samples):
        warnings.warn(
            f"The probe statistics '{where}' are of other weights than this model has in {len(different)} of "
            f"{len(samples)} modules: {few(different)}. They come from another checkpoint of the same shapes, so "
            "the mask will not be the one for this model: probe it too.",
            stacklevel=2,
        )
