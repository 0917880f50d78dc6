"""The manifest: written by every way of saving, another base noticed and a cast one not, newer formats refused."""

import hashlib
import importlib.resources
import json
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import adapted, config, edit_config, set_values, tiny_llama
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import peft_dowser
from peft_dowser import DeltaFormatError, DowserConfig, verify
from peft_dowser.cli import main
from peft_dowser.delta.format import base_sample, same_base

UP = "model.layers.1.mlp.up_proj"


def manifest(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())["manifest"]


def sample_by_hand(weight: Tensor) -> str:
    """FORMAT.md in Python integers."""
    flat = weight.flatten().tolist()
    at = [((i * 0x9E3779B97F4A7C15 % 2**64) * len(flat)) >> 64 for i in range(1, 17)]
    return struct.pack("<16f", *(flat[position] for position in at)).hex()


def edit_manifest(folder: Path, change: Callable[[dict], dict]) -> None:
    edit_config(folder, lambda found: found | {"manifest": change(found["manifest"])})


def silent(load) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Adapter cannot be set when the model is merged")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        load()


# Writing


def save_with_peft(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder)


def save_with_transformers(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder / "first")
    plain = tiny_llama()
    plain.load_adapter(str(folder / "first"))
    # What `save_pretrained` of transformers 5.24 does after refusing PEFT 0.21.
    tensors = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(plain).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    plain.peft_config["default"].save_pretrained(str(folder))


def save_while_merged(model: PeftModel, folder: Path) -> None:
    model.merge_adapter()
    model.save_pretrained(folder)


@pytest.mark.parametrize("save", [save_with_peft, save_with_transformers, save_while_merged])
def test_every_way_of_saving_writes_what_the_format_says(save, tmp_path: Path) -> None:
    save(adapted(), tmp_path)
    found = manifest(tmp_path)
    assert (found["format"], found["written_by"]) == (1, f"peft-dowser {peft_dowser.__version__}")
    weights = tiny_llama().state_dict()
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        assert len(found["modules"]) == len(list(file.keys())) / 2 == 14
        for name, entry in found["modules"].items():
            start = f"base_model.model.{name}.dowser_"
            values, code = file.get_tensor(f"{start}values.weight"), file.get_tensor(f"{start}index.code")
            assert entry == {
                "shape": list(weights[f"{name}.weight"].shape),
                "nnz": values.numel(),
                "code_sha256": hashlib.sha256(bytes(code.tolist())).hexdigest(),
                "values_sha256": hashlib.sha256(struct.pack(f"<{values.numel()}f", *values.tolist())).hexdigest(),
                "base_sample": sample_by_hand(weights[f"{name}.weight"]),
            }


def test_a_later_save_has_its_own_digests(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(save_dtype="bfloat16")
    model.save_pretrained(tmp_path / "1")
    set_values(model, seed=1)
    model.save_pretrained(tmp_path / "2")
    assert (
        manifest(tmp_path / "1")["modules"][UP]["values_sha256"]
        != manifest(tmp_path / "2")["modules"][UP]["values_sha256"]
    )
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "2", is_trainable=True)
    assert again.peft_config["default"].to_dict()["manifest"] is None
    set_values(again, seed=2)
    again.save_pretrained(tmp_path / "3")
    assert [verify(tmp_path / number, tmp_path / "base") for number in "123"] == [[], [], []]


def test_the_specification_is_in_the_package() -> None:
    text = (importlib.resources.files("peft_dowser.delta") / "FORMAT.md").read_text()
    assert text.startswith("# The format of a saved Dowser adapter, version 1\n")


# The base


@pytest.mark.parametrize("made_on", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("loaded_on", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_base_is_the_same_base(made_on: torch.dtype, loaded_on: torch.dtype, tmp_path: Path) -> None:
    adapted(tiny_llama(made_on)).save_pretrained(tmp_path)
    silent(lambda: PeftModel.from_pretrained(tiny_llama(loaded_on), tmp_path))
    silent(lambda: PeftModel.from_pretrained(tiny_llama(loaded_on).to(made_on), tmp_path))


def other_seed() -> nn.Module:
    return tiny_llama(seed=1)


def trained_further() -> nn.Module:
    model = tiny_llama()
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


def has_it_merged_in() -> nn.Module:
    return adapted(update_ratio=0.5).merge_and_unload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [other_seed, trained_further, has_it_merged_in])
def test_another_base_is_one_warning_and_an_error_of_verify(
    other, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapted(update_ratio=0.5).save_pretrained(tmp_path / "adapter")
    base = other().to(dtype)
    base.save_pretrained(tmp_path / "base")
    message = r"^Adapter 'default' was made for other weights than this base model has in 14 of 14 modules: 'model\."
    with pytest.warns(UserWarning, match=message) as caught:
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert sum("other weights" in str(warning.message) for warning in caught) == 1
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    (problem,) = report["problems"]
    assert not report["ok"]
    assert "was made for other weights than this base model has in 14 of 14 modules" in problem
    with pytest.warns(UserWarning, match="was made for other weights"):
        peft_dowser.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")


def test_one_swapped_module_is_named(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight.data.neg_()
    with pytest.warns(UserWarning, match=rf"in 1 of 14 modules: '{UP}'\. The base is another checkpoint"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_merged_adapter_does_not_make_the_base_another_one(tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    model = adapted(update_ratio=1.0, score="random")
    model.merge_adapter()
    silent(lambda: model.load_adapter(tmp_path, "second"))


def test_conv1d_is_described_as_it_is_stored(tmp_path: Path) -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32))
    get_peft_model(base, config(score="random")).save_pretrained(tmp_path)
    assert manifest(tmp_path)["modules"]["transformer.h.0.attn.c_attn"]["shape"] == [16, 48]


@pytest.mark.parametrize("make", [torch.zeros, torch.ones, torch.randn])
@pytest.mark.parametrize("numel", [1, 5, 1000])
def test_a_sample_is_that_of_the_specification(make, numel: int) -> None:
    weight = make(numel)
    assert base_sample(weight) == sample_by_hand(weight)
    assert base_sample(weight.to("meta")) is None
    assert base_sample(weight.to(torch.int8)) is None


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 0.02, 100.0])
def test_casts_of_one_weight_match_in_every_pair_and_others_do_not(scale: float) -> None:
    weight = scale * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    casts = [weight, weight.bfloat16(), weight.half()]
    samples = [base_sample(cast) for cast in casts] + [base_sample(casts[0].double())]
    others = [base_sample(cast.roll(1)) for cast in casts]
    if scale > 1e-8:  # below, float16 holds zeros only
        assert all(same_base(one, other) for one in samples for other in samples)
        assert not any(same_base(one, other) for one in samples for other in others)


# Files that were edited, and those of other releases


def strip(saved: dict) -> dict:
    return {key: value for key, value in saved.items() if key != "manifest"}


def test_a_file_without_a_manifest_loads(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(strip(json.loads(path.read_text()))))
    silent(lambda: PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path))
    assert verify(tmp_path, tmp_path / "base") == []


def with_transformers(folder: Path) -> None:
    tiny_llama().load_adapter(str(folder))


def with_peft(folder: Path) -> None:
    PeftModel.from_pretrained(tiny_llama(), folder)


def with_auto(folder: Path) -> None:
    AutoPeftModelForCausalLM.from_pretrained(folder)


def as_second(folder: Path) -> None:
    adapted(score="random").load_adapter(folder, "second")


def with_its_config(folder: Path) -> None:
    DowserConfig.from_pretrained(folder)


@pytest.mark.parametrize("load", [with_transformers, with_peft, with_auto, as_second, with_its_config])
def test_a_newer_format_is_refused_by_name_everywhere(load, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    adapted().save_pretrained(tmp_path)
    edit_manifest(tmp_path, lambda _: {"format": 2, "written_by": "peft-dowser 9.0", "sections": []})
    message = (
        "the adapter is in format 2, written by 'peft-dowser 9.0'; this release of peft-dowser reads up to format 1"
    )
    with pytest.raises(DeltaFormatError, match=message):
        load(tmp_path)
    for command in ("verify", "inspect"):
        capsys.readouterr()
        assert main([command, str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


ENTRY = {"nnz": 205, "shape": [64, 32], "code_sha256": "0", "values_sha256": "0", "base_sample": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [32, 64]}, rf"'{UP}' has a weight of shape \(64, 32\) here, the adapter was made for \[32, 64\]\."),
        ({"shape": [2**20, 2**20]}, r"here, the adapter was made for \[1048576, 1048576\]\. It belongs to another"),
        ({"shape": None}, "here, the adapter was made for None"),
        ({"nnz": 204}, rf"'{UP}' has 205 values, its manifest says 204\. .* are not of one save"),
        ({"base_sample": "00"}, rf"the manifest of module '{UP}' is damaged"),
        ({"base_sample": "x" * 128}, rf"the manifest of module '{UP}' is damaged"),
        ({"base_sample": 3}, rf"the manifest of module '{UP}' is damaged"),
        ({"code_sha256": None}, rf"the manifest of module '{UP}' is damaged"),
        ({"code_sha256": "00"}, rf"module '{UP}': the index code is not the one that the manifest in adapter_config"),
    ],
)
def test_an_edited_entry_is_refused_before_anything_changes(change: dict, message: str, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    edit_manifest(tmp_path, lambda saved: saved | {"modules": {**saved["modules"], UP: saved["modules"][UP] | change}})
    base = tiny_llama()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(DeltaFormatError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names


@pytest.mark.parametrize("change", [lambda m: {"x": ENTRY} | m, lambda m: {k: v for k, v in m.items() if k != UP}])
def test_a_manifest_of_other_modules_is_refused(change, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    edit_manifest(tmp_path, lambda saved: saved | {"modules": change(saved["modules"])})
    with pytest.raises(DeltaFormatError, match=rf"its manifest and its counts disagree on '(x|{UP})'\. adapter_config"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


def test_files_of_two_saves_are_noticed(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(score="random")
    model.save_pretrained(tmp_path / "1")
    set_values(model, seed=1)
    model.save_pretrained(tmp_path / "2")
    adapted(score="random", seed=1).save_pretrained(tmp_path / "3")
    file = "adapter_model.safetensors"
    (tmp_path / "1" / file).write_bytes((tmp_path / "2" / file).read_bytes())
    problems = verify(tmp_path / "1", tmp_path / "base")
    assert len(problems) == 14
    assert all("the values are not those that its manifest describes" in problem for problem in problems)
    (tmp_path / "1" / file).write_bytes((tmp_path / "3" / file).read_bytes())
    with pytest.raises(DeltaFormatError, match="the two files are not of one save, or were edited"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "1")


def test_a_flipped_bit_in_the_values_is_found_by_verify(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    values = tensors[f"base_model.model.{UP}.dowser_values.weight"].view(torch.uint8)
    values[5] ^= 1
    save_file(tensors, path)
    (problem,) = verify(tmp_path, tmp_path / "base")
    assert f"module '{UP}': the values are not those" in problem


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_code_is_decoded_once(low_cpu_mem_usage: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted().save_pretrained(tmp_path)
    calls = []
    decode = peft_dowser.delta.format.decode
    monkeypatch.setattr(peft_dowser.delta.format, "decode", lambda *args: calls.append(1) or decode(*args))
    PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert len(calls) == 14


def test_a_weight_is_sampled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted().save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(peft_dowser.base.target, "base_sample", lambda weight: calls.append(1) or base_sample(weight))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert len(calls) == 14
    layer = model.get_submodule(f"base_model.model.{UP}")
    assert layer.base_sample == base_sample(tiny_llama().get_submodule(UP).weight)
