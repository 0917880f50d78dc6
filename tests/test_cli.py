"""The command: what it writes, what it prints, and one line for every mistake of the user's."""

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models import config, set_values, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import peft_dowser.cli
from peft_dowser import DowserConfig, DowserLayer, ProbeStatistics, extract, probe
from peft_dowser.cli import main

pytestmark = pytest.mark.usefixtures("offline")

QUICK = ["--num-probes", "3", "--num-rademacher", "2", "--probe-length", "10"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(torch.bfloat16).save_pretrained(folder)
    return folder


def adapter(folder: Path, **overrides) -> PeftModel:
    """A trained adapter, saved to `folder`."""
    model = get_peft_model(tiny_llama(), config(score="random", **overrides))
    set_values(model)
    model.save_pretrained(folder)
    return model


def expected_modules(model: PeftModel, dtype: str) -> list[dict]:
    """What the adapter itself says about its modules."""
    layers = {layer.module_name: layer for layer in model.modules() if isinstance(layer, DowserLayer)}
    modules = []
    for name in sorted(layers):
        weight, code = layers[name].get_base_layer().weight, layers[name].dowser_index["default"].code
        values = layers[name].dowser_values["default"].weight.to(getattr(torch, dtype))
        modules.append(
            {
                "module": name,
                "shape": list(weight.shape),
                "trained": values.numel(),
                "ratio": values.numel() / weight.numel(),
                "dtype": dtype,
                "index_bits": 8 * code.numel(),
                "bytes": values.nbytes + code.nbytes,
                "delta_norm": values.float().norm().item(),
                "vanished": None,
            }
        )
    return modules


# probe


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ([], {}),
        (["--last-layers", "1", "--seed", "5", "--device", "cpu"], {"last_layers": 1, "seed": 5}),
        (["--score", "shift"], {"score": "shift"}),
        (["--score", "activity"], {"score": "activity"}),
    ],
)
def test_probe_writes_what_the_function_returns(
    options: list[str], fields: dict, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "probe.safetensors"
    assert main(["probe", str(base), "-o", str(path), *QUICK, *options]) == 0
    given = DowserConfig(num_probes=3, num_rademacher=2, probe_length=10, **fields)
    expected = probe(LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16), given)
    found = ProbeStatistics.load(path)
    assert found.info == expected.info
    assert found.info.base_model == str(base)
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        for field, tensor in vars(module).items():
            same = getattr(found.modules[name], field)
            assert same is tensor is None or torch.equal(same, tensor)
    printed = capsys.readouterr().out
    probes = "3 probes" if expected.info.num_rademacher else "3 probes of forwards only"
    assert printed == f"{len(found.modules)} modules, {probes}, {path.stat().st_size} bytes: {path}\n"


def test_probe_refuses_an_unknown_score(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["probe", str(base), "-o", str(tmp_path / "probe.safetensors"), "--score", "hessian"]) == 2
    assert "score must be one of dowser, shift, activity, random, magnitude, wanda, gradient" in capsys.readouterr().err


def test_probe_has_the_defaults_of_the_config(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    assert main(["probe", str(base), "--output", str(path)]) == 0
    info, default = ProbeStatistics.load(path).info, DowserConfig()
    for field in ("num_probes", "num_rademacher", "probe_length", "probe_images", "seed"):
        assert getattr(info, field) == getattr(default, field)


# inspect


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inspect_json_has_the_numbers_of_the_adapter(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = adapter(tmp_path, update_ratio=0.05, ratio_pattern={"q_proj": 0.5}, save_dtype=dtype, seed=4)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    modules = expected_modules(model, dtype)
    norms = [module.pop("delta_norm") for module in modules]
    assert [module.pop("delta_norm") for module in found["modules"]] == pytest.approx(norms, rel=1e-6)
    assert found.pop("delta_norm") == pytest.approx(sum(norm**2 for norm in norms) ** 0.5, rel=1e-6)
    adapted = sum(math.prod(module["shape"]) for module in modules)
    assert found == {
        "base_model_name_or_path": None,
        "update_ratio": 0.05,
        "granularity": "weight",
        "score": "random",
        "select": "low",
        "scope": "matrix",
        "seed": 4,
        "trained": model.get_nb_trainable_parameters()[0],
        "ratio": model.get_nb_trainable_parameters()[0] / adapted,
        "vanished": None,
        "bytes": (tmp_path / "adapter_model.safetensors").stat().st_size,
        "modules": modules,
    }


def test_inspect_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = adapter(tmp_path, last_layers=1)
    assert main(["inspect", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert {"update_ratio: 0.1", f"trained: {model.get_nb_trainable_parameters()[0]}", f"bytes: {size}"} < set(lines)
    modules = expected_modules(model, "float32")
    header, *rows = (line.split() for line in lines[-len(modules) - 1 :])
    assert header == ["trained", "ratio", "dtype", "bytes", "bits/index", "|delta|", "vanish", "module"]
    for (trained, ratio, dtype, size, bits, norm, vanished, name), module in zip(rows, modules, strict=True):
        assert (int(trained), dtype, vanished, name) == (module["trained"], "float32", "-", module["module"])
        assert (float(ratio), int(size)) == (pytest.approx(module["ratio"], abs=5e-5), module["bytes"])
        assert float(bits) == pytest.approx(module["index_bits"] / module["trained"], abs=0.005)
        assert float(norm) == pytest.approx(module["delta_norm"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inspect_with_a_base_counts_the_values_that_vanish_in_bfloat16(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = tiny_llama(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    model = get_peft_model(base, config(score="random"))
    set_values(model, std=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    layers = {layer.module_name: layer for layer in model.modules() if isinstance(layer, DowserLayer)}
    vanished = {}
    for name, layer in layers.items():
        before = layer.get_base_layer().weight.to(torch.bfloat16)
        at = layer.dowser_index["default"].positions.long()
        delta = torch.zeros(before.numel()).index_put((at,), layer.dowser_values["default"].weight.detach())
        after = (before.float() + delta.view_as(before)).to(torch.bfloat16)
        vanished[name] = int(((after == before).view(-1) & (delta != 0)).sum())
    for row in found["modules"]:
        assert row["vanished"] * row["trained"] == pytest.approx(vanished[row["module"]])
    assert found["vanished"] * found["trained"] == pytest.approx(sum(vanished.values()))
    assert 0 < found["vanished"] < 1
    assert main(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 0
    assert f"vanished: {found['vanished']:.4g}" in capsys.readouterr().out


def test_inspect_with_another_base_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapter(tmp_path / "adapter")
    tiny_llama(hidden=64).save_pretrained(tmp_path / "base")
    line = line_of(["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")], capsys)
    assert "has a weight of shape (64, 128) here, the adapter was made for [32, 64]" in line


def test_inspect_of_an_adapter_without_a_manifest_leaves_out_the_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"manifest": None}))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {(row["shape"], row["ratio"]) for row in (found | {"shape": None}, *found["modules"])} == {(None, None)}
    assert main(["inspect", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == "-"


# extract


def tuned(folder: Path) -> Path:
    """A fine-tuned model, saved to `folder`."""
    model = tiny_llama(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            parameter.data *= 1.25
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {}),
        (["--update-ratio", "0.3", "--method", "dare", "--seed", "4"], {"method": "dare", "seed": 4}),
        (["--update-ratio", "0.3", "--method", "graft", "--scale", "0.5"], {"method": "graft", "scale": 0.5}),
        (["--target-modules", "q_proj", "up_proj"], {"target_modules": ["q_proj", "up_proj"]}),
        (["--target-modules", "all-linear"], {"target_modules": "all-linear"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tensors outside the target weights differ")
def test_extract_writes_what_the_function_writes(
    options: list[str], arguments: dict, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    other = tuned(tmp_path / "tuned")
    capsys.readouterr()
    assert main(["extract", str(base), str(other), "-o", str(tmp_path / "command"), *options]) == 0
    ratio = {"update_ratio": 0.3} if "--update-ratio" in options else {}
    counts = extract(base, other, tmp_path / "function", **ratio, **arguments)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "command" / name).read_bytes() == (tmp_path / "function" / name).read_bytes()
    size = (tmp_path / "function/adapter_model.safetensors").stat().st_size
    printed = capsys.readouterr().out
    assert printed == f"{len(counts)} modules, {sum(counts.values())} values, {size} bytes: {tmp_path / 'command'}\n"


# Mistakes


def line_of(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a mistake prints, less the progress bars before it."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.split("\n") if line and "\r" not in line]
    assert line.startswith("peft-dowser: ")
    return line


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("base", ["--num-probes", "0"], "DowserConfig: num_probes must be an integer of at least 1, got 0."),
        ("base", ["--probe-images", "nan"], "DowserConfig: probe_images must be a number in [0, 1], got nan."),
        ("base", ["--last-layers", "9"], "last_layers=9, but 'model.layers' has only 2 layers."),
        ("base", ["--device", "nowhere"], "nowhere"),
        ("base", ["--output", "missing/probe.safetensors"], "missing"),
        ("base", ["--output", "/proc/probe.safetensors"], "/proc"),  # a folder in which nothing can be written
        ("base", ["--output", "odd"], "'odd' is a folder, but the output is a file. Name a file in it."),
        ("no/such/folder", [], "no/such/folder"),
        ("nobody/has-this-model", [], "couldn't connect to 'https://huggingface.co'"),
        ("odd", [], "NoSuchModel"),
    ],
)
def test_a_probe_that_cannot_be_is_refused_in_one_line(
    model: str,
    options: list[str],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(base)
    Path("odd").mkdir()
    Path("odd/config.json").write_text((base / "config.json").read_text().replace("LlamaForCausalLM", "NoSuchModel"))
    assert message in line_of(["probe", model, "-o", "probe.safetensors", *QUICK, *options], capsys)
    assert not Path("probe.safetensors").exists()


@pytest.mark.parametrize("command", [["probe", "-o", "probe.safetensors"], ["plan"]])
def test_a_config_that_is_no_model_is_refused_in_one_line(
    command: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    known = json.loads((base / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(known | {"num_attention_heads": 5}))
    line = line_of([*command, str(tmp_path)], capsys)
    assert "The hidden size (32) is not a multiple of the number of attention heads (5)." in line


COMMANDS = {
    "probe": ["base", "-o", "probe.safetensors"],
    "inspect": ["adapter"],
    "diff": ["adapter", "adapter"],
    "report": ["adapter", "-o", "page.html"],
    "export-lora": ["adapter", "-o", "folder"],
    "extract": ["base", "base", "-o", "folder"],
    "plan": ["base"],
    "merge": ["adapter", "-o", "folder"],
    "verify": ["adapter"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_is_one_line(command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(options: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    assert COMMANDS.keys() == peft_dowser.cli._COMMANDS.keys()
    monkeypatch.setitem(peft_dowser.cli._COMMANDS, command, interrupt)
    assert main([command, *COMMANDS[command]]) == 130
    assert capsys.readouterr().err == f"peft-dowser: {command} was interrupted.\n"


@pytest.mark.slow
def test_ctrl_c_in_a_probe_that_runs(base: Path, tmp_path: Path) -> None:
    # A job in the background ignores it.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; import sys; from peft_dowser.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "probe", str(base), "-o", str(tmp_path / "p"), "--num-rademacher", "100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        told = ""
        while "Probing" not in told:
            told += running.stderr.read(1)
        running.send_signal(signal.SIGINT)
        _, rest = running.communicate(timeout=120)
    assert running.returncode == 130
    assert rest.endswith("peft-dowser: probe was interrupted.\n")
    assert "Traceback" not in told + rest
    assert not list(tmp_path.iterdir())


def test_a_probe_without_memory_or_a_library_is_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RuntimeError("One prompt does not fit into memory."), ImportError("Needs bitsandbytes.")):

        def fail(*args, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(importlib.import_module("peft_dowser.probing.run"), "probe", fail)
        line = line_of(["probe", str(base), "-o", str(tmp_path / "probe.safetensors")], capsys)
        assert line == f"peft-dowser: {error}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_model.safetensors", None, "holds no adapter_model.safetensors."),
        ("adapter_model.safetensors", "{", "adapter_model.safetensors"),
        ("adapter_config.json", None, "adapter_config.json"),
        ("adapter_config.json", "{", "line 1 column 2"),
        ("adapter_config.json", "[]", "adapter_config.json"),
    ],
)
def test_a_damaged_adapter_is_refused_in_one_line(
    name: str, content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapter(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in line_of(["inspect", str(tmp_path)], capsys)


def test_a_folder_without_a_dowser_adapter_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    line = line_of(["inspect", str(tmp_path)], capsys)
    assert line == f"peft-dowser: '{tmp_path}' holds a LORA adapter, not a Dowser adapter."
    line = line_of(["inspect", str(tmp_path / "none")], capsys)
    assert line.startswith(f"peft-dowser: '{tmp_path / 'none'}' is neither a folder nor a model on the Hub that can be")
    (tmp_path / "empty").mkdir()
    line = line_of(["inspect", str(tmp_path / "empty")], capsys)
    assert line == f"peft-dowser: '{tmp_path / 'empty'}' holds no adapter_model.safetensors."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--update-ratio", "0"], "DowserConfig: update_ratio must be a number in (0, 1], got 0.0."),
        (["--scale", "nan"], "scale must be a finite number other than 0, got nan."),
        (["--output", "tuned"], "'tuned' is not an empty folder; choose another output, or empty it first."),
        (["--target-modules", "nope"], "Target modules ['nope'] not found in the base model"),
        (["--target-modules", "norm"], "Target module 'model.norm' is a LlamaRMSNorm."),
    ],
)
def test_an_extraction_that_cannot_be_is_refused_in_one_line(
    options: list[str],
    message: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned(Path("tuned"))
    assert message in line_of(["extract", str(base), "tuned", "-o", "adapter", *options], capsys)
    assert not Path("adapter").exists()


def test_models_that_cannot_be_compared_are_refused_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = ["-o", str(tmp_path / "adapter")]
    line = line_of(["extract", str(base), str(base), *output], capsys)
    assert line == f"peft-dowser: base and tuned are the same checkpoint, '{base}'."
    line = line_of(["extract", str(base), "nobody/has-this-model", *output], capsys)
    assert "'nobody/has-this-model' is neither a folder nor a model on the Hub that can be read (" in line


@pytest.mark.parametrize(
    "command", [[], ["probe"], ["inspect"], ["diff"], ["report"], ["extract"], ["merge"], ["verify"]]
)
def test_help_is_no_mistake(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(" ".join(["usage: peft-dowser", *command]))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["diff", "adapter"],
        ["report", "adapter"],
        ["merge"],
        ["merge", "adapter"],
        ["verify"],
        ["probe", "folder"],
        ["probe", "f", "-o", "s", "--seed", "x"],
        ["extract", "base", "tuned"],
        ["extract", "base", "tuned", "-o", "adapter", "--method", "ties"],
    ],
)
def test_arguments_that_cannot_be_read_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["probe", "--help"], 0), (["report", "adapter"], 2), (["nothing"], 2)]
)
def test_the_command_line_is_read_before_anything_heavy_is_imported(arguments: list[str], code: int) -> None:
    heavy = {"matplotlib", "numpy", "peft", "peft_dowser", "safetensors", "torch", "transformers"}
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="peft-dowser")
    program = f"""
import importlib, sys
sys.argv[1:] = {arguments}
try:
    importlib.import_module({script.module!r}).main()
except SystemExit as exit:
    print(exit.code, sorted({heavy} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == f"{code} []"


# run

LOADS = """
import sys
from peft import PeftConfig

def main():
    print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__, __name__)
    return 3

if __name__ == "__main__":
    sys.exit(main())
"""
SAYS = """
import sys

def main():
    import neighbor
    print(sys.argv[0].rpartition("/")[2], *sys.argv[1:], __name__, neighbor.__name__)
    return 3

if __name__ == "__main__":
    sys.exit(main())
"""
# What is given on the command line, what the program then sees as its name, and what its module is called.
PROGRAMS = {
    "console script": (["tool"], "tool", "tool_module"),
    "module": (["-m", "tool_module"], "tool_module.py", "__main__"),
    "script": (["tool_module.py"], "tool_module.py", "__main__"),
}


def programs_in(folder: Path, source: str) -> None:
    """Install a program in a folder: a script, and the same as a module and as a console script."""
    (folder / "tool_module.py").write_text(source)
    (folder / "neighbor.py").touch()
    about = folder / "tool-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[console_scripts]\ntool = tool_module:main\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_that_does_not_import_the_package_reads_an_adapter(kind: str, tmp_path: Path) -> None:
    adapter(tmp_path / "adapter")
    programs_in(tmp_path, LOADS)
    words, _, module = PROGRAMS[kind]
    alone = subprocess.run(
        [sys.executable, "tool_module.py", "adapter"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert alone.returncode == 1 and "KeyError: 'DOWSER'" in alone.stderr
    start = "import sys, importlib; sys.exit(importlib.import_module('peft_dowser_cli').main())"
    command = [sys.executable, "-c", start, "run", "--", *words, "adapter"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path}
    )
    assert found.stdout == f"DowserConfig {module}\n", found.stderr
    assert found.returncode == 3


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, for programs that run in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv[:])
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield tmp_path
    for name in ("tool_module", "neighbor"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_gets_its_arguments_and_its_exit_code_is_passed_on(
    kind: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    programs_in(folder, SAYS)
    if kind == "console script":
        sys.path.insert(0, str(folder))
    words, name, module = PROGRAMS[kind]
    try:
        code = main(["run", "--", *words, "--json", "--", "-m", "x"])
    except SystemExit as end:
        code = end.code
    assert code == 3
    assert capsys.readouterr().out == f"{name} --json -- -m x {module} neighbor\n"


def test_a_script_elsewhere_finds_the_modules_of_its_folder(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "scripts").mkdir()
    programs_in(folder / "scripts", SAYS)
    with pytest.raises(SystemExit):
        main(["run", "scripts/tool_module.py"])
    assert capsys.readouterr().out == "tool_module.py __main__ neighbor\n"


def test_a_script_that_ends_without_an_exit_code_has_succeeded(folder: Path) -> None:
    (folder / "quiet.py").write_text("x = 1")
    assert main(["run", "--", "quiet.py"]) == 0


def test_the_errors_of_a_program_are_its_own(folder: Path) -> None:
    (folder / "failing.py").write_text("raise ValueError('mine')")
    with pytest.raises(ValueError, match="mine"):
        main(["run", "--", "failing.py"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Name the program to run after --, such as: peft-dowser run -- lm_eval --model hf"),
        (["--"], "Name the program to run after --, such as: peft-dowser run -- lm_eval --model hf"),
        (["--", "-m"], "Name the program to run after --, such as: peft-dowser run -- lm_eval --model hf"),
        (
            ["--", "lm_evil", "--model", "hf"],
            "'lm_evil' is not a console script of this environment, and not a file. Give a module as: run -- -m "
            "lm_evil",
        ),
        (["--", "-m", "no_module"], "There is no module 'no_module' in this environment or folder."),
        (["--", "-m", "no_package.part"], "There is no module 'no_package.part' in this environment or folder."),
        (["--", "-m", ".part"], "There is no module '.part' in this environment or folder."),
    ],
)
def test_a_program_that_is_not_there_is_named(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", *words]) == 2
    assert capsys.readouterr() == ("", f"peft-dowser: {message}\n")


def test_the_launcher_is_the_one_of_this_release() -> None:
    installed = importlib.import_module("peft_dowser_cli").__file__
    written = Path(__file__).parent.parent / "peft_dowser" / "launcher.py"
    assert Path(installed).read_text() == written.read_text(), "an older one is installed: pip install -e . again"
