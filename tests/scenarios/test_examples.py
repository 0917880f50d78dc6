"""Examples run, with fewer steps and smaller models than their defaults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import files  # noqa: E402
import generation  # noqa: E402
import measure  # noqa: E402
import one_billion  # noqa: E402
import peers  # noqa: E402
import probing  # noqa: E402
import run  # noqa: E402
import training_step  # noqa: E402


@pytest.mark.slow
def test_the_quickstart_prints_its_table(tmp_path: Path) -> None:
    arguments = ["--steps", "2", "--output", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "quickstart.py", *arguments], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    assert "merged == adapter: bit-identical" in done.stdout
    assert "reloaded == trained: bit-identical" in done.stdout
    assert ["before", "92.3", "0.0", "0", "2,388,320"] in lines
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    (row,) = [line for line in lines if line[:1] == ["Dowser"]]
    assert row[-2:] == ["239,616", f"{size:,}"]
    assert "Probing" in done.stderr


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["plain", "checkpointed"])
@pytest.mark.parametrize("method", peers.METHODS)
def test_a_training_step_of_every_peer_can_be_measured(method: str, variant: str) -> None:
    found = training_step.measure_step(method, 0.1, 64, 8, "float32", 1, variant)
    assert found["seconds"] > 0
    assert 0.08 < found["trained"] < 0.12 or method in ("full", "lora r=16")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_everything_else_can_be_measured() -> None:
    assert generation.measure_generation("dowser", 0.1, 64, "float32", 4)["time_over_base"] > 0
    assert probing.measure_time(64, "float32", 4, 8, 2)["authors_over_ours"] > 0
    assert probing.measure_memory(64, "float32", 2, 8)["linear_weights"] > 0
    assert files.measure_files("dowser", 0.1, 64, 2, "float32", 2)["load_over_limit"] > 0
    found = one_billion.fine_tune(one_billion.architecture(1, 128), 0.1, 8, 2, 2)
    assert list(found["stages"]) == ["build", "probe", "select", "step", "save", "load", "merge"]


def test_the_runner_writes_json_a_table_and_a_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "dtype": "float32",
            "rho": 0.1,
            "variant": "plain",
            "method": method,
            "seconds": 0.123456,
            "bytes_per_weight": 2.0,
        }
        for method in peers.METHODS
    ]
    monkeypatch.setitem(run.PARTS, "step", lambda rounds: rows)
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "step", "--output", str(tmp_path)])
    run.main()
    assert {path.name for path in tmp_path.iterdir()} == {"step.json", "step.md", "step.png"}
    assert "| float32 | 0.1 | plain | dowser | 0.123 | 2 |" in (tmp_path / "step.md").read_text()


def test_a_report_names_the_machine_and_the_versions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    measure.report("step", {"seconds": 1.0}, tmp_path / "step.json")
    written = json.loads((tmp_path / "step.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["results"] == {"seconds": 1.0}
    assert written["machine"]["versions"].keys() == {"torch", "transformers", "peft", "peft-dowser"}
