"""Pictures: the numbers that they draw, taken off the figures, against the numbers that went in."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from models import config, saved, tiny_llama
from torch import Tensor

from peft_dowser import DowserLayer, ProbeStatistics, probe
from peft_dowser.evaluation.metrics import h_score
from peft_dowser.probing import scores
from peft_dowser.probing.statistics import ModuleStatistics, ProbeInfo
from peft_dowser.report import plot

KINDS = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv")]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def statistics() -> ProbeStatistics:
    return probe(tiny_llama(layers=3), config())


def layers_saved_to(folder: Path, **overrides) -> dict[str, DowserLayer]:
    model = saved(folder, tiny_llama(layers=3), update_ratio=0.3, **overrides)
    return {layer.module_name: layer for layer in model.modules() if isinstance(layer, DowserLayer)}


def panels(figure: Figure) -> list[Axes]:
    """The axes of a figure, less those of its colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def image(axes: Axes) -> Tensor:
    """The numbers behind the colours; NaN where there is none."""
    (found,) = axes.images
    shown = found.get_array()
    assert shown is not None
    return torch.tensor(shown.filled(math.nan).tolist())


def labels(axes: Axes, which: str) -> list[str]:
    return [label.get_text() for label in getattr(axes, f"get_{which}ticklabels")()]


def maps(figure: Figure) -> list[dict[str, float]]:
    """The numbers of every map, by module of the tiny Llama."""
    first, *_ = every = panels(figure)
    rows, columns = labels(first, "y"), labels(first, "x")  # the maps have one vertical axis
    numbers = [image(axes) for axes in every]
    assert all(found.shape == (len(rows), len(columns)) for found in numbers)
    places = [
        (f"model.layers.{layer}.{kind}", row, at) for row, kind in enumerate(rows) for at, layer in enumerate(columns)
    ]
    return [{name: float(found[row, at]) for name, row, at in places} for found in numbers]


def check_drawn(figure: Figure, folder: Path) -> None:
    """Warnings of matplotlib are errors here."""
    figure.savefig(folder / "picture.png")
    assert (folder / "picture.png").stat().st_size > 1000


# Importance


def test_the_maps_show_the_means_of_the_statistics(statistics: ProbeStatistics, tmp_path: Path) -> None:
    figure = plot.importance_map(statistics)
    sensitivity, activity, score = maps(figure)
    assert sensitivity.keys() == {f"model.layers.{layer}.{kind}" for layer in range(3) for kind in KINDS}
    modules = statistics.modules.items()
    assert sensitivity == pytest.approx({name: m.sensitivity.mean().item() for name, m in modules})
    assert activity == pytest.approx({name: m.activity.mean().item() for name, m in modules})
    products = {name: (m.sensitivity.T @ m.activity).mean().item() / 4 for name, m in modules}
    assert score == pytest.approx(products)
    assert panels(figure)[2].get_title() == "score without |W|"
    check_drawn(figure, tmp_path)


def test_with_weights_the_third_map_is_the_score(statistics: ProbeStatistics) -> None:
    model = tiny_llama(layers=3)
    weights = {name: model.get_submodule(name).weight.detach() for name in statistics.modules}
    score = maps(plot.importance_map(statistics, weights))[2]
    expected = {name: scores.dowser(weights[name], m).mean().item() for name, m in statistics.modules.items()}
    assert score == pytest.approx(expected)
    del weights[UP]
    with pytest.raises(ValueError, match=f"weights lack 1 of the modules that were probed, for example '{UP}'"):
        plot.importance_map(statistics, weights)
    with pytest.raises(ValueError, match="belong to a weight of shape"):
        plot.importance_map(statistics, weights | {UP: torch.zeros(3, 3)})


def test_statistics_of_forwards_only_show_the_activity(statistics: ProbeStatistics) -> None:
    given = statistics.of_forwards()
    (activity,) = maps(plot.importance_map(given))
    assert activity == pytest.approx({name: m.activity.mean().item() for name, m in statistics.modules.items()})
    weights = {name: torch.ones(32, module.activity.shape[1]) for name, module in given.modules.items()}
    with pytest.raises(ValueError, match="hold no sensitivity"):
        plot.importance_map(given, weights)


def made(numbers: dict[str, float]) -> ProbeStatistics:
    """Statistics of one weight per module, whose sensitivity is the number."""
    one = torch.ones(1, 1)
    modules = {name: ModuleStatistics(number * one, one, one[0]) for name, number in numbers.items()}
    return ProbeStatistics(modules, ProbeInfo("", 1, 1, 8, 0.0, 0))


@pytest.mark.parametrize(
    ("numbers", "rows", "columns", "expected"),
    [
        # layers that were not probed have no column, modules that were not probed are grey
        (
            {"h.10.attn": 1.0, "h.2.attn": 2.0, "h.2.mlp": 3.0},
            ["attn", "mlp"],
            ["2", "10"],
            [[2.0, 1.0], [3.0, math.nan]],
        ),
        # experts of one parameter are averaged
        ({"h.0.experts.up[0]": 1.0, "h.0.experts.up[12]": 3.0}, ["experts.up"], ["0"], [[2.0]]),
        # two stacks keep their names, and what is outside of the layers comes first
        (
            {"encoder.0.q": 1.0, "decoder.0.q": 2.0, "head": 3.0},
            ["encoder: q", "decoder: q", "head"],
            ["-", "0"],
            [[math.nan, 1.0], [math.nan, 2.0], [3.0, math.nan]],
        ),
        # numbers inside of a layer are part of the name, and so are digits of a word
        ({"block.1.layer.0.q": 1.0, "block.1.fc2": 2.0}, ["layer.0.q", "fc2"], ["1"], [[1.0], [2.0]]),
        ({"0": 1.0, "2": 5.0}, ["0", "2"], ["-"], [[1.0], [5.0]]),
        ({"0.q": 0.0, "1.q": 5.0}, ["q"], ["0", "1"], [[math.nan, 5.0]]),
        ({"0.q": 0.0}, ["q"], ["0"], [[math.nan]]),
    ],
)
def test_every_module_has_its_place(
    numbers: dict[str, float], rows: list[str], columns: list[str], expected: list, tmp_path: Path
) -> None:
    figure = plot.importance_map(made(numbers))
    axes = panels(figure)[0]
    assert (labels(axes, "y"), labels(axes, "x")) == (rows, columns)
    assert torch.allclose(image(axes), torch.tensor(expected), equal_nan=True)
    check_drawn(figure, tmp_path)


def test_many_layers_have_few_labels() -> None:
    axes = panels(plot.importance_map(made({f"h.{layer}.q": 1.0 + layer for layer in range(80)})))[0]
    assert labels(axes, "x") == [str(layer) for layer in range(0, 80, 7)]
    assert image(axes).shape == (1, 80)


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        plot.importance_map(made({}))


# Deltas


def test_the_delta_is_drawn_where_it_is(tmp_path: Path) -> None:
    layers = layers_saved_to(tmp_path, target_modules=["q_proj", "up_proj"])
    figure = plot.delta_map(tmp_path)
    norm, size = maps(figure)
    values = {name: layer.dowser_values["default"].weight.detach() for name, layer in layers.items()}
    assert norm == pytest.approx({name: one.norm().item() for name, one in values.items()})
    assert size == pytest.approx({name: one.square().mean().sqrt().item() for name, one in values.items()})
    check_drawn(figure, tmp_path)


# Masks


def dense_mask(layer: DowserLayer) -> Tensor:
    mask = torch.zeros(layer.get_base_layer().weight.shape)
    mask.view(-1)[layer.dowser_index["default"].positions.long()] = 1
    return mask


def test_the_density_is_that_of_rows_and_columns(tmp_path: Path) -> None:
    mask = dense_mask(layers_saved_to(tmp_path)[UP])
    figure = plot.mask_density(tmp_path, UP)
    blocks, above, beside = panels(figure)
    assert above.get_title() == UP
    (columns,), (rows,) = above.lines, beside.lines
    assert columns.get_ydata() == pytest.approx(mask.mean(0).numpy())
    assert rows.get_xdata() == pytest.approx(mask.mean(1).numpy())
    assert torch.equal(image(blocks), mask)  # 64 x 32, a block for every weight
    check_drawn(figure, tmp_path)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 130), (200, 3), (1, 1000)])
def test_a_block_holds_the_mean_of_its_weights(height: int, width: int) -> None:
    mask = (torch.rand(height, width, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    rows, columns = mask.nonzero().T
    down, across = min(height, 64), min(width, 64)
    found = plot._blocks(rows, columns, height, width)
    assert found.shape == (down, across)
    row_of, column_of = torch.arange(height) * down // height, torch.arange(width) * across // width
    for row, column in ((0, 0), (down - 1, across - 1), (down // 2, across // 3)):
        expected = mask[row_of == row][:, column_of == column].mean()
        assert found[row, column] == pytest.approx(expected.item())


def test_a_module_that_is_not_adapted_is_refused(tmp_path: Path) -> None:
    layers_saved_to(tmp_path, target_modules=["up_proj"])
    with pytest.raises(
        ValueError, match=r"no values for 'lm_head'. It adapts, for example, 'model.layers.0.mlp.up_proj'"
    ):
        plot.mask_density(tmp_path, "lm_head")


# Retention and plasticity


def test_runs_are_dots_and_means_are_rings(tmp_path: Path) -> None:
    figure = plot.retention_plasticity({"dowser": [(0.8, 0.9), (0.6, 1.0)], "full": [(0.2, 1.2)]})
    (axes,) = figure.axes
    lines = [tuple(map(list, zip(*line.get_xydata(), strict=True))) for line in axes.lines]
    assert lines[0] == ([0.8, 0.6], [0.9, 1.0])
    assert lines[1] == ([pytest.approx(0.7)], [pytest.approx(0.95)])
    assert lines[2] == lines[3] == ([0.2], [1.2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dowser", "full"]
    assert axes.get_xlim()[1] == axes.get_ylim()[1] == pytest.approx(1.26)
    (levels,) = axes.collections
    for level, path in zip(levels.levels, levels.get_paths(), strict=True):
        assert all(h_score(*point) == pytest.approx(level, abs=0.01) for point in path.vertices)
    check_drawn(figure, tmp_path)


def test_no_points_are_an_empty_picture() -> None:
    (axes,) = plot.retention_plasticity({}).axes
    assert not axes.lines


@pytest.mark.parametrize("pairs", [[], [(0.5, math.nan)], [(-0.1, 0.5)], [(0.5, math.inf)]])
def test_points_that_are_none_are_refused(pairs: list) -> None:
    with pytest.raises(ValueError, match=r"points\['full'\] must hold pairs of finite numbers of at least 0"):
        plot.retention_plasticity({"full": pairs})


# Without matplotlib


def test_without_matplotlib_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    monkeypatch.delitem(sys.modules, "peft_dowser.report.plot")
    with pytest.raises(ImportError, match="Pictures need matplotlib, which is not installed: pip install matplotlib"):
        importlib.import_module("peft_dowser.report.plot")
