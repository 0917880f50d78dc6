"""`report`: one page about a saved adapter, with its pictures inside. Needs matplotlib, as `plot` does."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..delta.format import quoted
from ..files.inspection import inspect
from ..probing.statistics import ModuleStatistics, ProbeStatistics
from .plot import delta_map, importance_map, mask_density

if TYPE_CHECKING:  # if it is missing, `plot` says what to install
    from matplotlib.figure import Figure


_STYLE = """\
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } p { max-width: 44rem; }
h1, td { overflow-wrap: anywhere; } thead + tbody td + td, th { white-space: nowrap; }
thead + tbody td:first-child { min-width: 14rem; }
tbody:first-child td:first-child { min-width: 9rem; overflow-wrap: normal; }
section, figure { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; }
th { font-weight: 600; } figure { margin: 1rem 0; }
img { width: 100%; min-width: 34rem; max-width: 44rem; height: auto; }
p.note { color: #555; }"""

# Where weights are ranked against each other, by the scope of the config.
_SCOPES = {
    "matrix": "inside each matrix",
    "row": "inside each row of a matrix",
    "layer": "inside each layer",
    "model": "in the whole model",
}

# What a mask should look like, by the granularity of the config.
_GOOD_MASK = {
    "weight": "Good: trained weights in all parts of the matrix. Stripes are the work of a measured score: rows and "
    "columns on which the output depends little train, and the others stay as they are. A random mask is even.",
    "input_channel": "Good: stripes in all parts of the matrix. Each is an input channel, which trains as a whole.",
}

# How many times the median of all modules a module has to move to be named.
_FAR = 3

# The page may load nothing, whatever a name in the adapter contains.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def report(adapter: str | Path, output: str | Path, statistics: str | Path | None = None) -> None:
    """Write a page about a saved adapter: what it trains, how far it moves the weights, and pictures of both.

    Args:
        adapter: folder or Hub id of a saved Dowser adapter.
        output: file for the page. It contains its pictures and its style, loads no other file and runs no script.
        statistics: file with the probe of its base, for a map of what the probe found.

    Raises:
        ValueError: a file is damaged, the adapter is not a Dowser adapter or has no manifest, or the statistics belong
            to another model.
        OSError: a file cannot be found, or the page cannot be written.

    Note: the same adapter and the same release of matplotlib give the same page, byte for byte.
    """
    facts = inspect(adapter)
    modules = facts.pop("modules")
    # Refuses an adapter without a manifest, and so without ratios.
    moved = list(_deltas(adapter, facts["granularity"], modules))
    sections = [_section("The adapter", _facts(facts, modules)), *moved]
    if statistics is not None:
        sections.append(_probe(ProbeStatistics.load(statistics), statistics, modules))
    sections.append(_section("By kind and by layer", _rows(facts["groups"], "group")))
    sections.append(_section("Module by module", _rows(modules, "module")))
    page = _page(f"Adapter {adapter}", sections)
    with TemporaryDirectory(prefix=".report-", dir=Path(output).absolute().parent) as work:
        (Path(work) / "page").write_text(page, encoding="utf-8")
        (Path(work) / "page").replace(output)  # whole or not at all


def _facts(facts: dict[str, Any], modules: list[dict[str, Any]]) -> str:
    rows = [
        ("base model", facts["base_model_name_or_path"] or "not named"),
        ("trained weights", f"{facts['trained']:,} ({facts['ratio']:.2%} of the adapted ones)"),
        ("granularity", facts["granularity"]),
        ("asked for", _asked(facts)),
        ("chosen as", f"the {facts['select']}est by the score {facts['score']!r}, ranked {_SCOPES[facts['scope']]}"),
        ("adapted modules", f"{len(modules):,}"),
        ("seed", facts["seed"]),
        ("norm of the delta", f"{facts['delta_norm']:.4g}"),
        ("size of the file", f"{facts['bytes']:,} bytes, values in {', '.join(sorted({m['dtype'] for m in modules}))}"),
    ]
    return _table(("", ""), [*rows, *_measured(facts["measured"])])


def _asked(facts: dict[str, Any]) -> str:
    if facts["channels"] is not None:
        return f"{facts['channels']:,} input channels of each module"
    return f"{facts['update_ratio']:.2%}"


def _measured(measured: dict[str, float]) -> Iterable[tuple[str, str]]:
    """What the model card says of the training, as rows of a table."""
    loss, change = measured.get("upstream_loss"), measured.get("forgetting")
    if loss is not None and change is not None:
        yield (
            "forgetting",
            f"{change:.4f} nats per token: the loss on the texts that were watched was {loss - change:.3f} before the "
            f"training and is {loss:.3f} after it. Good: near 0; 0.01 is little (perplexity 1 % higher), 0.1 is "
            "clearly visible (11 %).",
        )
    for name, value in measured.items():
        if name not in ("upstream_loss", "forgetting"):
            yield name.replace("_", " "), f"{value:.4g}"


def _deltas(adapter: str | Path, granularity: str, modules: list[dict[str, Any]]) -> Iterable[str]:
    most = max(modules, key=lambda row: row["delta_norm"])["module"]
    yield _section(
        "Where training moved the weights",
        _picture(
            delta_map(adapter),
            "Norm and root mean square of the values of every module; log scale where they vary widely.",
            "Good: the root mean square changes little from layer to layer, and no cell is grey, for a grey module did "
            "not move." + _far(modules),
        ),
    )
    yield _section(
        "Which rows and columns train",
        _picture(mask_density(adapter, most), f"The module that moved most: {most}.", _GOOD_MASK[granularity]),
    )


def _far(modules: list[dict[str, Any]]) -> str:
    """A sentence about modules that moved much farther than most."""
    sizes = {row["module"]: row["delta_norm"] / math.sqrt(row["trained"]) for row in modules}
    usual = median(sizes.values())
    far = [name for name, size in sizes.items() if size > _FAR * usual > 0]
    if not far:
        return ""
    named = ", ".join(f"{quoted(name)} ({sizes[name] / usual:.1f} times)" for name in far[:3])
    return (
        f" More than {_FAR} times as far as most per weight: {len(far)} of {len(modules)} modules, such as {named}. A "
        "lower learning rate, or leaving them out, is worth a try."
    )


def _probe(statistics: ProbeStatistics, path: str | Path, modules: list[dict[str, Any]]) -> str:
    roots = {row["module"].partition(".")[0] for row in modules}
    statistics = statistics.named_as({row["module"] for row in modules}, roots.pop() if len(roots) == 1 else "")
    # For an expert, the statistics put its number after the name of the fused parameter.
    probed = {name.partition("[")[0]: found for name, found in statistics.modules.items()}
    other = [row["module"] for row in modules if not _fits(probed.get(row["module"]), row["shape"][-2:])]
    if other:
        raise ValueError(
            f"'{path}' has no statistics that fit {len(other)} of the {len(modules)} modules of the adapter, such as "
            f"{quoted(other[0])}. They belong to another model, or to a part of it; probe the base of the adapter."
        )
    info = statistics.info
    passes = f"{info.num_rademacher} projections each" if info.num_rademacher else "forwards only"
    high = " Where the score is high, the output depends much on the weights." if info.num_rademacher else ""
    caption = (
        f"Means over {info.num_probes} prompts of {info.probe_length} tokens, {passes}, seed {info.seed}; base model: "
        f"{info.base_model or 'not named'}."
    )
    good = (
        "Good: no cell is grey, for a grey module was not reached, and colours change smoothly from layer to layer."
        + high
    )
    return _section("What the probe found", _picture(importance_map(statistics), caption, good))


def _fits(found: ModuleStatistics | None, shape: Sequence[int]) -> bool:
    """Whether statistics can belong to a stored weight, which may be transposed."""
    if found is None:
        return False
    if found.sensitivity is None:
        return found.activity.shape[1] in shape
    return sorted((found.sensitivity.shape[1], found.activity.shape[1])) == sorted(shape)


def _rows(modules: list[dict[str, Any]], title: str) -> str:
    """A table of modules, or of groups of them."""
    rows = [
        (
            row[title],
            " x ".join(map(str, row["shape"])) if title == "module" else f"{row['modules']:,}",
            f"{row['trained']:,}",
            f"{row['ratio']:.2%}",
            row["dtype"],
            f"{row['bytes']:,}",
            f"{row['index_bits'] / row['trained']:.2f}",
            f"{row['delta_norm']:.4g}",
        )
        for row in modules
    ]
    second = "shape" if title == "module" else "modules"
    header = (title, second, "trained", "ratio", "values", "bytes", "bits/weight", "norm")
    return _table(header, rows, numbers=(2, 3, 5, 6, 7))


def _page(title: str, sections: Sequence[str]) -> str:
    content = "\n".join(sections)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{content}
</body>
</html>
"""


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    kinds = [' class="number"' if column in numbers else "" for column in range(len(header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, header, strict=True))
    lines = [
        "".join(f"<td{kind}>{escape(str(cell))}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows
    ]
    top = f"<thead><tr>{head}</tr></thead>\n" if any(header) else ""
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table>\n{top}<tbody>\n{body}\n</tbody>\n</table>"


def _picture(figure: "Figure", caption: str, good: str) -> str:
    """A picture, what it shows, and what it should look like."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return (
        f'<figure>\n<img alt="{text}" src="data:image/png;base64,{data}">\n</figure>\n'
        f'<p>{text}</p>\n<p class="note">{escape(good)}</p>'
    )
