"""Weight patches: with the patch a base has the bits of the merged model, and with the revert its own bits again."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same_bits, config, gpt2, seeded, set_values, tiny_llama, tiny_moe
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from peft_dowser import merge, read_patch, write_patch
from peft_dowser.cli import main

pytestmark = pytest.mark.usefixtures("offline")

PATCHES = "vllm/model_executor/model_loader/checkpoint_weight_patch.py"
# The fields of vLLM 0.33.0's `CheckpointWeightPatch`, in their order.
FIELDS = ("name", "shape", "dtype", "values", "indices")


def pair(folder: Path, make: Callable[[], PreTrainedModel], std: float = 0.05, **overrides) -> tuple[str, str]:
    """A base, in several files, and an adapter, saved."""
    base, adapter = str(folder / "base"), str(folder / "adapter")
    model = seeded(make)
    model.save_pretrained(base, max_shard_size="20KB")
    model.name_or_path = base
    tuned = get_peft_model(model, config(score="random", **overrides))
    set_values(tuned, std)
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 1
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    return base, adapter


def stored(folder: Path | str) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever its files."""
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def written(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors with a patch written into them, by plain indexing."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for patch in read_patch(path):
        assert (patch.shape, patch.dtype) == (tuple(tensors[patch.name].shape), tensors[patch.name].dtype)
        tensors[patch.name].view(-1)[patch.indices.long()] = patch.values
    return tensors


def bfloat16_llama() -> PreTrainedModel:
    return tiny_llama(torch.bfloat16)


def mixtral() -> PreTrainedModel:
    return tiny_moe("mixtral")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (tiny_llama, {}),
        (bfloat16_llama, {"std": 1e-3}),  # many values vanish
        (gpt2, {}),
        (mixtral, {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
        (tiny_llama, {"modules_to_save": ["lm_head"]}),
        (bfloat16_llama, {"granularity": "input_channel", "channels": 3}),
        (gpt2, {"granularity": "input_channel"}),  # whose weights are stored transposed
    ],
)
def test_a_patch_makes_the_merged_model_and_its_revert_the_base(
    make: Callable, fields: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base, adapter = pair(tmp_path, make, **fields)
    patch, revert = tmp_path / "patch.safetensors", tmp_path / "revert.safetensors"
    assert main(["patch", adapter, "-o", str(patch), "--revert", str(revert), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    merge(adapter, tmp_path / "merged")
    expected = stored(tmp_path / "merged")
    with_patch = written(stored(base), patch)
    assert_same_bits(with_patch, expected)
    assert_same_bits(written(with_patch, revert), stored(base))
    # It holds nothing that does not change, and all that does.
    changed = {name: int((expected[name] != tensor).sum()) for name, tensor in stored(base).items()}
    assert {one.name: len(one.values) for one in read_patch(patch)} == {name: n for name, n in changed.items() if n}
    assert told["values"] == sum(changed.values())
    assert told["bytes"] == patch.stat().st_size


def test_the_fields_and_dtypes_are_those_of_vllm(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path, bfloat16_llama)
    counts = write_patch(adapter, tmp_path / "patch")
    patches = read_patch(tmp_path / "patch")
    assert counts == {patch.name: len(patch.values) for patch in patches}
    for patch in patches:
        assert patch._fields == FIELDS
        assert patch.dtype is patch.values.dtype is torch.bfloat16
        assert patch.indices.dtype is torch.int32
        assert patch.values.dim() == patch.indices.dim() == 1
        assert bool((patch.indices.diff() > 0).all())


class Served(nn.Module):
    """A model of a server: it loads tensors of a checkpoint by name, as vLLM's models do."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            self.tensors[name].copy_(tensor)
            loaded.add(name)
        return loaded


def vllms_patches() -> Any:
    """The module of an installed vLLM that reads patches, alone: the package imports its GPU parts."""
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parents[1] / PATCHES
    spec = importlib.util.spec_from_file_location("checkpoint_weight_patch", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the files of vLLM, see .ci/run")
@pytest.mark.parametrize("make", [tiny_llama, bfloat16_llama])
def test_vllm_itself_writes_the_patch_and_its_revert(make: Callable, tmp_path: Path) -> None:
    base, adapter = pair(tmp_path, make)
    write_patch(adapter, tmp_path / "patch", revert=tmp_path / "revert")
    merge(adapter, tmp_path / "merged")
    vllm = vllms_patches()
    assert vllm.CheckpointWeightPatch._fields == FIELDS
    model = Served(stored(base))
    for name, expected in (("patch", stored(tmp_path / "merged")), ("revert", stored(base))):
        patches = [vllm.CheckpointWeightPatch(*patch) for patch in read_patch(tmp_path / name)]
        assert vllm.load_checkpoint_weight_patches(model, patches) == {patch.name for patch in patches}
        assert_same_bits(model.tensors, expected)


def test_the_code_in_the_text_about_patches_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for vLLM: an engine whose model is this one, and its loader as plain indexing."""
    base, adapter = pair(tmp_path, bfloat16_llama)
    monkeypatch.chdir(tmp_path)
    Path("my-adapter").symlink_to(adapter)
    served = Served(stored(base))

    class Engine:
        def __init__(self, model: str) -> None:
            assert model == "my-base"

        def apply_model(self, function: Callable) -> list:
            return [function(served)]

    def load(model: Served, patches: list) -> set[str]:
        for name, shape, dtype, values, indices in patches:
            assert model.tensors[name].shape == shape and model.tensors[name].dtype == dtype
            model.tensors[name].view(-1)[indices.long()] = values
        return set()

    loader: Any = type(sys)("checkpoint_weight_patch")
    loader.CheckpointWeightPatch, loader.load_checkpoint_weight_patches = lambda *fields: fields, load
    package: Any = type(sys)("vllm")
    package.LLM = Engine
    for name in ("vllm", "vllm.model_executor", "vllm.model_executor.model_loader"):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.model_loader.checkpoint_weight_patch", loader)
    text = (Path(__file__).parents[2] / "peft_dowser/files/PATCH.md").read_text()
    (command,) = re.findall(r"^    peft-dowser (patch .*)$", text, re.MULTILINE)
    assert main([*command.replace("my-base", base).split()]) == 0
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    merge(adapter, "merged")
    first, second = block.split("# and back\n")
    names: dict = {}
    exec(first, names)
    assert_same_bits(served.tensors, stored("merged"))
    exec(second, names)
    assert_same_bits(served.tensors, stored(base))


# Refusals


def test_nothing_is_written_where_the_adapter_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, adapter = pair(tmp_path, tiny_llama)
    tiny_llama(hidden=64).save_pretrained(tmp_path / "other")
    assert main(["patch", adapter, "--base", str(tmp_path / "other"), "-o", str(tmp_path / "patch")]) == 2
    assert "has a weight of shape (64, 128) here, the adapter was made for [32, 64]" in capsys.readouterr().err
    same = str(tmp_path / "patch")
    assert main(["patch", adapter, "-o", same, "--revert", same]) == 2
    assert f"The patch and its revert cannot be one file, '{same}'." in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("indices", lambda indices: indices.flip(0), "indices must be strictly increasing positions in a tensor of"),
        ("indices", lambda indices: indices + 10_000, "indices must be strictly increasing positions in a tensor of"),
        ("indices", lambda indices: indices - 10_000, "indices must be strictly increasing positions in a tensor of"),
        ("indices", lambda indices: indices.short(), "indices int32 or int64, got torch.float32 and torch.int16"),
        ("indices", lambda indices: indices[1:], "values and indices must be lists of one length"),
        ("values", lambda values: values * float("nan"), "values must not be NaN"),
        ("values", lambda values: values.int(), "values must be floating-point"),
    ],
)
def test_a_damaged_patch_is_refused(part: str, change: Callable, message: str, tmp_path: Path) -> None:
    _, adapter = pair(tmp_path, tiny_llama)
    write_patch(adapter, tmp_path / "patch")
    key = f"model.layers.0.mlp.up_proj.weight.{part}"
    with safe_open(tmp_path / "patch", framework="pt") as file:
        about = file.metadata()
    tensors = load_file(tmp_path / "patch")
    save_file(tensors | {key: change(tensors[key]).contiguous()}, tmp_path / "patch", metadata=about)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_patch(tmp_path / "patch")


def test_another_file_is_not_a_patch(tmp_path: Path) -> None:
    _, adapter = pair(tmp_path, tiny_llama)
    with pytest.raises(ValueError, match="is not a weight patch that this release reads"):
        read_patch(Path(adapter) / "adapter_model.safetensors")
    write_patch(adapter, tmp_path / "patch")
    with safe_open(tmp_path / "patch", framework="pt") as file:
        about = file.metadata()
    tensors = load_file(tmp_path / "patch")
    del tensors["model.layers.0.mlp.up_proj.weight.values"]
    save_file(tensors, tmp_path / "patch", metadata=about)
    with pytest.raises(ValueError, match="does not have indices and values of exactly the tensors that it names"):
        read_patch(tmp_path / "patch")
    with pytest.raises(OSError):
        read_patch(tmp_path / "none")
