"""The page about an adapter: what it says, that it is whole, and that it asks for nothing, in a browser too."""

import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from models import config, edit_config, saved, tiny_llama

from peft_dowser import DeltaFormatError, DowserLayer, ProbeStatistics, probe
from peft_dowser.cli import main
from peft_dowser.files.inspection import inspect
from peft_dowser.probing.statistics import ModuleStatistics
from peft_dowser.report.page import report

pytestmark = pytest.mark.usefixtures("offline")

VOID = {"meta", "img", "br"}
HOSTILE = '</style><script>document.title="taken"</script><img src="http://example.com/x.png">&amp;'
HEADINGS = ["Where training moved the weights", "Which rows and columns train", "Module by module"]


@pytest.fixture(scope="module")
def statistics() -> ProbeStatistics:
    return probe(tiny_llama(), config())


class Page(HTMLParser):
    """A page, read strictly: every element is closed in its turn, and what can ask for another file is listed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.policy = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert len(given) == len(attrs)
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name in given if name.startswith("on") or name == "style"]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data
        else:
            assert not data.strip()


def check_page(path: Path) -> Page:
    """The page, after a check that it is whole and alone."""
    page = Page(path)
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>\n")
    assert page.policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for link in page.links:
        head, _, data = link.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    (style,) = page.texts["style"]
    assert "url(" not in style
    assert "@import" not in style
    return page


# What it says


def test_the_page_says_what_inspect_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    saved(tmp_path, save_dtype="bfloat16", ratio_pattern={"q_proj": 0.5})
    output = tmp_path / "page.html"
    assert main(["report", str(tmp_path), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output.stat().st_size} bytes: {output}\n"
    page = check_page(output)
    facts = inspect(tmp_path)
    assert page.texts["h1"] == page.texts["title"] == [f"Adapter {tmp_path}"]
    assert page.texts["h2"] == HEADINGS
    assert len(page.links) == 2
    cells = page.texts["td"]
    assert f"{facts['trained']:,} ({facts['ratio']:.2%} of the adapted ones)" in cells
    assert f"{facts['bytes']:,} bytes, values in bfloat16" in cells
    at = cells.index(facts["modules"][0]["module"])
    rows = [cells[start : start + 8] for start in range(at, len(cells), 8)]
    assert [row[0] for row in rows] == [row["module"] for row in facts["modules"]]
    for row, expected in zip(rows, facts["modules"], strict=True):
        assert row[1:4] == [
            f"{expected['shape'][0]} x {expected['shape'][1]}",
            f"{expected['trained']:,}",
            f"{expected['ratio']:.2%}",
        ]
        assert float(row[7]) == pytest.approx(expected["delta_norm"], rel=1e-3)


def test_the_mask_is_that_of_the_module_that_moved_most(tmp_path: Path) -> None:
    model = saved(tmp_path)
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            layer.dowser_values["default"].weight.data *= 100 if layer.module_name.endswith("1.self_attn.k_proj") else 1
    model.save_pretrained(tmp_path)
    report(tmp_path, tmp_path / "page.html")
    caption = "The module that moved most: model.layers.1.self_attn.k_proj."
    assert caption in check_page(tmp_path / "page.html").texts["figcaption"]


def test_with_statistics_the_page_shows_the_probe(
    statistics: ProbeStatistics, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved(tmp_path)
    statistics.save(tmp_path / "probe.safetensors")
    options = ["-o", str(tmp_path / "page.html"), "--statistics", str(tmp_path / "probe.safetensors")]
    assert main(["report", str(tmp_path), *options]) == 0
    page = check_page(tmp_path / "page.html")
    assert page.texts["h2"] == [*HEADINGS[:2], "What the probe found", HEADINGS[2]]
    assert len(page.links) == 3
    assert page.texts["figcaption"][2].startswith("Means over 4 prompts of 12 tokens, 2 projections each, seed 0;")


def test_statistics_of_forwards_only_show_the_activity(
    statistics: ProbeStatistics, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved(tmp_path)
    path = tmp_path / "probe.safetensors"
    statistics.of_forwards().save(path)
    report(tmp_path, tmp_path / "page.html", statistics=path)
    caption = check_page(tmp_path / "page.html").texts["figcaption"][2]
    assert caption.startswith("Means over 4 prompts of 12 tokens, forwards only, seed 0;")
    probe(tiny_llama(hidden=16), config(score="activity")).save(path)
    with pytest.raises(ValueError, match="has no statistics that fit 12 of the 14 modules"):
        report(tmp_path, tmp_path / "page.html", statistics=path)


def test_one_adapter_gives_one_page(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("one.html", "two.html"):
        report(tmp_path, tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_what_a_stranger_wrote_is_text(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, lambda found: found | {"base_model_name_or_path": HOSTILE})
    report(tmp_path, tmp_path / "page.html")
    assert HOSTILE in check_page(tmp_path / "page.html").texts["td"]


# Refusals


def test_statistics_of_another_model_are_refused(statistics: ProbeStatistics, tmp_path: Path) -> None:
    saved(tmp_path)
    one = statistics.modules["model.layers.0.self_attn.q_proj"]
    others = {
        name: ModuleStatistics(one.sensitivity + 0, one.activity + 0, one.energy + 0) for name in statistics.modules
    }
    for name, modules in (
        ("part", {name: module for name, module in statistics.modules.items() if ".1." not in name}),
        ("other", others),
    ):
        ProbeStatistics(modules, statistics.info).save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"'.*{name}' has no statistics that fit \d+ of the 14 modules"):
            report(tmp_path, tmp_path / "page.html", statistics=tmp_path / name)
    assert not (tmp_path / "page.html").exists()


def test_statistics_of_the_bare_base_are_found_under_the_names_of_the_adapter(
    statistics: ProbeStatistics, tmp_path: Path
) -> None:
    saved(tmp_path)
    bare = {name.removeprefix("model."): module for name, module in statistics.modules.items()}
    for name, modules in (("whole", statistics.modules), ("bare", bare)):
        ProbeStatistics(modules, statistics.info).save(tmp_path / name)
        report(tmp_path, tmp_path / f"{name}.html", statistics=tmp_path / name)
    assert (tmp_path / "bare.html").read_bytes() == (tmp_path / "whole.html").read_bytes()


def test_an_adapter_without_a_manifest_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, lambda found: found | {"manifest": None})
    with pytest.raises(DeltaFormatError, match="has no manifest"):
        report(tmp_path, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "nowhere/page.html"], "'nowhere' is not a folder"),
        (["-o", "page.html", "--statistics", "none"], "No probe statistics at 'none'."),
        (["-o", "page.html", "--statistics", "adapter/adapter_model.safetensors"], "holds no probe statistics"),
    ],
)
def test_a_page_that_cannot_be_is_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "adapter")
    capsys.readouterr()
    assert main(["report", "adapter", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("page.html").exists()


def test_without_matplotlib_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("plot", "page"):
        monkeypatch.delitem(sys.modules, f"peft_dowser.report.{name}", raising=False)
    assert main(["report", "adapter", "-o", str(tmp_path / "page.html")]) == 2
    line = "peft-dowser: Pictures need matplotlib, which is not installed: pip install matplotlib\n"
    assert capsys.readouterr().err == line


# In a browser

BROWSER = """
import json, sys
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEngineUrlRequestInterceptor
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

class Listener(QWebEngineUrlRequestInterceptor):
    asked = []
    def interceptRequest(self, info):
        self.asked.append(info.requestUrl().toString()[:40])

FACTS = '''JSON.stringify({
    title: document.title,
    images: [...document.images].map(image => image.complete && image.naturalWidth > 100 && image.width <= innerWidth),
    heading: document.querySelector("h1").getBoundingClientRect().height,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})'''
application = QApplication([""])
view, listener = QWebEngineView(), Listener()
view.page().profile().setUrlRequestInterceptor(listener)
view.resize(1000, 800)

def finish(facts):
    colours = view.grab().toImage()
    seen = {colours.pixel(x, y) for x in range(0, 1000, 5) for y in range(0, 800, 5)}
    print("FACTS" + json.dumps(json.loads(facts) | {"asked": listener.asked, "colours": len(seen)}))
    application.quit()

view.loadFinished.connect(lambda: QTimer.singleShot(300, lambda: view.page().runJavaScript(FACTS, finish)))
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
application.exec()
"""


def has_browser() -> bool:
    return all(importlib.util.find_spec(name) for name in ("PyQt6", "PyQt6.QtWebEngineWidgets"))


@pytest.mark.slow
@pytest.mark.skipif(not has_browser(), reason="needs PyQt6-WebEngine, the Chromium that pip can install")
def test_a_browser_shows_the_page_and_asks_for_nothing(statistics: ProbeStatistics, tmp_path: Path) -> None:
    saved(tmp_path)
    edit_config(tmp_path, lambda found: found | {"base_model_name_or_path": HOSTILE})
    statistics.save(tmp_path / "probe")
    path = tmp_path / "page.html"
    report(tmp_path, path, statistics=tmp_path / "probe")
    headless = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
    command = [sys.executable, "-c", BROWSER, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | headless)
    found = re.search("^FACTS(.*)$", run.stdout, re.MULTILINE)
    assert found, run.stderr
    facts = json.loads(found[1])
    assert facts["title"] == f"Adapter {tmp_path}"
    assert facts["images"] == [True] * 3
    assert facts["heading"] > 10
    assert facts["overflow"] <= 0
    assert {url.partition(":")[0] for url in facts["asked"]} <= {"file", "data"}
    assert sum(url.startswith("file:") for url in facts["asked"]) == 1
    assert facts["colours"] > 50
