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


def without_packages(code: str, folder: Path) -> subprocess.CompletedProcess:
    """Run code where nothing is installed but what is in the folder: the two files, and a `peft` of one line."""
    (folder / "peft.py").write_text("print('peft')")
    start = f"import site, sys; before = set(sys.modules); site.addsitedir({str(folder)!r}); "
    return subprocess.run([sys.executable, "-S", "-I", "-c", start + code], capture_output=True, text=True)


def test_without_the_package_peft_is_imported_as_ever(tmp_path: Path) -> None:
    autoload.main(["enable", "--folder", str(tmp_path)])
    found = without_packages("import peft; print(type(peft.__loader__).__name__)", tmp_path)
    assert (found.stdout, found.stderr) == ("peft\nSourceFileLoader\n", "")


def test_a_start_of_python_imports_nothing_else(tmp_path: Path) -> None:
    autoload.main(["enable", "--folder", str(tmp_path)])
    found = without_packages("print(sorted(set(sys.modules) - before))", tmp_path)
    assert (found.stdout, found.stderr) == ("['peft_dowser_autoload']\n", "")


@pytest.mark.parametrize("action", ["enable", "disable"])
def test_python_starts_without_complaint_after_a_failure(action: str, tmp_path: Path) -> None:
    autoload.main(["enable" if action == "disable" else "disable", "--folder", str(tmp_path)])
    stuck = tmp_path / (autoload.NAME if action == "enable" else autoload.MODULE)
    stuck.unlink(missing_ok=True)
    stuck.mkdir()  # can neither be written nor removed as a file
    assert autoload.main([action, "--folder", str(tmp_path)]) == 2
    stuck.rmdir()
    found = without_packages("", tmp_path)
    assert (found.stdout, found.stderr) == ("", "")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert autoload.main(["enable", "--folder", str(tmp_path / "nowhere")]) == 2
    assert str(tmp_path / "nowhere") in capsys.readouterr().err
