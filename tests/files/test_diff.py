"""`diff`: the overlap of two saved adapters, against the dense matrices of both."""

import json
import math
from pathlib import Path
from random import Random

import pytest
import torch
from models import config, edit_config, saved, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor

from peft_dowser import DeltaFormatError, DowserLayer
from peft_dowser.cli import main
from peft_dowser.delta.apply import Delta
from peft_dowser.files.inspection import Overlap, diff, overlap
from peft_dowser.files.inspection import total_overlap as total

pytestmark = pytest.mark.usefixtures("offline")

UP = "model.layers.1.mlp.up_proj"


def made(folder: Path, seed: int, **overrides) -> PeftModel:
    """A saved adapter with a mask large enough to share positions with others."""
    return saved(folder, seed=seed, **({"update_ratio": 0.3} | overrides))


def delta_rows(model: PeftModel) -> dict[str, Tensor]:
    """By module, the delta as a matrix in a row; NaN where it has no position."""
    found = {}
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            at = layer.dowser_index["default"].positions.long()
            empty = torch.full((layer.get_base_layer().weight.numel(),), math.nan)
            found[layer.module_name] = empty.index_put((at,), layer.dowser_values["default"].weight.detach())
    return found


def expected(a: Tensor, b: Tensor) -> tuple[int, int, int, int, float]:
    """Shared, only in A, only in B, conflicts and cosine, from dense deltas."""
    in_a, in_b = ~a.isnan(), ~b.isnan()
    both = in_a & in_b
    cosine = torch.cosine_similarity(a[both].double(), b[both].double(), dim=0)
    conflicts = int((a[both] * b[both] < 0).sum())
    return int(both.sum()), int((in_a & ~in_b).sum()), int((in_b & ~in_a).sum()), conflicts, float(cosine)


def numbers(found: Overlap) -> tuple:
    return found.shared, found.only_a, found.only_b, found.conflicts, found.cosine


# Of deltas


def delta(entries: dict[int, float]) -> Delta:
    positions = sorted(entries)
    return Delta(torch.tensor(positions, dtype=torch.int32), torch.tensor([entries[p] for p in positions]))


def drawn(random: Random) -> dict[int, float]:
    """Some entries of a weight of thirty, zeros among them."""
    return {at: random.choice([-2.0, -0.5, 0.0, 1.0]) for at in random.sample(range(30), random.randint(1, 30))}


@pytest.mark.parametrize("seed", range(30))
def test_the_overlap_is_that_of_dictionaries(seed: int) -> None:
    random = Random(seed)
    a, b = drawn(random), drawn(random)
    found = overlap(delta(a), delta(b))
    both = a.keys() & b.keys()
    assert (found.shared, found.only_a, found.only_b) == (len(both), len(a.keys() - b), len(b.keys() - a))
    assert found.conflicts == sum(a[at] * b[at] < 0 for at in both)
    length = math.sqrt(sum(a[at] ** 2 for at in both)) * math.sqrt(sum(b[at] ** 2 for at in both))
    if length == 0:
        assert found.cosine is None
    else:
        assert found.cosine == pytest.approx(sum(a[at] * b[at] for at in both) / length)
    back = overlap(delta(b), delta(a))
    assert (back.shared, back.only_b, back.only_a, back.cosine) == (
        found.shared,
        found.only_a,
        found.only_b,
        pytest.approx(found.cosine),
    )


def test_an_empty_delta_shares_nothing() -> None:
    one, empty = delta({3: 1.0}), delta({})
    assert numbers(overlap(one, empty)) == (0, 1, 0, 0, None)
    assert numbers(overlap(empty, one)) == (0, 0, 1, 0, None)


def test_a_delta_is_like_itself_and_unlike_its_negative() -> None:
    one = delta({3: 1e-20, 5: -2e-20, 9: 3e-20})
    assert numbers(overlap(one, one)) == (3, 0, 0, 0, pytest.approx(1))
    assert numbers(overlap(one, Delta(one.positions, -one.values))) == (3, 0, 0, 3, pytest.approx(-1))


def test_the_total_is_the_overlap_of_all_weights_in_a_row() -> None:
    a, b = delta({0: 1.0, 1: 2.0, 5: -3.0, 7: 1.0}), delta({1: -1.0, 5: -1.0, 6: 2.0})
    halves = [overlap(delta({0: 1.0, 1: 2.0}), delta({1: -1.0})), overlap(delta({1: -3.0, 3: 1.0}), delta({1: -1.0}))]
    halves.append(Overlap(only_b=1))
    assert numbers(total(halves)) == pytest.approx(numbers(overlap(a, b)))
    assert numbers(total([])) == (0, 0, 0, 0, None)


# Of adapters


def test_the_overlap_of_adapters_is_that_of_their_dense_deltas(tmp_path: Path) -> None:
    a, b = delta_rows(made(tmp_path / "a", 0)), delta_rows(made(tmp_path / "b", 1, update_ratio=0.1))
    found = diff(tmp_path / "a", tmp_path / "b")
    assert list(found) == sorted(a)
    for module, one in found.items():
        assert numbers(one) == pytest.approx(expected(a[module], b[module]))
    together = expected(*(torch.cat([deltas[module] for module in found]) for deltas in (a, b)))
    assert numbers(total(found.values())) == pytest.approx(together)


def test_a_module_of_one_adapter_alone_shares_nothing(tmp_path: Path) -> None:
    made(tmp_path / "a", 0, target_modules=["q_proj", "up_proj"])
    one = made(tmp_path / "b", 0, target_modules=["up_proj", "down_proj"])
    found = diff(tmp_path / "a", tmp_path / "b")
    assert {module.split(".")[-1] for module in found} == {"q_proj", "up_proj", "down_proj"}
    counts = {module: int((~values.isnan()).sum()) for module, values in delta_rows(one).items()}
    assert numbers(found["model.layers.0.mlp.down_proj"]) == (0, 0, counts["model.layers.0.mlp.down_proj"], 0, None)
    assert found["model.layers.0.self_attn.q_proj"].only_a == round(0.3 * 32 * 32)
    assert found[UP].cosine is not None


# The command


def test_the_command_prints_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    made(tmp_path / "a", 0, target_modules=["q_proj"])
    made(tmp_path / "b", 1, target_modules=["q_proj", "k_proj"])
    found = diff(a, b)
    assert main(["diff", a, b, "--json"]) == 0
    modules = [{"module": name} | one.summary() for name, one in found.items()]
    assert json.loads(capsys.readouterr().out) == {"a": a, "b": b} | total(found.values()).summary() | {
        "modules": modules
    }
    assert main(["diff", a, b]) == 0
    header, *rows, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["shared", "only", "in", "A", "only", "in", "B", "conflicts", "cosine", "module"]
    assert [row.split()[-1] for row in rows] == list(found)
    shown = [f"{one.cosine:.4f}" if one.cosine is not None else "-" for one in found.values()]
    assert [row.split()[-2] for row in rows] == shown
    assert "-" in shown
    assert last.split()[:4] == [str(number) for number in numbers(total(found.values()))[:4]]
    assert last.split()[-1] == "all"


# Refusals


def test_an_adapter_without_a_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made(tmp_path / "a", 0)
    made(tmp_path / "b", 1)
    edit_config(tmp_path / "b", lambda found: found | {"manifest": None})
    with pytest.raises(DeltaFormatError, match="/b' has no manifest, so the shapes of its weights are unknown"):
        diff(tmp_path / "a", tmp_path / "b")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "/b' has no manifest" in capsys.readouterr().err


def test_adapters_for_other_shapes_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "a", 0)
    wide = get_peft_model(tiny_llama(hidden=64), config(score="random"))
    wide.save_pretrained(tmp_path / "b")
    message = r"other shapes in 14 of 14 modules .* '.*' is \(32, 64\) in the first and \(64, 128\) in the second"
    with pytest.raises(ValueError, match=message):
        diff(tmp_path / "a", tmp_path / "b")


def test_adapters_that_share_no_module_are_refused(tmp_path: Path) -> None:
    made(tmp_path / "a", 0, target_modules=["q_proj"])
    made(tmp_path / "b", 0, target_modules=["v_proj"])
    with pytest.raises(ValueError, match=r"no module in common: the first adapts 'model.layers.0.self_attn.q_proj'"):
        diff(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": None}, f"the manifest gives module '{UP}' the shape None, which no weight has"),
        ({"shape": [64, -32]}, r"the shape \[64, -32\]"),
        ({"shape": [64, True]}, r"the shape \[64, True\]"),
        ({"shape": [2048]}, r"the shape \[2048\]"),
        ({"shape": [2**40, 2**40]}, "which no weight has"),
        ({"shape": [2, 2]}, f"module '{UP}'.*but the weight has only 4 entries"),
        ({"shape": [2**20, 2**20]}, f"module '{UP}': the index code of 614 of 1099511627776 positions takes"),
        ({"nnz": 3}, f"module '{UP}' has 614 values, its manifest says 3"),
    ],
)
def test_an_edited_manifest_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    made(tmp_path / "a", 0)
    made(tmp_path / "b", 1)
    for folder in ("a", "b"):
        edit_config(tmp_path / folder, lambda found: found["manifest"]["modules"][UP].update(change))
    with pytest.raises(DeltaFormatError, match=message):
        diff(tmp_path / "a", tmp_path / "b")


def test_what_is_no_adapter_is_named(tmp_path: Path) -> None:
    made(tmp_path / "a", 0)
    with pytest.raises(OSError, match="'nobody/has-this' is neither a folder nor a model on the Hub"):
        diff(tmp_path / "a", "nobody/has-this")
