"""Names in a stranger's files: whatever they hold, a terminal, a page and a message show them and do nothing else."""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_files import CONFIG, FILE, edit_file
from huggingface_hub import ModelCard
from models import config, edit_config, set_values, tiny_llama
from peft import PeftModel, get_peft_model

from peft_dowser import DeltaFormatError, DowserConfig, Patch, extract, hotswap, merge, verify
from peft_dowser.cli import main
from peft_dowser.delta.codec import encode
from peft_dowser.delta.format import digest, few, printable, quoted
from peft_dowser.files.inspection import diff, inspect
from peft_dowser.report.page import report
from peft_dowser.report.plot import mask_density, retention_plasticity

MODULE = "model.layers.0.self_attn.q_proj"
EVIL = {
    "escape": "\x1b[2J\x1b]0;owned\x07",
    "line": "x\r\nOK: 'good' fits its base.\n",
    "one byte": "\x9b2J",
    "direction": "safe\u202egnp.exe",
    "separator": "x\u2028OK: 'good'",
    "surrogate": "\udc80",
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_llama(layers=1).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter_of(folder: Path, base: Path) -> Path:
    model = tiny_llama(layers=1)
    model.name_or_path = model.config._name_or_path = str(base)
    model = get_peft_model(model, config(score="random", target_modules=["q_proj", "v_proj"]))
    set_values(model)
    model.save_pretrained(folder)
    return folder


def renamed(folder: Path, name: str) -> None:
    """Call a module otherwise, wherever the adapter names it."""
    edit_file(folder, lambda found: {key.replace(MODULE, name): tensor for key, tensor in found.items()})

    def rename(found: dict) -> None:
        for by_module in (found["nnz_pattern"], found["manifest"]["modules"]):
            by_module[name] = by_module.pop(MODULE)

    edit_config(folder, rename)


def unbased(folder: Path, name: str) -> None:
    edit_config(folder, lambda found: found | {"base_model_name_or_path": name})


def unrevised(folder: Path, name: str) -> None:
    edit_config(folder, lambda found: found | {"revision": name})


def miscounted(folder: Path, name: str) -> None:
    edit_config(folder, lambda found: found["nnz_pattern"].__setitem__(name, 3))


def targeting(folder: Path, name: str) -> None:
    edit_config(folder, lambda found: found | {"target_modules": [name], "ratio_pattern": {name: 7}})


def damaged(folder: Path, name: str) -> None:
    """A module of that name whose values are not finite."""
    renamed(folder, name)
    edit_file(folder, lambda found: {key: t.fill_(torch.nan) if "values" in key else t for key, t in found.items()})


EDITS = [renamed, unbased, unrevised, miscounted, targeting, damaged]


def harmless(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text) and not re.search(r"^OK", text, re.MULTILINE)


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_the_commands_show_names_and_obey_none(
    edit: Callable[[Path, str], None], name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = edit is renamed or name == EVIL["escape"]  # a report of every edit and of every name, but not of all pairs
    if name == "\udc80" and edit in (renamed, damaged):
        name = "\x85"  # safetensors writes no other names than those of UTF-8
    folder, good = adapter_of(tmp_path / "evil", base), adapter_of(tmp_path / "good", base)
    edit(folder, name)
    capsys.readouterr()
    for command in (
        ["inspect", str(folder)],
        ["inspect", str(folder), "--base", str(base)],
        ["diff", str(folder), str(good)],
        ["diff", str(good), str(folder)],
        ["merge", str(folder), "-o", str(tmp_path / "merged")],
        ["merge", str(folder), "-o", str(tmp_path / "other"), "--base", str(base)],
        ["verify", str(folder)],
        *([["report", str(folder), "-o", str(tmp_path / "page.html")]] if drawn else []),
    ):
        result = main(command)
        captured = capsys.readouterr()
        if command[0] != "verify" or result:
            assert harmless(captured.out), captured.out
        assert harmless(re.sub(r"\r?(Merging|Loading|Verifying)[^\n\r]*", "", captured.err)), captured.err


@pytest.mark.parametrize("name", EVIL.values(), ids=EVIL)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_no_message_has_more_than_text_in_it(
    edit: Callable[[Path, str], None], name: str, base: Path, tmp_path: Path
) -> None:
    if name == "\udc80" and edit in (renamed, damaged):
        name = "\x85"
    folder, good = adapter_of(tmp_path / "evil", base), adapter_of(tmp_path / "good", base)
    edit(folder, name)
    model = PeftModel.from_pretrained(tiny_llama(layers=1), good)
    for call in (
        lambda: Patch(tiny_llama(layers=1), folder),
        lambda: hotswap(model, folder),
        lambda: PeftModel.from_pretrained(tiny_llama(layers=1), folder),
        lambda: inspect(folder),
        lambda: diff(folder, good),
        lambda: merge(folder, tmp_path / "merged"),
        lambda: merge(folder, tmp_path / "other", base=base),
        lambda: verify(folder),
    ):
        try:
            call()
        except ValueError as error:
            assert harmless(str(error)), error


@pytest.mark.parametrize("dtype", ["\x1b[2J", "F32\nOK"])
def test_what_safetensors_says_of_a_file_is_text_only(
    dtype: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = adapter_of(tmp_path / "evil", base)
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / FILE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 2
    assert harmless(capsys.readouterr().err)
    with pytest.raises(DeltaFormatError, match="not a readable safetensors file") as caught:
        inspect(folder)
    assert harmless(str(caught.value))


def test_what_extract_says_of_a_checkpoint_is_text_only(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "tuned")
    index = {"weight_map": {"a": "\x1b[2J.safetensors"}}
    (tmp_path / "tuned" / "model.safetensors").unlink()
    (tmp_path / "tuned" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=re.escape(r"such as '\x1b[2J.safetensors'")):
        extract(base, tmp_path / "tuned", tmp_path / "out")


def test_a_name_is_quoted_as_it_is_where_it_is_one() -> None:
    assert quoted("model.layers.0.größe") == "'model.layers.0.größe'"
    assert quoted("x" * 1000) == f"'{'x' * 100}'"
    assert printable("a\x1b\nb\u202e") == r"a\x1b\nb\u202e"
    assert few(["a\n"] * 7) == r"'a\n', 'a\n', 'a\n', 'a\n', 'a\n' and 2 more"


@pytest.mark.parametrize(
    "name", ["evil\n\n<img src=x>\n# Heading", "<b>x</b>", "[x](http://x)", "x" * 5000, "../base", "C:\\models\\base"]
)
def test_a_card_names_ids_of_the_hub_only(name: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(layers=1), config(score="random", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_text()
    DowserConfig(base_model_name_or_path=name, score="random").complete_card(tmp_path)
    after = ModelCard.load(tmp_path / "README.md")
    assert name not in after.text and "base model" not in after.text
    DowserConfig(base_model_name_or_path="someone/base", score="random").complete_card(tmp_path)
    assert "- base model: someone/base\n" in (tmp_path / "README.md").read_text()
    assert len(before) > 100


def claiming(folder: Path, shape: tuple[int, int]) -> None:
    """Let the manifest of an adapter of one module and one value claim a shape, with a code of that shape."""
    code = encode(torch.tensor([5]), shape[0] * shape[1])
    values = torch.ones(1)

    def change(found: dict) -> None:
        found["nnz_pattern"] = {MODULE: 1}
        entry = found["manifest"]["modules"][MODULE]
        entry |= {"shape": list(shape), "nnz": 1, "code_sha256": digest(code), "values_sha256": digest(values)}
        found["manifest"]["modules"] = {MODULE: entry}

    stem = f"base_model.model.{MODULE}.dowser_"
    edit_file(folder, lambda _: {f"{stem}index.code": code, f"{stem}values.weight": values})
    edit_config(folder, change)


@pytest.mark.parametrize("shape", [(2**24, 8), (8, 2**24), (2**31 - 1, 2), (2, 2**47), (2**49, 1)])
def test_a_report_takes_no_memory_for_what_a_manifest_claims(
    shape: tuple[int, int], base: Path, tmp_path: Path
) -> None:
    folder = adapter_of(tmp_path / "evil", base)
    claiming(folder, shape)
    assert (folder / FILE).stat().st_size + (folder / CONFIG).stat().st_size < 10_000
    begin = time.perf_counter()
    report(folder, tmp_path / "page.html")
    assert time.perf_counter() - begin < 20


def test_a_shape_that_no_weight_has_is_refused(base: Path, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "evil", base)
    claiming(folder, (2**25, 2**25))
    with pytest.raises(ValueError, match="which no weight has"):
        diff(folder, folder)


@pytest.mark.parametrize("name", [r"$\frac{$", "$x$", "a$b$c_{"])
def test_a_picture_shows_names_as_they_are(name: str, base: Path, tmp_path: Path) -> None:
    folder = adapter_of(tmp_path / "evil", base)
    renamed(folder, name)
    report(folder, tmp_path / "page.html")
    figure = mask_density(folder, name)
    figure.savefig(tmp_path / "density.png")
    assert name in [axes.get_title() for axes in figure.axes]
    retention_plasticity({name: [(0.5, 0.5)]}).savefig(tmp_path / "points.png")
