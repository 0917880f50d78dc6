"""The cache of probes: used where a probe would give the same bits, and nowhere else."""

import dataclasses
import errno
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from models import config, tiny_llama
from peft import get_peft_model
from torch import Tensor, nn

from peft_dowser import DowserLayer, ProbeStatistics, probe
from peft_dowser.probing import cache, run
from peft_dowser.probing.passes import Passes
from peft_dowser.probing.ranks import Ranks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that is on, and empty."""
    monkeypatch.setenv("DOWSER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[Passes]:
    """The passes that are run."""
    passes: list[Passes] = []
    statistics = Passes.statistics

    def noted(self: Passes) -> dict:
        passes.append(self)
        return statistics(self)

    monkeypatch.setattr(Passes, "statistics", noted)
    return passes


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def positions(model: nn.Module, adapter_name: str = "default") -> list[Tensor]:
    return [m.index(adapter_name).decoded() for m in model.modules() if isinstance(m, DowserLayer)]


def assert_same(one: ProbeStatistics, other: ProbeStatistics) -> None:
    assert (one.info, one.samples, list(one.modules)) == (other.info, other.samples, list(other.modules))
    for name, module in one.modules.items():
        for part, tensor in vars(module).items():
            same = vars(other.modules[name])[part]
            assert tensor is same is None or torch.equal(tensor, same), (name, part)


@pytest.mark.parametrize("score", ["dowser", "activity", "gradient"])
def test_what_was_probed_once_is_read(score: str, folder: Path, probed: list, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "peft_dowser")
    model = tiny_llama(layers=11)  # by name, layer 10 comes before layer 2
    first = probe(model, config(score=score))
    (path,) = files(folder)
    assert f"are cached in '{path}'" in caplog.text
    caplog.clear()
    assert_same(probe(tiny_llama(layers=11), config(score=score)), first)
    assert len(probed) == 1
    assert f"were read from the cache, and not probed: '{path}'" in caplog.text
    assert len(files(folder)) == 1


@pytest.mark.parametrize(("full", "cheap"), [("shift", "activity"), ("dowser", "wanda"), ("gradient", "activity")])
def test_a_full_probe_serves_one_of_forwards_only(full: str, cheap: str, folder: Path, probed: list) -> None:
    probe(tiny_llama(), config(score=full))
    served = probe(tiny_llama(), config(score=cheap, num_rademacher=5))
    assert len(probed) == 1
    for path in files(folder):
        path.unlink()
    assert_same(served, probe(tiny_llama(), config(score=cheap)))
    assert len(probed) == 2
    assert served.info.num_rademacher == 0


@pytest.mark.parametrize("full", ["dowser", "shift", "gradient"])
def test_a_probe_of_forwards_only_serves_no_other(full: str, folder: Path, probed: list) -> None:
    probe(tiny_llama(), config(score="activity"))
    found = probe(tiny_llama(), config(score=full))
    assert len(probed) == 2
    assert all(module.sensitivity is not None for module in found.modules.values())
    assert probe(tiny_llama(), config(score="wanda")).info.num_rademacher == 0  # its own comes first
    assert len(probed) == 2
    assert len(files(folder)) == 2


def test_a_damaged_full_probe_is_no_help(folder: Path, probed: list, caplog: pytest.LogCaptureFixture) -> None:
    probe(tiny_llama(), config())
    (path,) = files(folder)
    path.write_bytes(b"no statistics")
    found = probe(tiny_llama(), config(score="activity"))
    assert len(probed) == 2
    assert f"'{path}' cannot be used" in caplog.text
    assert_same(probe(tiny_llama(), config(score="activity")), found)
    assert len(probed) == 2


def test_adapters_of_one_base_share_a_probe(folder: Path, probed: list) -> None:
    base = tiny_llama()
    expected = positions(get_peft_model(tiny_llama(), config()))
    model = get_peft_model(base, config())
    model.add_adapter("other", config())
    model.add_adapter("wider", config(update_ratio=0.5, save_dtype="bfloat16"))
    assert len(probed) == 1
    for name in ("default", "other"):
        assert all(torch.equal(a, b) for a, b in zip(positions(model, name), expected, strict=True))


def swap(model: nn.Module) -> None:
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight").data
    weight[[4, 9]] = weight[[9, 4]]


def nudge(model: nn.Module) -> None:
    """One bit of one weight that is no target."""
    model.get_parameter("model.embed_tokens.weight").data.view(torch.int32)[7, 3] ^= 1


@pytest.mark.parametrize("change", [swap, nudge])
def test_other_weights_are_probed(change, folder: Path, probed: list) -> None:
    for changes in (lambda model: None, change):
        changes(model := tiny_llama())
        probe(model, config())
    assert len(probed) == 2
    assert len(files(folder)) == 2


def test_another_dtype_attention_or_end_token_is_probed(folder: Path, probed: list) -> None:
    eager, ending = tiny_llama(), tiny_llama()
    eager.set_attn_implementation("eager")
    ending.generation_config.eos_token_id = 3
    for number, model in enumerate([tiny_llama(), tiny_llama(torch.bfloat16), eager, ending], 1):
        probe(model, config())
        assert len(probed) == number


@pytest.mark.parametrize(
    "setting",
    [
        {"seed": 1},
        {"num_probes": 3},
        {"num_rademacher": 1},
        {"probe_length": 10},
        {"probe_batch_size": 1},
        {"score": "gradient"},
        {"target_modules": ["up_proj"]},
    ],
)
def test_another_setting_is_probed(setting: dict, folder: Path, probed: list) -> None:
    probe(tiny_llama(), config())
    probe(tiny_llama(), config(**setting))
    assert len(probed) == 2


@pytest.mark.parametrize("word", ["off", "OFF"])
def test_without_the_cache_every_probe_runs(
    word: str, tmp_path: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOWSER_CACHE", word)
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        probe(tiny_llama(), config())
    assert len(probed) == 2
    assert not files(tmp_path)


def test_the_cache_is_in_the_folder_of_hugging_face(
    tmp_path: Path, probed: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DOWSER_CACHE")
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path))
    for _ in range(2):
        probe(tiny_llama(), config())
    assert len(probed) == 1
    assert files(tmp_path) == [tmp_path / "dowser"]


def test_what_a_digest_cannot_tell_is_not_cached(folder: Path, probed: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        probe(tiny_llama(), config(), prompts=[[3, 4, 5]])
    hooked = tiny_llama()
    hooked.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    for _ in range(2):
        probe(hooked, config())
    in_step = dataclasses.replace(Ranks.of(tiny_llama()), in_step=True)
    monkeypatch.setattr(run.Ranks, "of", lambda model: in_step)
    for _ in range(2):
        probe(tiny_llama(), config())
    assert len(probed) == 6
    assert not folder.exists()


@pytest.mark.parametrize("damage", [b"", b"no statistics", None])
def test_a_damaged_file_is_mentioned_and_replaced(
    damage: bytes | None, folder: Path, probed: list, caplog: pytest.LogCaptureFixture
) -> None:
    first = probe(tiny_llama(), config())
    (path,) = files(folder)
    if damage is None:  # the statistics of another base under this name
        probe(tiny_llama(seed=1), config()).save(path)
    else:
        path.write_bytes(damage)
    runs = len(probed)
    assert_same(probe(tiny_llama(), config()), first)
    assert len(probed) == runs + 1
    (record,) = [record for record in caplog.records if record.name == cache.__name__]
    assert record.getMessage().startswith(f"Probing again, because the cached statistics '{path}' cannot be used: ")
    assert_same(ProbeStatistics.load(path), ProbeStatistics.load(path))
    assert_same(probe(tiny_llama(), config()), first)
    assert len(probed) == runs + 1


def test_a_full_disk_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = positions(get_peft_model(tiny_llama(), config(score="dowser")))
    for path in files(folder):
        path.unlink()

    def full(self: ProbeStatistics, path: Path) -> None:
        path.write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ProbeStatistics, "save", full)
    found = positions(get_peft_model(tiny_llama(), config()))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    (record,) = [record for record in caplog.records if record.name == cache.__name__]
    assert record.levelname == "WARNING"
    assert "No space left on device" in record.getMessage()
    assert not files(folder)


def test_writers_and_readers_at_once_see_whole_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = probe(tiny_llama(), config())
    (path,) = files(folder)

    def work(number: int) -> ProbeStatistics | None:
        if number % 2:
            cache.write(first, path)
        return cache.read([path], list(first.modules), first.samples)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, range(48)):
            assert found is not None
            assert_same(found, first)
    assert files(folder) == [path]
    assert not caplog.records


def test_the_oldest_files_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(tiny_llama(), config())
    (oldest,) = files(folder)
    size = oldest.stat().st_size
    os.utime(oldest, (1, 1))
    (other := folder / "model.safetensors").write_bytes(b"0" * 3 * size)
    os.utime(other, (0, 0))
    monkeypatch.setattr(cache, "_LIMIT", int(2.5 * size))
    probe(tiny_llama(), config(seed=1))
    assert oldest in files(folder)
    probe(tiny_llama(), config(seed=2))
    assert len(files(folder)) == 3
    assert other in files(folder)
    assert oldest not in files(folder)
    monkeypatch.setattr(cache, "_LIMIT", size // 2)
    kept = files(folder)
    probe(tiny_llama(), config(seed=3))
    assert files(folder) == kept
