"""Selection: score every target, rank in the scope of the config, and keep the positions."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..base.distributed import broadcast, is_distributed, on_every_rank, rank
from ..base.module_names import layer_of
from ..base.target import Target
from ..config import DowserConfig, ratio_of, unrounded_count
from ..delta.codec import decode, encode, position_dtype
from ..delta.layout import Granularity, Layout
from ..delta.masks import frozen_reason, select_jointly, select_rows, trained_count, transpose_positions
from ..delta.seeds import derived_seed
from . import scores
from .statistics import ProbeStatistics


def choose_masks(
    targets: Mapping[str, Target], config: DowserConfig, statistics: ProbeStatistics | None
) -> dict[str, Tensor]:
    """Choose which weights, or input channels, of every target train; the matrices of experts are ranked one by one.

    Args:
        targets: targets by name.
        config: gives granularity, score, scope, ratios and seed.
        statistics: the probe's result; None for the scores that need none.

    Returns:
        Flat positions in the stored weight, or numbers of its input channels, strictly increasing, by target. Frozen
        targets are left out: those with a ratio of 0, and, with one warning, those whose ratio is too small for one of
        them or that have no usable score.

    Raises:
        ValueError: the statistics do not fit the model, a module has fewer input channels than are to train, or no
            weight at all would train.
    """
    frozen: dict[str, str] = {}
    masks: dict[str, Tensor] = {}
    matrices = {matrix.name: matrix for target in targets.values() for matrix in target.matrices()}
    for group in _groups(list(matrices), config.scope):
        ranking = _Ranking(group, matrices, config, statistics)
        masks.update(ranking.masks())
        frozen.update(ranking.frozen)
    _report(frozen, masks, matrices)
    joined = {name: _joined(target, target.layout(config.granularity), masks) for name, target in targets.items()}
    return {name: positions for name, positions in joined.items() if positions is not None}


def _joined(target: Target, layout: Layout, masks: Mapping[str, Tensor]) -> Tensor | None:
    """The positions of a target, joined from its matrices; None where all are frozen."""
    parts = [
        masks[matrix.name].to(position_dtype(layout.size)) + (matrix.expert or 0) * matrix.numel
        for matrix in target.matrices()
        if matrix.name in masks
    ]
    return torch.cat(parts) if parts else None


def score_matrix(matrix: Target, config: DowserConfig, statistics: ProbeStatistics | None) -> Tensor:
    """Scores of one matrix, shape `(out, in)` whatever its layout, float32; of a tied one, the sum over its uses."""
    if statistics is None or not matrix.tied:
        return _score_of_use(matrix, config, statistics)
    total: Tensor | None = None
    for use in matrix.uses:
        if use.name in statistics.modules:
            score = _score_of_use(use, config, statistics)
            score = score if use.transposed == matrix.transposed else score.T
            total = score if total is None else total.contiguous().add_(score)
    return cast(Tensor, total)


def _score_of_use(matrix: Target, config: DowserConfig, statistics: ProbeStatistics | None) -> Tensor:
    name, weight = matrix.name, matrix.read()
    if matrix.transposed:
        weight = weight.T
    if config.score == "random":
        return scores.random(weight, derived_seed(config.seed, "score", name))
    if config.score == "magnitude":
        return scores.magnitude(weight)
    if statistics is None:
        raise ValueError(f"score='{config.score}' needs probe statistics.")
    try:
        return scores.FROM_STATISTICS[config.score](weight, statistics.modules[name])
    except ValueError as error:
        raise ValueError(f"Module '{name}': {error}") from error


def _groups(names: list[str], scope: str) -> list[list[str]]:
    """Modules that share one ranking."""
    if scope == "model":
        return [names] if names else []
    if scope == "layer":
        layers: dict[str, list[str]] = {}
        for name in names:
            layers.setdefault(layer_of(name), []).append(name)
        return list(layers.values())
    return [[name] for name in names]


class _Ranking:
    """Matrices that are ranked together, and which of them cannot be ranked.

    Attributes:
        frozen: name of a matrix to the reason why it stays frozen.
    """

    def __init__(
        self,
        group: list[str],
        matrices: Mapping[str, Target],
        config: DowserConfig,
        statistics: ProbeStatistics | None,
    ) -> None:
        self.matrices, self.config, self.statistics = matrices, config, statistics
        self.frozen: dict[str, str] = {}
        # One matrix is scored once; of several only one score at a time exists, so they are scored again when needed.
        self._only: Tensor | None = None
        self.names = [name for name in group if self._joins(name, alone=len(group) == 1)]

    def masks(self) -> dict[str, Tensor]:
        largest = self.config.select == "high"
        ratios = {name: ratio_of(self.matrices[name].name_without_expert, self.config) for name in self.names}
        layouts = {name: self.matrices[name].layout(self.config.granularity) for name in self.names}
        if not self.names:
            return {}
        if self.config.scope == "row":
            (name,) = self.names
            score = self._score(name)
            selected = [select_rows(score, trained_count(ratios[name], score.shape[1]), largest)]
        else:
            shares = [
                unrounded_count(self.matrices[name].name_without_expert, layout, self.config)
                for name, layout in layouts.items()
            ]
            count = round(sum(shares))
            selected = select_jointly([partial(self._score, name) for name in self.names], count, largest)
        found = dict(zip(self.names, selected, strict=True))
        for name in [name for name in found if not found[name].numel()]:
            del found[name]
            alone = len(self.names) == 1
            self.frozen[name] = (
                f"update ratio {ratios[name]} selects none of its {self._what}"
                if alone
                else f"none of its {self._what} is among those selected in its {self.config.scope}"
            )
        if self.config.granularity == "input_channel":
            return found
        return {name: _as_stored(at, self.matrices[name]) for name, at in found.items()}

    def _joins(self, name: str, alone: bool) -> bool:
        if ratio_of(self.matrices[name].name_without_expert, self.config) == 0:
            return False
        uses = [use.name for use in self.matrices[name].uses]
        if self.statistics is not None and not any(use in self.statistics.modules for use in uses):
            self.frozen[name] = "no probe reached it"
            return False
        score = self._score(name)
        reason = frozen_reason(score)
        if reason is not None:
            self.frozen[name] = reason
        elif alone:
            self._only = score
        return reason is None

    def _score(self, name: str) -> Tensor:
        if self._only is not None:
            return self._only
        score = score_matrix(self.matrices[name], self.config, self.statistics)
        return channel_scores(score) if self.config.granularity == "input_channel" else score

    @property
    def _what(self) -> str:
        return "weights" if self.config.granularity == "weight" else "input channels"


def channel_scores(score: Tensor) -> Tensor:
    """Scores of the input channels, `(in,)`: the mean over the scores `(out, in)` of the weights of each; float32."""
    wide = torch.float32 if score.device.type == "mps" else torch.float64  # MPS has no float64
    return score.mean(0, dtype=wide).float()


def _as_stored(positions: Tensor, matrix: Target) -> Tensor:
    return transpose_positions(positions, matrix.features) if matrix.transposed else positions


def _report(frozen: Mapping[str, str], masks: Mapping[str, Tensor], matrices: Mapping[str, Target]) -> None:
    grouped: dict[tuple[str, str], list[str]] = {}
    for name, reason in frozen.items():
        grouped.setdefault((matrices[name].name_without_expert, reason), []).append(str(matrices[name].expert))
    listed = [
        f"{whole} ({reason})" if experts == ["None"] else f"{whole}: experts {', '.join(experts)} ({reason})"
        for (whole, reason), experts in grouped.items()
    ]
    if not masks:
        more = [f"and {len(listed) - 5} more"] if len(listed) > 5 else []
        raise ValueError(
            f"No weight would train: {'; '.join(listed[:5] + more) or 'all ratios are 0'}. Choose a larger "
            "update_ratio or number of channels, other target_modules, or another score."
        )
    if frozen:
        of_experts = any(matrices[name].expert is not None for name in frozen)
        advice = " More probes (num_probes) reach more experts." if of_experts else ""
        kind = "matrices" if of_experts else "modules"
        warnings.warn(f"{len(frozen)} of the target {kind} stay frozen: {'; '.join(listed)}.{advice}", stacklevel=2)


def same_on_all_ranks(
    choose: Callable[[], dict[str, Tensor]], targets: Mapping[str, Target], granularity: Granularity
) -> dict[str, Tensor]:
    """Choose the masks on rank 0 and hand them to the others.

    Raises:
        ValueError: the ranks have different base models. This and every other error is raised on all ranks.
    """
    if not is_distributed():
        return choose()
    masks = on_every_rank(lambda: choose() if rank() == 0 else {})
    shapes = broadcast({name: targets[name].shape for name in masks})
    on_every_rank(lambda: _check_shapes(shapes, targets))
    sizes = {name: targets[name].layout(granularity).size for name in shapes}
    codes = {name: broadcast(_packed(masks[name], sizes[name]) if masks else None) for name in shapes}
    return on_every_rank(
        lambda: masks or {name: _unpacked(code, sizes[name], targets[name].device) for name, code in codes.items()}
    )


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], targets: Mapping[str, Target]) -> None:
    for name, shape in shapes.items():
        found = targets[name].shape if name in targets else None
        if found != shape:
            raise ValueError(
                f"Rank {rank()}: module '{name}' has a weight of shape {found}, on rank 0 it is {shape}. Load the same "
                "base model with the same config on every rank."
            )


def _packed(mask: Tensor, size: int) -> tuple[Tensor, int]:
    return encode(mask, size).cpu(), mask.numel()


def _unpacked(packed: tuple[Tensor, int] | None, size: int, device: torch.device) -> Tensor:
    code, count = cast(tuple[Tensor, int], packed)
    # A rank that rank 0 will send its weights has them on the meta device until then.
    return decode(code, size, count).to("cpu" if device.type == "meta" else device)


def digest_of(masks: Mapping[str, Tensor]) -> str:
    """SHA-256 of masks and of the names of their targets, in hexadecimal."""
    digest = hashlib.sha256()
    for name, mask in masks.items():
        digest.update(f"{name} {mask.numel()} ".encode())
        digest.update(mask.cpu().numpy().tobytes())
    return digest.hexdigest()
