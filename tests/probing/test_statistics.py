"""Statistics on disk: exact, small, checked on the way in, and as good as a probe."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from models import config, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import peft_dowser.tuner.injection
from peft_dowser import DowserConfig, DowserLayer, ProbeStatistics, probe
from peft_dowser.probing.statistics import ProbeInfo

MODULE = "model.layers.0.mlp.down_proj"
N, OUT, IN = 4, 32, 64


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of statistics of the small model, with a gradient."""
    path = tmp_path_factory.mktemp("statistics") / "probe.safetensors"
    probe(tiny_llama(), config(score="gradient")).save(path)
    return str(path)


def contents(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {m.module_name: m.dowser_index["default"].positions for m in model.modules() if isinstance(m, DowserLayer)}


# What is told of them


def test_they_show_themselves_in_one_line() -> None:
    found = probe(tiny_llama(), config(seed=3))
    size = sum(
        tensor.nbytes for module in found.modules.values() for tensor in vars(module).values() if tensor is not None
    )
    assert repr(found) == f"ProbeStatistics(14 modules, N=4, R=2, T=12, seed=3, {size / 1e6:.1f} MB)"


def card_line(folder: Path, fact: str) -> str:
    return next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith(f"- {fact}: "))


@pytest.mark.parametrize("given", [False, True])
def test_a_saved_adapter_tells_how_its_statistics_were_made(
    given: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, prompts = tmp_path / "probe.safetensors", [torch.arange(3, 3 + n) for n in (4, 7, 9)]
    probe(tiny_llama(), config(seed=5, num_rademacher=3), prompts=prompts if given else None).save(path)
    asked = config(seed=7, num_rademacher=3, num_probes=2, probe_length=32, statistics=str(path))
    model = get_peft_model(tiny_llama(), asked)
    notes = [record.getMessage() for record in caplog.records if "were made with" in record.getMessage()]
    made = "num_probes=3, probe_length=0, seed=5" if given else "num_probes=4, probe_length=12, seed=5"
    assert len(notes) == 1
    assert f"made with {made}, and the config asks for num_probes=2, probe_length=32, seed=7." in notes[0]
    first, second = tmp_path / "first", tmp_path / "second"
    model.save_pretrained(first)
    PeftModel.from_pretrained(tiny_llama(), first).save_pretrained(second)  # as the next one finds it
    for folder in (first, second):
        saved = json.loads((folder / "adapter_config.json").read_text())
        names = ("num_probes", "num_rademacher", "probe_length", "probe_images", "seed")
        assert [saved[name] for name in names] == ([3, 3, 0, 0.0, 5] if given else [4, 3, 12, 0.0, 5])
        expected = "N = 3, R = 3, prompts that were given" if given else "N = 4, R = 3, T = 12"
        assert card_line(folder, "probe") == f"- probe: {expected}"
        assert card_line(folder, "seed") == "- seed: 5"


def test_a_config_that_asks_for_nothing_of_its_own_is_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    probe(tiny_llama(), config(seed=5)).save(tmp_path / "probe.safetensors")
    get_peft_model(tiny_llama(), DowserConfig(statistics=str(tmp_path / "probe.safetensors")))
    assert not [record for record in caplog.records if "were made with" in record.getMessage()]


# The file


@pytest.mark.parametrize("score", ["dowser", "activity", "gradient"])
def test_what_is_saved_is_loaded_bit_for_bit(score: str, tmp_path: Path) -> None:
    expected = probe(tiny_llama(), config(score=score, seed=3))
    expected.save(tmp_path / "probe.safetensors")
    found = ProbeStatistics.load(tmp_path / "probe.safetensors")
    assert found.info == expected.info
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        assert (module.sensitivity is not None) == (score != "activity")
        assert (module.gradient is not None) == (score == "gradient")
        for field, tensor in vars(module).items():
            other = getattr(found.modules[name], field)
            assert other is tensor is None or (other.dtype == torch.float32 and torch.equal(other, tensor))


def test_a_file_of_forwards_only_says_so_and_is_half_as_large(tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    statistics = probe(tiny_llama(), config(score="wanda"))
    statistics.save(path)
    tensors, metadata = contents(str(path))
    assert json.loads(metadata["info"])["num_rademacher"] == 0
    assert {key.rpartition(":")[2] for key in tensors} == {"activity", "energy"}
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(
        4 * (4 + 1) * tiny_llama().get_submodule(name).in_features for name in statistics.modules
    )
    assert repr(ProbeStatistics.load(path)).startswith("ProbeStatistics(14 modules, N=4, R=0, T=12, seed=0, ")


@pytest.mark.parametrize("num_probes", [1, 4])
def test_the_file_grows_with_rows_and_columns_never_with_their_product(num_probes: int, tmp_path: Path) -> None:
    model, path = tiny_llama(hidden=128), tmp_path / "probe.safetensors"
    statistics = probe(model, config(num_probes=num_probes))
    statistics.save(path)
    content = path.read_bytes()
    header = int.from_bytes(content[:8], "little")
    shapes = [model.get_submodule(name).weight.shape for name in statistics.modules]
    assert len(content) - 8 - header == sum(4 * (num_probes * (out + width) + width) for out, width in shapes)
    assert header < 500 * len(shapes)
    assert len(content) < sum(out * width for out, width in shapes)


def test_saving_into_a_missing_folder_is_an_error(stored: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing/probe\.safetensors' cannot be written \(.*No such file or directory"):
        ProbeStatistics.load(stored).save(tmp_path / "missing" / "probe.safetensors")
    assert not list(tmp_path.iterdir())


def test_saving_in_the_place_of_a_folder_is_an_error(stored: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"'{tmp_path}' cannot be written"):
        ProbeStatistics.load(stored).save(tmp_path)
    assert not list(tmp_path.iterdir())


# Files that are refused


@pytest.mark.parametrize("damage", [lambda good: b"", lambda good: b"\xff" * 100, lambda good: good[:-100]])
def test_a_damaged_file_is_refused(damage, stored: str, tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    path.write_bytes(damage(Path(stored).read_bytes()))
    with pytest.raises(ValueError, match=rf"'{re.escape(str(path))}' is not a readable safetensors file \(.+\)\."):
        ProbeStatistics.load(path)


@pytest.mark.parametrize("name", ["none.safetensors", "."])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"No probe statistics at '{re.escape(str(tmp_path / name))}'"):
        ProbeStatistics.load(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": None}, r"holds no probe statistics\. Write them with ProbeStatistics\.save"),
        ({"format": "pt"}, r"holds no probe statistics\. Write them with ProbeStatistics\.save"),
        ({"version": "2"}, "written in format 2 of the probe statistics, this release reads format 1: upgrade"),
        ({"info": None}, r"lacks a part of the probe statistics \('info'\)"),
        ({"info": "{"}, "lacks a part of the probe statistics"),
        ({"info": "[]"}, "lacks a part of the probe statistics"),
        ({"info": json.dumps({"seed": 1})}, "lacks a part of the probe statistics .*base_model"),
        (
            {"info": json.dumps(vars(ProbeInfo("", N + 1, 2, 12, 0.0, 0)))},
            "statistics of module '.*have shapes that disagree",
        ),
    ],
)
def test_a_file_with_other_metadata_is_refused(change: dict, message: str, stored: str, tmp_path: Path) -> None:
    tensors, metadata = contents(stored)
    changed = {key: value for key, value in (metadata | change).items() if value is not None}
    save_file(tensors, tmp_path / "probe.safetensors", metadata=changed)
    with pytest.raises(ValueError, match="probe.safetensors'.*" + message):
        ProbeStatistics.load(tmp_path / "probe.safetensors")


@pytest.mark.parametrize("field", ["sensitivity", "gradient"])
def test_more_than_forwards_measure_is_refused_where_they_alone_ran(field: str, stored: str, tmp_path: Path) -> None:
    tensors, metadata = contents(stored)
    metadata["info"] = json.dumps(json.loads(metadata["info"]) | {"num_rademacher": 0})
    kept = {key: value for key, value in tensors.items() if key.endswith((":activity", ":energy"))}
    save_file(kept, tmp_path / "probe.safetensors", metadata=metadata)
    ProbeStatistics.load(tmp_path / "probe.safetensors")
    kept[f"{MODULE}:{field}"] = tensors[f"{MODULE}:{field}"]
    save_file(kept, tmp_path / "probe.safetensors", metadata=metadata)
    message = f"the statistics of module '{MODULE}' hold more than forwards measure, but the file says R = 0"
    with pytest.raises(ValueError, match=f"probe.safetensors': {message}: forwards only"):
        ProbeStatistics.load(tmp_path / "probe.safetensors")


SHAPES = f"the statistics of module '{MODULE}' have shapes that disagree"
DTYPE = f"the statistics of module '{MODULE}' are not float32"
VALUES = f"the statistics of module '{MODULE}'"


@pytest.mark.parametrize(
    ("field", "tensor", "message"),
    [
        ("sensitivity", None, "lacks a part of the probe statistics .*sensitivity"),
        ("activity", None, "lacks a part of the probe statistics .*activity"),
        ("energy", None, "lacks a part of the probe statistics .*energy"),
        ("hessian", torch.ones(N), "lacks a part of the probe statistics .*hessian"),
        ("sensitivity", torch.ones(N - 1, OUT), SHAPES),
        ("sensitivity", torch.ones(()), SHAPES),
        ("sensitivity", torch.ones(N), SHAPES),
        ("sensitivity", torch.ones(N, 2, OUT), SHAPES),
        ("activity", torch.ones(N + 1, IN), SHAPES),
        ("activity", torch.ones(()), SHAPES),
        ("activity", torch.ones(N, IN - 1), SHAPES),
        ("activity", torch.ones(N, 2, IN), SHAPES),
        ("energy", torch.ones(1, IN), SHAPES),
        ("gradient", torch.ones(IN, OUT), SHAPES),
        ("sensitivity", torch.ones(N, OUT).half(), DTYPE),
        ("activity", torch.ones(N, IN).double(), DTYPE),
        ("energy", torch.ones(IN).long(), DTYPE),
        ("gradient", torch.ones(OUT, IN).bfloat16(), DTYPE),
        ("sensitivity", -torch.ones(N, OUT), VALUES),
        ("activity", -torch.ones(N, IN), VALUES),
        ("energy", -torch.ones(IN), VALUES),
    ],
)
def test_a_file_with_another_tensor_is_refused(field, tensor, message: str, stored: str, tmp_path: Path) -> None:
    tensors, metadata = contents(stored)
    tensors[f"{MODULE}:{field}"] = tensor
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, tmp_path / "probe.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match="probe.safetensors'.*" + message):
        ProbeStatistics.load(tmp_path / "probe.safetensors")


# Masks from a file


@pytest.mark.parametrize("update_ratio", [0.03, 0.5])
@pytest.mark.parametrize(
    "choice",
    [
        {"score": "dowser", "scope": "model"},
        {"score": "shift"},
        {"score": "activity", "scope": "row"},
        {"score": "wanda", "scope": "row"},
        {"score": "gradient", "select": "high"},
        {"score": "dowser", "last_layers": 1},
        {"score": "dowser", "target_modules": ["o_proj", "up_proj"]},
    ],
    ids=str,
)
def test_a_file_gives_the_masks_of_a_probe(
    choice: dict, update_ratio: float, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = masks(get_peft_model(tiny_llama(), config(**choice, update_ratio=update_ratio)))
    monkeypatch.setattr(peft_dowser.tuner.injection, "probe_targets", lambda *args: pytest.fail("probed again"))
    found = masks(get_peft_model(tiny_llama(), config(**choice, update_ratio=update_ratio, statistics=stored)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("probed", "score", "message"),
    [
        ({"hidden": 64}, "dowser", r"q_proj': The probe statistics belong to a weight of shape \(64, 64\), this one"),
        ({"hidden": 16}, "wanda", r"q_proj': The probe statistics belong to a weight of shape \(32, 16\), this one"),
        ({"hidden": 64}, "shift", r"q_proj': The probe statistics belong to a weight of shape \(64, 64\), this one"),
        ({"hidden": 16}, "activity", r"q_proj': The probe statistics belong to a weight of shape \(32, 16\), this one"),
        ({}, "gradient", r"q_proj': The probe statistics hold no gradient; probe with DowserConfig\(score='gradient'"),
    ],
)
def test_statistics_that_do_not_fit_leave_the_model_untouched(
    probed: dict, score: str, message: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "probe.safetensors")
    probe(tiny_llama(**probed), config()).save(path)
    base = tiny_llama()
    with pytest.raises(ValueError, match="Module 'model.layers.0.self_attn." + message):
        get_peft_model(base, config(score=score, statistics=path))
    fresh = tiny_llama().state_dict()
    assert list(base.state_dict()) == list(fresh)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("dowser", r"hold no sensitivity, .* probe with DowserConfig\(score='dowser'\) to use this score"),
        ("shift", r"hold no sensitivity, .* probe with DowserConfig\(score='shift'\) to use this score"),
        ("gradient", r"hold no gradient; probe with DowserConfig\(score='gradient'\) to use this score"),
    ],
)
def test_a_score_that_needs_more_than_forwards_refuses_them_by_name(score: str, message: str, tmp_path: Path) -> None:
    path = str(tmp_path / "probe.safetensors")
    probe(tiny_llama(), config(score="activity")).save(path)
    base = tiny_llama()
    with pytest.raises(ValueError, match="Module 'model.layers.0.self_attn.q_proj': The probe statistics " + message):
        get_peft_model(base, config(score=score, statistics=path))
    assert not any(isinstance(module, DowserLayer) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("score", ["activity", "wanda"])
def test_an_adapter_of_forwards_only_says_so(score: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Statistics of a full probe give the same mask, and tell their own R."""
    files = {"dowser": tmp_path / "full.safetensors", score: tmp_path / "cheap.safetensors"}
    for probed, path in files.items():
        probe(tiny_llama(), config(score=probed)).save(path)
    expected = masks(get_peft_model(tiny_llama(), config(score=score)))
    cases = [(None, 0, "forwards only"), (files[score], 0, "forwards only"), (files["dowser"], 2, "R = 2")]
    for given, count, said in cases:
        folder = tmp_path / f"adapter {given and given.stem}"
        asked = config(score=score, num_rademacher=3, statistics=given and str(given))
        get_peft_model(tiny_llama(), asked).save_pretrained(folder)
        assert card_line(folder, "probe") == f"- probe: N = 4, {said}, T = 12"
        assert json.loads((folder / "adapter_config.json").read_text())["num_rademacher"] == count
        found = masks(PeftModel.from_pretrained(tiny_llama(), folder))
        again = DowserConfig.from_pretrained(str(folder))
        again.nnz_pattern = again.manifest = None
        for same in (found, masks(get_peft_model(tiny_llama(), again))):
            assert all(torch.equal(mask, expected[name]) for name, mask in same.items())
    assert "were made with" not in caplog.text  # R is nothing to these scores


# Other weights


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The probe statistics")
        yield


def test_other_weights_of_the_same_shapes_warn(stored: str) -> None:
    other = tiny_llama(seed=1)
    with pytest.warns(UserWarning, match="probe statistics .*are of other weights than this model has in 14 of 14"):
        get_peft_model(other, config(statistics=stored))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_do_not_warn_whatever_their_dtype(dtype: torch.dtype, stored: str) -> None:
    with quiet():
        get_peft_model(tiny_llama(dtype), config(statistics=stored))


def test_an_adapted_model_has_its_own_weights(stored: str) -> None:
    model = get_peft_model(tiny_llama(), config(score="random"))
    set_values(model)
    with quiet():
        model.add_adapter("other", config(statistics=stored))


def test_statistics_of_an_early_release_have_no_samples_and_do_not_warn(stored: str, tmp_path: Path) -> None:
    tensors, metadata = contents(stored)
    del metadata["samples"]
    save_file(tensors, tmp_path / "early.safetensors", metadata=metadata)
    assert ProbeStatistics.load(tmp_path / "early.safetensors").samples == {}
    with quiet():
        get_peft_model(tiny_llama(seed=1), config(statistics=str(tmp_path / "early.safetensors")))


@pytest.mark.parametrize("samples", ["[]", '{"model": "zz"}', '{"model": 3}', "no json"])
def test_samples_that_are_none_are_refused(samples: str, stored: str, tmp_path: Path) -> None:
    tensors, metadata = contents(stored)
    save_file(tensors, tmp_path / "odd.safetensors", metadata=metadata | {"samples": samples})
    with pytest.raises(ValueError, match="lacks a part of the probe statistics"):
        ProbeStatistics.load(tmp_path / "odd.safetensors")
