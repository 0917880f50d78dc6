"""What the package says of the versions that it was tested with, and of itself."""

import importlib.metadata
import json
import logging
import re
import runpy
from pathlib import Path

import pytest
import yaml

import peft_dowser
from peft_dowser import _tested

ROOT = Path(__file__).parents[1]
CI = runpy.run_path(str(ROOT / ".ci" / "tested"))


def told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, **versions: str) -> list[str]:
    """What is said with these versions installed, where 6.1.2 and 0.30.1 were tested."""
    newest = {"peft": "0.30.1", "transformers": "6.1.2"}
    monkeypatch.setattr(_tested, "TESTED", {"newest": {"versions": newest}})
    monkeypatch.setattr(_tested, "version", lambda name: (newest | versions)[name])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "peft_dowser"):
        _tested.report_untested()
    return caplog.messages


@pytest.mark.parametrize(
    ("versions", "named"),
    [
        ({}, None),
        ({"peft": "0.30.9", "transformers": "5.99.0"}, None),
        ({"peft": "0.9.0"}, None),
        ({"peft": "0.31.0"}, "peft 0.31.0"),
        ({"transformers": "6.10.0.dev0"}, "transformers 6.10.0.dev0"),
        ({"peft": "1.0", "transformers": "7.0"}, "peft 1.0 and transformers 7.0"),
    ],
)
def test_a_newer_minor_release_is_named(
    versions: dict, named: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = (
        f"{named}: newer than what this release of peft-dowser was tested with (peft 0.30.1, transformers 6.1.2). It "
        "may work; where it does not, upgrade peft-dowser, or install the tested version."
    )
    assert told(monkeypatch, caplog, **versions) == ([expected] if named else [])


def test_what_is_not_installed_is_not_newer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert told(monkeypatch, caplog) == []

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_tested, "version", missing)
    _tested.report_untested()
    assert caplog.messages == []


def test_the_tested_versions_reach_what_is_required() -> None:
    """The lowest versions that passed are those that pyproject.toml allows."""
    required = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()))
    lowest = _tested.TESTED["lowest"]["versions"]
    for name in ("torch", "transformers", "peft", "accelerate", "trl"):
        assert _tested._minor(lowest[name]) == _tested._minor(required[name]), name


def test_the_table_has_every_run_and_stands_in_the_limits_where_its_marks_are() -> None:
    text = CI["table"](_tested.TESTED)
    (_, *names), line, *rows = ([cell.strip() for cell in row.strip("|").split("|")] for row in text.split("\n"))
    assert set(line) == {"---"}
    for (title, *versions), (name, run) in zip(rows, _tested.TESTED.items(), strict=True):
        assert title == f"{name}, {run['date']}"
        assert versions == [run["versions"].get(name, "-") for name in names]
        assert set(names) >= run["versions"].keys()
    limits = (ROOT / "examples/guides/limits.md").read_text()
    assert re.findall(r"<!-- tested -->\n(.*?)\n<!-- /tested -->", limits, re.DOTALL) == [text]


def test_a_run_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "peft_dowser").mkdir()
    (tmp_path / "peft_dowser/tested.json").write_text(json.dumps(_tested.TESTED))
    limits = tmp_path / "examples/guides/limits.md"
    limits.parent.mkdir(parents=True)
    limits.write_text("before\n<!-- tested -->\nold\n<!-- /tested -->\nafter\n")
    own = CI["main"].__globals__
    monkeypatch.setitem(own, "ROOT", tmp_path)
    monkeypatch.setitem(own, "DATA", tmp_path / "peft_dowser/tested.json")
    CI["main"]("newest")
    runs = json.loads((tmp_path / "peft_dowser/tested.json").read_text())
    assert runs["lowest"] == _tested.TESTED["lowest"]
    assert runs["newest"]["versions"]["peft"] == importlib.metadata.version("peft")
    assert limits.read_text() == (f"before\n<!-- tested -->\n{CI['table'](runs)}\n<!-- /tested -->\nafter\n")


def test_the_citation_is_of_this_release() -> None:
    found = yaml.safe_load((ROOT / "peft_dowser/CITATION.cff").read_text())
    assert found["version"] == peft_dowser.__version__
    assert found["preferred-citation"]["url"] == "https://arxiv.org/abs/2602.04509"
    assert {"cff-version", "message", "title", "authors", "license"} <= found.keys()


def test_nobody_is_told_to_install_an_unregistered_name() -> None:
    """Whoever registers it would own the readers of every card."""
    paths = [path for path in (ROOT / "peft_dowser").rglob("*") if path.suffix in (".py", ".md", ".cff")]
    assert not [path.name for path in paths if re.search(r"pip install [^\n]*(?<![./])peft-dowser\b", path.read_text())]
