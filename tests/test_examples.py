"""Examples run, with fewer steps and smaller models than their defaults."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES / "benchmarks"))

import adapter_size  # noqa: E402
import measure  # noqa: E402
import probing  # noqa: E402
import training_step  # noqa: E402


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", training_step.METHODS)
def test_a_training_step_of_every_peer_can_be_measured(method: str) -> None:
    found = training_step.measure_step(method, 0.1, 64, 8, "float32", 1)
    assert found["seconds"] > 0
    assert 0.05 < found["trained"] < 0.2 or method == "full"


@pytest.mark.filterwarnings("ignore")
def test_probing_and_sizes_can_be_measured() -> None:
    assert probing.measure_time(64, "float32", 2, 8, 2)["ratio"] > 0
    assert probing.measure_memory(64, "float32", 2, 8)["linear_weights"] > 0
    assert adapter_size.config_of("shira", 0.1, 64) is not None


def test_a_report_names_the_machine_and_the_versions(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    measure.report("step", {"seconds": 1.0}, tmp_path / "step.json")
    written = json.loads((tmp_path / "step.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["results"] == {"seconds": 1.0}
    assert written["machine"]["versions"].keys() == {"torch", "transformers", "peft", "peft-dowser"}
