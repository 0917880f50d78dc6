"""`report`: one page about a saved adapter, with its pictures inside. Needs matplotlib, as `plot` does."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
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
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
h1, td { overflow-wrap: anywhere; } thead + tbody td + td, th { white-space: nowrap; } section { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td.number, th.number { text-align: right; }
th { font-weight: 600; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption { color: #555; }"""

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
    moved = list(_deltas(adapter, modules))  # refuses an adapter without a manifest, and so without ratios
    sections = [_facts(facts, modules), *moved]
    if statistics is not None:
        sections.append(_probe(ProbeStatistics.load(statistics), statistics, modules))
    sections.append(_modules(modules))
    page = _page(f"Adapter {adapter}", sections)
    with TemporaryDirectory(prefix=".report-", dir=Path(output).absolute().parent) as work:
        (Path(work) / "page").write_text(page, encoding="utf-8")
        (Path(work) / "page").replace(output)  # whole or not at all


def _facts(facts: dict[str, Any], modules: list[dict[str, Any]]) -> str:
    rows = [
        ("base model", facts["base_model_name_or_path"] or "not named"),
        ("update ratio asked for", f"{facts['update_ratio']:g}"),
        ("granularity", facts["granularity"]),
        ("chosen by", f"score {facts['score']}, the {facts['select']}est by {facts['scope']}"),
        ("seed", facts["seed"]),
        ("adapted modules", f"{len(modules):,}"),
        ("trained weights", f"{facts['trained']:,} ({facts['ratio']:.2%} of the adapted ones)"),
        ("norm of the delta", f"{facts['delta_norm']:.4g}"),
        ("size of the file", f"{facts['bytes']:,} bytes, values in {', '.join(sorted({m['dtype'] for m in modules}))}"),
    ]
    return _table(("", ""), rows)


def _deltas(adapter: str | Path, modules: list[dict[str, Any]]) -> Iterable[str]:
    most = max(modules, key=lambda row: row["delta_norm"])["module"]
    caption = "Norm and root mean square of the values of every module; log scale where they vary widely."
    yield _section("Where training moved the weights", _picture(delta_map(adapter), caption))
    caption = f"The module that moved most: {most}."
    yield _section("Which rows and columns train", _picture(mask_density(adapter, most), caption))


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
    caption = (
        f"Means over {info.num_probes} prompts of {info.probe_length} tokens, {passes}, seed {info.seed}; base model: "
        f"{info.base_model or 'not named'}."
    )
    return _section("What the probe found", _picture(importance_map(statistics), caption))


def _fits(found: ModuleStatistics | None, shape: Sequence[int]) -> bool:
    """Whether statistics can be those of a stored weight, which may be transposed."""
    if found is None:
        return False
    if found.sensitivity is None:
        return found.activity.shape[1] in shape
    return sorted((found.sensitivity.shape[1], found.activity.shape[1])) == sorted(shape)


def _modules(modules: list[dict[str, Any]]) -> str:
    rows = [
        (
            row["module"],
            " x ".join(map(str, row["shape"])),
            f"{row['trained']:,}",
            f"{row['ratio']:.2%}",
            row["dtype"],
            f"{row['bytes']:,}",
            f"{row['index_bits'] / row['trained']:.2f}",
            f"{row['delta_norm']:.4g}",
        )
        for row in modules
    ]
    header = ("module", "shape", "trained", "ratio", "values", "bytes", "bits/position", "norm")
    return _section("Module by module", _table(header, rows, numbers=(2, 3, 5, 6, 7)))


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


def _picture(figure: "Figure", caption: str) -> str:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return (
        f'<figure>\n<img alt="{text}" src="data:image/png;base64,{data}">\n<figcaption>{text}</figcaption>\n</figure>'
    )
