"""The opt-in that imports this package after PEFT, in processes of their own that see it as site-packages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import config, set_values, tiny_llama
from peft import get_peft_model

import peft_dowser
from peft_dowser import autoload

ROOT = Path(peft_dowser.__file__).parent.parent


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code in a process of its own, to which the folder is a part of site-packages."""
    start = f"import site, sys; sys.path.append({str(ROOT)!r}); site.addsitedir({str(folder)!r}); "
    return subprocess.run([sys.executable, "-I", "-c", start + code], capture_output=True, text=True, cwd=folder)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = get_peft_model(tiny_llama(), config(score="magnitude"))
    set_values(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.slow
def test_peft_reads_an_adapter_without_the_import_while_enabled(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    load = f"from peft import PeftConfig; print(type(PeftConfig.from_pretrained({str(adapter)!r})).__name__)"
    site = tmp_path / "site"
    site.mkdir()
    assert "KeyError: 'DOWSER'" in run(load, site).stderr
    assert autoload.main(["status", "--folder", str(site)]) == 1
    assert autoload.main(["enable", "--folder", str(site)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"disabled in {site}", f"enabled in {site}"]
    found = run(load, site)
    assert found.stdout == "DowserConfig\n", found.stderr
    assert autoload.main(["disable", "--folder", str(site)]) == 0
    assert not [path for path in site.rglob("*") if path.is_file()]
    assert "KeyError: 'DOWSER'" in run(load, site).stderr


@pytest.mark.slow
def test_nothing_is_imported_before_peft_and_a_look_up_changes_nothing(tmp_path: Path) -> None:
    autoload.main(["enable", "--folder", str(tmp_path)])
    code = """
import importlib.util, json
heavy = lambda: [name for name in ("torch", "peft", "peft_dowser") if name in sys.modules]
before = heavy()
importlib.util.find_spec("peft")
looked = heavy()
import peft
print(json.dumps([before, looked, heavy(), type(peft.__loader__).__name__]))
"""
    found = run(code, tmp_path)
    assert json.loads(found.stdout) == [[], [], ["torch", "peft", "peft_dowser"], "SourceFileLoader"], found.stderr


def test_without_the_package_the_line_does_nothing(tmp_path: Path) -> None:
    autoload.main(["enable", "--folder", str(tmp_path)])
    code = f"import site, sys; site.addsitedir({str(tmp_path)!r}); print('peft_dowser_autoload' in sys.modules)"
    found = subprocess.run([sys.executable, "-S", "-I", "-c", code], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("False\n", "")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert autoload.main(["enable", "--folder", str(tmp_path / "nowhere")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
