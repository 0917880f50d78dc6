"""A default device that is not that of the weights: every path works under it, and gives the same bits.

The device without data stands for a GPU: whatever is made on it by mistake cannot be used.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import GRANULARITIES
from models import IDS, assert_same_bits, config, logits, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_dowser import Patch, ProbeStatistics, extract, hotswap, merge, probe, verify
from peft_dowser.config import Score
from peft_dowser.evaluation.texts import read_prompts
from peft_dowser.files.inspection import diff, inspect
from peft_dowser.layers.layer import dowser_layers
from peft_dowser.report.page import report
from peft_dowser.report.plot import delta_map, importance_map, mask_density


@pytest.fixture
def meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.fixture(scope="module", params=GRANULARITIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters and a tuned model; its name is the granularity of the adapters."""
    path = tmp_path_factory.mktemp("saved") / request.param
    tiny_llama().save_pretrained(path / "base")
    probe(tiny_llama(), config(score="gradient")).save(path / "statistics.safetensors")
    for seed, name in enumerate(("first", "second")):
        model = get_peft_model(tiny_llama(), config(seed=seed, granularity=request.param))
        set_values(model, seed=seed)
        model.save_pretrained(path / name)
    model.merge_and_unload().save_pretrained(path / "tuned")
    return path


def positions(model: nn.Module) -> dict[str, Tensor]:
    return {layer.module_name: layer.index("default").decoded() for layer in dowser_layers(model)}


def loaded(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(base, folder / "first", torch_device="cpu").eval()
    model.load_adapter(folder / "second", "second", torch_device="cpu")
    found = {"first": logits(model)}
    model.set_adapter("second")
    found["second"] = logits(model)
    hotswap(model, folder / "first", "second")
    found["swapped"] = logits(model)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")
    model.merge_adapter(["both"], safe_merge=True)
    found["merged"] = logits(model)
    model.unmerge_adapter()
    return found


def patched(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    with Patch(base, folder / "first"):
        return {"logits": logits(base)}


def trained(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(base, folder / "first", torch_device="cpu", is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {layer.module_name: layer.values("default").grad for layer in dowser_layers(model)}


def probed(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    prompts = [[3, 4, 5, 6], torch.tensor([9, 8, 7], device="cpu")]
    return {name: module.sensitivity for name, module in probe(base, config(), prompts=prompts).modules.items()}


def chosen(score: str, base: nn.Module, folder: Path) -> dict[str, Tensor]:
    statistics = str(folder / "statistics.safetensors")
    return positions(get_peft_model(base, config(score=score, granularity=folder.name, statistics=statistics)))


def merged_files(folder: Path, output: Path) -> dict[str, Tensor]:
    merge(folder / "first", output / "merged", folder / "base")
    assert verify(folder / "first", folder / "base", output / "merged") == []
    return load_file(output / "merged" / "model.safetensors")


def extracted(folder: Path, output: Path) -> dict[str, Tensor]:
    extract(folder / "base", folder / "tuned", output / "extracted", update_ratio=0.05)
    return load_file(output / "extracted" / "adapter_model.safetensors")


PATHS: dict[str, Callable[[nn.Module, Path], dict[str, Tensor]]] = {
    "loaded": loaded,
    "patched": patched,
    "trained": trained,
    "probed": probed,
    **{score: partial(chosen, score) for score in get_args(Score)},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_model_in_memory(path: str, folder: Path) -> None:
    expected, base = PATHS[path](tiny_llama(), folder), tiny_llama()
    with torch.device("meta"):
        found = PATHS[path](base, folder)
    assert found
    assert_same_bits(found, expected)


@pytest.mark.parametrize("work", [merged_files, extracted])
def test_files(work: Callable[[Path, Path], dict[str, Tensor]], folder: Path, tmp_path: Path) -> None:
    expected = work(folder, tmp_path / "expected")
    with torch.device("meta"):
        found = work(folder, tmp_path / "found")
    assert_same_bits(found, expected)


def test_what_is_told_of_files(folder: Path, tmp_path: Path) -> None:
    statistics = ProbeStatistics.load(folder / "statistics.safetensors")

    def told() -> list[Any]:
        importance_map(statistics)
        delta_map(folder / "first")
        mask_density(folder / "first", "model.layers.0.mlp.up_proj")
        report(folder / "first", tmp_path / "report.html")
        return [inspect(folder / "first", folder / "base"), diff(folder / "first", folder / "second")]

    expected = told()
    with torch.device("meta"):
        assert told() == expected


def test_texts_of_token_ids(meta: None) -> None:
    (prompt,) = read_prompts([[3, 4, 5]], None, 8, "this test")
    assert prompt["input_ids"].tolist() == [[3, 4, 5]]
