"""Adapters that earlier releases wrote, two per format version, still give the outputs that they gave then."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data.make_golden import FOLDER, GOLDEN, Base, inputs
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from peft_dowser import DowserConfig
from peft_dowser.delta.format import FORMAT

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
FORMATS = sorted(path.name for path in FOLDER.glob("format_*"))


def test_there_is_one_per_format_and_granularity() -> None:
    assert FORMATS == sorted(
        f"format_{number}{end}" for number in range(1, FORMAT + 1) for end in ("", "_input_channel")
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_golden_adapter_gives_the_outputs_that_it_gave(name: str) -> None:
    model = PeftModel.from_pretrained(Base(), FOLDER / name).eval()
    expected = load_file(FOLDER / name / "expected.safetensors")["logits"]
    with torch.no_grad():
        # Numbers with few bits: only the order of a sum may differ between machines.
        assert torch.allclose(model(inputs()), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(Base()(inputs()), expected, rtol=1e-2)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_adapter_is_written_again_byte_for_byte(name: str, tmp_path: Path) -> None:
    PeftModel.from_pretrained(Base(), FOLDER / name).save_pretrained(tmp_path)
    file = "adapter_model.safetensors"
    assert (tmp_path / file).read_bytes() == (FOLDER / name / file).read_bytes()


@pytest.mark.slow
def test_the_script_refuses_a_dirty_tree(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(FOLDER / "make_golden.py", tmp_path)
    run = subprocess.run([sys.executable, str(tmp_path / "make_golden.py")], capture_output=True, text=True)
    assert run.returncode == 1
    assert "uncommitted changes" in run.stderr
    assert not list(tmp_path.glob("format_*"))


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_mask_is_that_of_its_config(name: str) -> None:
    config = DowserConfig.from_pretrained(FOLDER / name)
    config.nnz_pattern = config.manifest = None
    saved = load_file(FOLDER / name / "adapter_model.safetensors")
    codes = {
        name: code
        for name, code in get_peft_model_state_dict(get_peft_model(Base(), config)).items()
        if ".code" in name
    }
    assert codes.keys() == {name for name in saved if ".code" in name}
    assert all(torch.equal(code, saved[name]) for name, code in codes.items())
