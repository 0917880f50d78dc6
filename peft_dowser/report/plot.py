"""Pictures of a probe and of a saved adapter. Needs matplotlib, which is not installed with this package.

Every function returns a `matplotlib.figure.Figure` of its own: `figure.savefig("map.png")` writes it, a notebook shows
it, and neither pyplot nor a window is touched.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..delta.format import printable, quoted
from ..evaluation.metrics import h_score
from ..files.adapter import open_adapter
from ..files.grouping import OUTSIDE, kinds_and_layers
from ..files.inspection import inspect
from ..probing import scores
from ..probing.statistics import ProbeStatistics

try:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("Pictures need matplotlib, which is not installed: pip install matplotlib") from error


# The most stretches of rows and of columns that a picture of a mask shows: in its map, and in the curves next to it.
# The shape may come from a stranger, so nothing grows with it.
_BLOCKS = 64
_STRETCHES = 4096

_COLOURS = "viridis"

# Inches. With the letters of matplotlib, 10 points high, it can be read at the width of a page of text.
_WIDTH = 7

_LEVELS = (0.2, 0.4, 0.6, 0.8)


def importance_map(statistics: ProbeStatistics, weights: Mapping[str, Tensor] | None = None) -> Figure:
    """Draw what a probe found, layer by layer: mean sensitivity |J|, mean activity |h| and mean score.

    Args:
        statistics: as `probe` returns or `ProbeStatistics.load` reads them.
        weights: base weights by module, shape `(out, in)`, any float dtype; read only. With them the third map shows
            the score of Eq. 5, without them the factor that the probe adds to |W|: the mean of |J_i| |h_j|.

    Returns:
        Maps of modules by layers, one below the other: three, or only the activity where the probe ran forwards
        only. Experts of one parameter are averaged. Grey where nothing was probed, or where the mean is 0.

    Raises:
        ValueError: there are no statistics, or `weights` lacks a module or has another shape, or comes with statistics
            that hold no sensitivity.
    """
    if not statistics.modules:
        raise ValueError("The statistics are empty: the probe reached no module.")
    if weights is not None and (missing := [name for name in statistics.modules if name not in weights]):
        raise ValueError(f"weights lack {len(missing)} of the modules that were probed, for example '{missing[0]}'.")
    modules = statistics.modules.items()
    sensitivities = {name: module.sensitivity for name, module in modules if module.sensitivity is not None}
    maps: dict[str, dict[str, float]] = {}
    if sensitivities:
        maps["sensitivity  |J|"] = {name: float(found.mean()) for name, found in sensitivities.items()}
    maps["activity  |h|"] = {name: float(module.activity.mean()) for name, module in modules}
    if weights is not None:
        maps["score  |J| |W| |h|"] = {n: float(scores.dowser(weights[n], module).mean()) for n, module in modules}
    elif sensitivities:
        maps["score without |W|"] = {
            name: _without_weight(found, statistics.modules[name].activity) for name, found in sensitivities.items()
        }
    return _maps(maps)


def delta_map(adapter: str | Path) -> Figure:
    """Draw where training moved the weights: the norm of the delta of every module, layer by layer.

    Two maps, modules by layers: the L2 norm of the values, and their root mean square, in which large modules do not
    outshine small ones. `adapter` is a folder or Hub id; errors are as for `inspect`.
    """
    modules = inspect(adapter)["modules"]
    norms = {row["module"]: row["delta_norm"] for row in modules}
    means = {row["module"]: row["delta_norm"] / math.sqrt(row["trained"]) for row in modules}
    return _maps({"norm of the delta": norms, "root mean square of the values": means})


def mask_density(adapter: str | Path, module: str) -> Figure:
    """Draw which rows and which columns of a weight are trained.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        module: name of the module in the base model, as `inspect` lists it.

    Returns:
        The trained fraction of every row and of every column of the stored weight (of stretches of them if there are
            more than 4096), and a map of it in blocks. A fused weight of experts is shown as one matrix, expert below
            expert.

    Raises:
        ValueError: the adapter is damaged, has no manifest, or does not adapt the module.
        OSError: the adapter cannot be found.
    """
    with ExitStack() as files:
        saved = open_adapter(str(adapter), files)
        layouts = saved.layouts
        if module not in layouts:
            raise ValueError(
                f"Adapter '{adapter}' has no values for {quoted(module)}. It adapts, for example, "
                f"{quoted(next(iter(layouts)))}."
            )
        *above, width = layouts[module].shape
        height = math.prod(above)
        positions = saved.delta(module, layouts[module]).positions.long()
    return _density(module, positions // width, positions % width, height, width)


def retention_plasticity(points: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw what was kept against what was learned: a dot for every run, a ring for the mean of a method.

    The scatter lies over lines of equal harmonic mean (H-score, Eq. 9).

    Args:
        points: by method, the pairs (kept, learned) of its runs: `metrics.retention` and `metrics.plasticity`, or
            accuracies as fractions.

    Raises:
        ValueError: a method has no point, or a number is negative or not finite.
    """
    for method, pairs in points.items():
        if not pairs or not all(math.isfinite(number) and number >= 0 for pair in pairs for number in pair):
            raise ValueError(f"points['{method}'] must hold pairs of finite numbers of at least 0, got {pairs!r}.")
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    reach = max([1.0, *(number for pairs in points.values() for pair in pairs for number in pair)])
    _draw_levels(axes, reach)
    for number, (method, pairs) in enumerate(points.items()):
        kept, learned = zip(*pairs, strict=True)
        axes.plot(kept, learned, ".", color=f"C{number}", alpha=0.5)
        means = ([sum(kept) / len(kept)], [sum(learned) / len(learned)])
        axes.plot(*means, "o", color=f"C{number}", markersize=9, fillstyle="none", markeredgewidth=2, label=method)
    axes.set(xlabel="kept (retention)", ylabel="learned (plasticity)", xlim=(0, 1.05 * reach), ylim=(0, 1.05 * reach))
    if points:
        for text in axes.legend(loc="lower left").get_texts():
            text.set_parse_math(False)
    return figure


def _without_weight(sensitivity: Tensor, activity: Tensor) -> float:
    """Mean over all entries of A^T B / N, which is never formed."""
    return float((sensitivity.mean(1) * activity.mean(1)).mean())


def _maps(maps: Mapping[str, Mapping[str, float]]) -> Figure:
    """Maps of numbers by module, one below the other: a row for each kind of module, a column for each layer."""
    found = kinds_and_layers(next(iter(maps.values())))
    kinds = list(dict.fromkeys(kind for kind, _ in found.values()))
    layers = sorted({layer for _, layer in found.values()})
    # The width stays: a page shrinks what is wider, and its letters with it.
    figure = Figure(figsize=(_WIDTH, len(maps) * (1.1 + 0.26 * len(kinds))), layout="constrained")
    panels = figure.subplots(len(maps), 1, squeeze=False)[:, 0]
    for axes, (title, numbers) in zip(panels, maps.items(), strict=True):
        sums, counts = torch.zeros(2, len(kinds), len(layers), dtype=torch.float64, device="cpu")
        for name, (kind, layer) in found.items():
            at = kinds.index(kind), layers.index(layer)
            sums[at] += numbers[name]
            counts[at] += 1
        means = sums / counts
        means[~(means > 0)] = math.nan
        axes.set_facecolor("lightgrey")
        shown = means[means > 0]
        wide = len(shown) > 0 and bool(shown.max() > 10 * shown.min())
        norm = LogNorm() if wide else None
        image = axes.imshow(means.numpy(), aspect="auto", cmap=_COLOURS, norm=norm, interpolation="nearest")
        axes.set_title(title, fontsize="medium")
        axes.set_yticks(range(len(kinds)), [printable(kind[:100]) for kind in kinds], parse_math=False)
        axes.set_xlabel("layer")
        step = -(-len(layers) // 12)
        axes.set_xticks(range(0, len(layers), step), ["-" if n == OUTSIDE else str(n) for n in layers[::step]])
        figure.colorbar(image, ax=axes)
    return figure


def _density(title: str, rows: Tensor, columns: Tensor, height: int, width: int) -> Figure:
    figure = Figure(figsize=(_WIDTH, 6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 1), height_ratios=(1, 3))
    middle = figure.add_subplot(grid[1, 0])
    above, beside = figure.add_subplot(grid[0, 0], sharex=middle), figure.add_subplot(grid[1, 1], sharey=middle)
    blocks = _blocks(rows, columns, height, width)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    image = middle.imshow(blocks.numpy(), aspect="auto", cmap=_COLOURS, vmin=0, extent=extent, interpolation="nearest")
    middle.set(xlabel="column", ylabel="row")
    above.plot(*_stretches(columns, width, height), linewidth=0.7)
    above.set(ylabel="trained", ylim=(0, None))
    above.set_title(printable(title[:100]), fontsize="medium", parse_math=False)
    beside.plot(*reversed(_stretches(rows, height, width)), linewidth=0.7)
    beside.set(xlabel="trained", xlim=(0, None))
    above.tick_params(labelbottom=False)
    beside.tick_params(labelleft=False)
    figure.colorbar(image, ax=beside, label="trained fraction of a block")
    return figure


def _blocks(rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """The trained fraction of every block of a matrix, at most `_BLOCKS` each way."""
    down, across = min(height, _BLOCKS), min(width, _BLOCKS)
    cells = (rows * down // height) * across + columns * across // width
    counts = torch.bincount(cells, minlength=down * across).view(down, across)
    return counts / (_starts(height, down).diff()[:, None] * _starts(width, across).diff())


def _stretches(lines: Tensor, number: int, entries: int) -> tuple[Any, Any]:
    """Where stretches of the rows begin, and the trained fraction of each; or of columns. `lines` has the row of
    every weight.
    """
    parts = min(number, _STRETCHES)
    starts = _starts(number, parts)
    counts = torch.bincount(lines * parts // number, minlength=parts)
    return starts[:-1].numpy(), (counts / (starts.diff() * float(entries))).numpy()


def _starts(number: int, parts: int) -> Tensor:
    """Where each stretch of rows begins, and where the last one ends: row r is in stretch r * parts // number."""
    return -(torch.arange(parts + 1, device="cpu") * -number // parts)


def _draw_levels(axes: Axes, reach: float) -> None:
    steps = [reach * 1.05 * step / 100 for step in range(101)]
    heights = [[h_score(kept, learned) for kept in steps] for learned in steps]
    lines = axes.contour(steps, steps, heights, levels=_LEVELS, colors="lightgrey", linewidths=0.8)
    axes.clabel(lines, fmt="H = %.1f", fontsize="small")
