"""No file, however damaged, changes a model or reaches memory outside its weights: each is refused, and says why."""

import os
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_files import (
    CONFIG,
    DAMAGES,
    FILE,
    Before,
    Small,
    X,
    base_holds,
    edit_file,
    load,
    saved_small,
)
from models import config, edit_config, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peft_dowser import DeltaFormatError
from peft_dowser.delta import codec
from peft_dowser.delta.codec import encode
from peft_dowser.files import merging
from peft_dowser.files.inspection import diff, inspect
from peft_dowser.report.page import report

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

UP, DOWN = "base_model.model.up", "base_model.model.down"
VALUES, CODE = f"{UP}.dowser_values.weight", f"{UP}.dowser_index.code"


def tensors(change: Callable) -> Callable[[Path], None]:
    return lambda folder: edit_file(folder, change)


def bytes_of(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / FILE).write_bytes(change((folder / FILE).read_bytes()))


def settings(change: Callable) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change)


def without_manifest(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same damage to a file of before manifests, whose index codes have no digest."""

    def damage(folder: Path) -> None:
        edit_config(folder, lambda found: {key: value for key, value in found.items() if key != "manifest"})
        change(folder)

    return damage


def set_code(positions: list[int], numel: int = 240) -> Callable[[Path], None]:
    """A code of 24 positions that nobody could encode; as a mask of bits or as Elias-Fano, whichever 24 of 240 take."""
    low, high = [], []
    for number, at in enumerate(positions):
        low.append(at & 7)
        high.append((at >> 3) + number)
    packed_low = bytearray(9)
    for number, bits in enumerate(low):
        for bit in range(3):
            if bits >> bit & 1:
                packed_low[(3 * number + bit) // 8] |= 1 << (3 * number + bit) % 8
    packed_high = bytearray(-(-(24 + (numel >> 3) + 1) // 8))
    for bit in high:
        if 0 <= bit < 8 * len(packed_high):
            packed_high[bit // 8] |= 1 << bit % 8
    code = torch.tensor(list(packed_low + packed_high), dtype=torch.uint8)
    assert len(code) == codec.code_length(numel, 24)
    return tensors(lambda found: found | {CODE: code})


def declared_as(dtype: str, bits: int) -> Callable[[Path], None]:
    """The 96 bytes of values declared as numbers of another dtype."""

    def declared(content: bytes) -> bytes:
        size = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + size]
        other = b'"dtype":"%s","shape":[%d]' % (dtype.encode(), 96 * 8 // bits)
        changed = header.replace(b'"dtype":"F32","shape":[24]', other)
        assert changed != header
        return len(changed).to_bytes(8, "little") + changed + content[8 + size :]

    return bytes_of(declared)


GOOD = list(range(0, 240, 10))
# Whatever a safetensors file may declare, with the bits of an entry, besides the dtypes of values.
DTYPES = {"BOOL": 8, "I8": 8, "U8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64}
DTYPES |= {"F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F4": 4}
UNKNOWN_TO_TORCH = {"F6_E2M3": 6, "F6_E3M2": 6}
# Name, damage, what the error says. The numbers are those of the rows of bad inputs that the tests were written from.
ROWS = [
    *(
        (
            f"values of {dtype}",
            declared_as(dtype, bits),
            r"expected 24 floating-point values of shape \(24,\), the file has torch",
        )
        for dtype, bits in DTYPES.items()
    ),
    *(
        (f"values of {dtype}", declared_as(dtype, bits), f"is not a readable safetensors file .*{dtype}")
        for dtype, bits in UNKNOWN_TO_TORCH.items()
    ),
    ("1 truncated", bytes_of(lambda b: b[: len(b) // 2]), r"is not a readable safetensors file .* download it again"),
    ("1 cut by one byte", bytes_of(lambda b: b[:-1]), r"adapter_model\.safetensors' \(\d+ bytes\) is not a readable"),
    ("2 header longer than the file", bytes_of(lambda b: b"\xff" * 7 + b"\0" + b[8:]), "is not a readable safetensors"),
    ("2 header of 128 MB", bytes_of(lambda b: b"\0\0\0\x08" + b"\0" * 4 + b[8:]), "is not a readable safetensors file"),
    ("3 empty", bytes_of(lambda b: b"{"), "is not a readable safetensors file"),
    ("3 no tensors", lambda folder: save_file({}, folder / FILE), "should have 4 Dowser tensors and has none of them"),
    (
        "4 sizes of zero",
        tensors(lambda t: {key: value[:0].clone() for key, value in t.items()}),
        r"module '(up|down)': expected 24 floating-point values of shape \(24,\), the file has torch\.float32 of",
    ),
    (
        "5 tensors of LoRA",
        tensors(lambda t: {f"{UP}.lora_A.weight": torch.zeros(2, 2)}),
        "should have 4 Dowser tensors and has none of them; missing",
    ),
    (
        "9 newer format",
        settings(lambda c: c | {"manifest": {"format": 7, "written_by": "x" * 500}}),
        r"is in format 7, written by 'x{50}'; this release of peft-dowser reads up to format 1: upgrade it",
    ),
    (
        "11 unknown tensor of ours",
        tensors(lambda t: t | {f"{UP}.dowser_scales.weight": torch.zeros(1)}),
        "the file has 1 tensors that the adapter does not train",
    ),
    (
        "12 one key twice",
        bytes_of(lambda b: b.replace(b"down", b"up\0\0".replace(b"\0", b" "), 2)),
        "safetensors|should have 4 Dowser tensors|Dowser tensors that this adapter does not have",
    ),
    (
        "13 a long and odd name",
        tensors(lambda t: t | {"../\0\n" + "x" * 10_000 + ".dowser_values.weight": torch.zeros(1)}),
        r"that this adapter does not have: '(base_model\.model\.)?\.\./\\x00\\nx{60,100}'",
    ),
    ("14 position beyond the weight", without_manifest(set_code([*GOOD[:-1], 240])), "position 240 lies outside"),
    ("14 position far beyond", without_manifest(set_code([*GOOD[:-1], 247])), "position 247 lies outside"),
    ("16 one position twice", without_manifest(set_code([0, 0, *GOOD[2:]])), "positions are not strictly increasing"),
    ("17 unsorted", without_manifest(set_code([7, 3, *GOOD[2:]])), "positions are not strictly increasing"),
    (
        "18 one bit less",
        without_manifest(tensors(lambda t: t[CODE].view(-1).__setitem__(-1, 0))),
        r"module 'up': the index code selects \d+ positions, expected 24",
    ),
    ("18 all bits", without_manifest(tensors(lambda t: t[CODE].fill_(255))), r"selects \d+ positions"),
    (
        "20 code too short",
        tensors(lambda t: t | {CODE: t[CODE][1:].clone()}),
        r"the index code of 24 of 240 positions takes \d+ bytes, got \d+",
    ),
    ("21 code of floats", tensors(lambda t: t | {CODE: t[CODE].float()}), r"one row of uint8, got torch\.float32"),
    ("21 code of bool", tensors(lambda t: t | {CODE: t[CODE].bool()}), r"one row of uint8, got torch\.bool"),
    ("21 code of int64", tensors(lambda t: t | {CODE: t[CODE].long()}), r"one row of uint8, got torch\.int64"),
    (
        "21 code in two rows",
        tensors(lambda t: t | {CODE: t[CODE].view(1, -1)}),
        r"one row of uint8, got torch\.uint8 of",
    ),
    ("21 values of int", tensors(lambda t: t | {VALUES: t[VALUES].int()}), r"the file has torch\.int32 of shape \(24,"),
    (
        "21 values of float8",
        tensors(lambda t: t | {VALUES: t[VALUES].to(torch.float8_e4m3fn)}),
        r"the file has torch\.float8_e4m3fn of shape \(24,\)",
    ),
    ("21 values in a column", tensors(lambda t: t | {VALUES: t[VALUES].view(-1, 1)}), r"of shape \(24, 1\)"),
    (
        "23 a NaN",
        tensors(lambda t: t[VALUES].__setitem__(3, float("nan"))),
        "module 'up': the file has values that are",
    ),
    ("23 an infinity", tensors(lambda t: t[VALUES].__setitem__(3, -float("inf"))), "has values that are not finite"),
    (
        "23 infinities that cancel",
        tensors(lambda t: t[VALUES].__setitem__(slice(2), torch.tensor([float("inf"), -float("inf")]))),
        "has values that are not finite",
    ),
    (
        "25 more values than weights",
        settings(lambda c: c["nnz_pattern"].__setitem__("up", 10**15)),
        r"manifest says 24|there are 1000000000000000 values, but the weight has only 240 entries",
    ),
    (
        "26 a shape of 2^40 entries",
        settings(lambda c: c["manifest"]["modules"]["up"].__setitem__("shape", [2**20, 2**20])),
        r"has a weight of shape \(20, 12\) here, the adapter was made for \[1048576, 1048576\]",
    ),
    (
        "27 a module too few",
        tensors(lambda t: {key: value for key, value in t.items() if "up" not in key}),
        "should have 4 Dowser tensors and has 2; missing: 'base_model.model.up",
    ),
    (
        "27 a module too many",
        tensors(lambda t: t | {f"{UP}x.dowser_values.weight": torch.zeros(1)}),
        "has 1 Dowser tensors that this adapter does not have: '(base_model.model.)?upx.dowser_values",
    ),
    (
        "28 two modules exchanged",
        tensors(lambda t: {k.replace("up", "#").replace("down", "up").replace("#", "down"): v for k, v in t.items()}),
        "module '(up|down)': the index code is not the one that the manifest in adapter_config.json describes",
    ),
    (
        "31 no counts for a module",
        settings(lambda c: c["nnz_pattern"].__setitem__("nope", 3)),
        "has values for 1 modules that are not targets in this model: 'nope'",
    ),
    (
        "32 a weight of the base",
        tensors(lambda t: t | {"base_model.model.head.weight": torch.ones(4, 12)}),
        r"has 1 tensors that the adapter does not train: 'base_model\.model\.head\.weight'\. Loading them",
    ),
    (
        "32 the weight under a delta",
        tensors(lambda t: t | {f"{UP}.base_layer.weight": torch.ones(20, 12)}),
        r"has 1 tensors that the adapter does not train: 'base_model\.model\.up\.base_layer\.weight'",
    ),
    (
        "32 biases that do not train",
        tensors(lambda t: t | {f"{UP}.base_layer.bias": torch.ones(20)}),
        r"has 1 tensors that the adapter does not train: 'base_model\.model\.up\.base_layer\.bias'",
    ),
    ("33 a tensor of nothing", tensors(lambda t: t | {"x": torch.ones(1)}), "has 1 tensors that the adapter does not"),
    ("40 a wrong setting", settings(lambda c: c | {"update_ratio": "0.1"}), "update_ratio must be a number"),
]


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_bad_file_is_refused_and_the_model_is_as_it_was(
    damage: Callable, message: str, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    saved_small(tmp_path)
    damage(tmp_path)
    base = Small()
    untouched = Before(base)
    error = ValueError if "update_ratio" in message else DeltaFormatError
    with pytest.raises(error, match=message):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert untouched.holds()


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_second_adapter_leaves_the_first(damage: Callable, message: str, tmp_path: Path) -> None:
    saved_small(tmp_path)
    damage(tmp_path)
    model = get_peft_model(Small(), config(score="random", target_modules=["up", "down"], task_type=None)).eval()
    set_values(model, seed=3)
    expected, untouched = model(X), Before(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "loaded")
    assert untouched.holds()
    assert set(model.peft_config) == {"default"}
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize(("damage", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_a_bad_checkpoint_is_no_state_to_resume_from(damage: Callable, message: str, tmp_path: Path) -> None:
    saved_small(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    damage(tmp_path / "bad")
    model = load(Small(), tmp_path / "good")
    expected, untouched = model(X), Before(model)
    try:
        found = load_file(tmp_path / "bad" / FILE)
    except SafetensorError:
        return  # as it would be for any adapter: nothing of ours is asked
    try:
        set_peft_model_state_dict(model, found)
    except DeltaFormatError:
        assert untouched.holds()
        assert torch.equal(model(X), expected)
    else:  # what only the config or its manifest gives away is a valid state of this adapter
        assert bool(model(X).isfinite().all())
    assert base_holds(untouched)


def test_a_module_to_save_brings_its_copy_and_not_the_original(tmp_path: Path) -> None:
    saved_small(tmp_path, modules_to_save=["head"])
    load(Small(), tmp_path)
    original = "base_model.model.head.original_module.weight"
    edit_file(tmp_path, lambda found: found | {original: torch.ones(4, 12)})
    base = Small()
    untouched = Before(base)
    with pytest.raises(DeltaFormatError, match=f"does not train: '{re.escape(original)}'"):
        load(base, tmp_path)
    assert untouched.holds()


def test_a_bad_second_adapter_with_a_whole_module_leaves_that_of_the_first(tmp_path: Path) -> None:
    settings = {"score": "random", "target_modules": ["up", "down"], "task_type": None, "modules_to_save": ["head"]}
    saved_small(tmp_path, modules_to_save=["head"])
    edit_file(tmp_path, lambda found: found | {VALUES: found[VALUES] * float("nan")})
    model = get_peft_model(Small(), config(**settings)).eval()
    set_values(model)
    expected, untouched = model(X), Before(model)
    with pytest.raises(DeltaFormatError, match="values that are not finite"):
        model.load_adapter(tmp_path, "loaded")
    assert untouched.holds()
    assert torch.equal(model(X), expected)


def test_a_bad_adapter_with_trained_tokens_leaves_the_embeddings(tmp_path: Path) -> None:
    model = get_peft_model(
        tiny_llama(layers=1), config(score="random", target_modules=["q_proj"], trainable_token_indices=[5, 9])
    )
    model.save_pretrained(tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.dowser_values.weight"
    edit_file(tmp_path, lambda found: found | {key: found[key] + float("inf")})
    base = tiny_llama(layers=1)
    untouched = Before(base)
    with pytest.raises(DeltaFormatError, match="values that are not finite"):
        load(base, tmp_path)
    assert untouched.holds()


def test_a_merge_of_files_takes_no_other_weights(tmp_path: Path) -> None:
    base = tiny_llama(layers=1)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, config(score="random", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    edit_file(
        tmp_path / "adapter", lambda found: found | {"base_model.model.model.norm.weight": torch.full((32,), 7.0)}
    )
    message = r"Adapter '.*': the file has 1 tensors that the adapter does not train: 'model\.norm\.weight'"
    with pytest.raises(DeltaFormatError, match=message):
        merging.merge(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "base")
    assert not (tmp_path / "merged").exists()


READERS = [inspect, lambda folder: diff(folder, folder), lambda folder: report(folder, folder / "page.html")]


@pytest.mark.parametrize("reader", READERS, ids=["inspect", "diff", "report"])
@pytest.mark.parametrize("count", [0, -1, 24.0, True, None, "24", [24]])
def test_readers_without_a_base_refuse_counts_that_are_none(reader: Callable, count: object, tmp_path: Path) -> None:
    saved_small(tmp_path)

    def change(found: dict) -> None:
        found["nnz_pattern"]["up"] = found["manifest"]["modules"]["up"]["nnz"] = count

    edit_config(tmp_path, change)
    edit_file(tmp_path, lambda found: found | {VALUES: found[VALUES][: 0 if count == 0 else None].clone()})
    with pytest.raises(DeltaFormatError, match=rf"has {re.escape(repr(count))} trained weights for module 'up', which"):
        reader(tmp_path)


@pytest.mark.parametrize("reader", READERS, ids=["inspect", "diff", "report"])
def test_readers_without_a_base_refuse_other_values_than_are_counted(reader: Callable, tmp_path: Path) -> None:
    saved_small(tmp_path)
    edit_file(tmp_path, lambda found: found | {VALUES: found[VALUES][:0].clone()})
    with pytest.raises(
        DeltaFormatError, match=r"module 'up': expected 24 floating-point values of shape \(24,\), the file has"
    ):
        reader(tmp_path)


# Random damage


MUTANTS = int(os.environ.get("DOWSER_MUTANTS", "1600"))


@pytest.mark.filterwarnings("ignore:Adapter .* was made for other weights")
@pytest.mark.filterwarnings("ignore:.*target_modules.*")
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("granularity", ["weight", "input_channel"])
def test_no_mutant_harms_a_model(damage: Callable, manifest: bool, granularity: str, tmp_path: Path) -> None:
    saved_small(tmp_path / "good", granularity=granularity)
    if not manifest:
        edit_config(tmp_path / "good", lambda found: found | {"manifest": None})
        if damage.__name__ in ("change_counts", "change_manifest"):
            return
    originals = {name: (tmp_path / "good" / name).read_bytes() for name in (FILE, CONFIG)}
    (tmp_path / "bad").mkdir()
    generator = random.Random(f"{damage.__name__} {manifest} {granularity}")
    refused = 0
    for number in range(MUTANTS // (4 * len(DAMAGES))):
        for name, content in originals.items():
            (tmp_path / "bad" / name).write_bytes(content)
        damage(tmp_path / "bad", generator)
        base = Small()
        untouched = Before(base)
        try:
            model = load(base, tmp_path / "bad")
        except (DeltaFormatError, SafetensorError):
            refused += 1
            assert untouched.holds(), number
            continue
        assert bool(model(X).isfinite().all()) or damage.__name__ == "flip_bytes", number
        model.merge_adapter()
        model.unmerge_adapter()
        assert base_holds(untouched), number
    assert refused


def test_a_mutant_that_loads_has_the_bits_of_its_file(tmp_path: Path) -> None:
    saved_small(tmp_path)
    values = torch.tensor([float(number) for number in range(24)])
    edit_file(tmp_path, lambda found: found | {VALUES: values, CODE: encode(torch.tensor(GOOD), 240)})
    edit_config(tmp_path, lambda found: found | {"manifest": None})
    model = load(Small(), tmp_path).merge_and_unload()
    expected = Small().up.weight.detach().view(-1)
    expected[GOOD] += values
    assert torch.equal(model.up.weight.view(-1), expected)


# The manifest and what warns


def test_extra_settings_of_a_later_release_warn(tmp_path: Path) -> None:
    saved_small(tmp_path)
    edit_config(tmp_path, lambda found: found | {"later": 1})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(Small(), tmp_path)
    assert any("later" in str(warning.message) for warning in caught)


def test_pickled_tensors_pass_the_same_gate(tmp_path: Path) -> None:
    saved_small(tmp_path)
    found = load_file(tmp_path / FILE)
    (tmp_path / FILE).unlink()
    torch.save(found, tmp_path / "adapter_model.bin")
    assert bool(load(Small(), tmp_path)(X).isfinite().all())
    found[VALUES][0] = float("nan")
    torch.save(found, tmp_path / "adapter_model.bin")
    untouched = Before(base := Small())
    with pytest.raises(DeltaFormatError, match="not finite"):
        load(base, tmp_path)
    assert untouched.holds()


def test_values_that_overflow_the_base_load_but_no_safe_merge_takes_them(tmp_path: Path) -> None:
    saved_small(tmp_path)
    edit_file(tmp_path, lambda found: found | {VALUES: torch.full((24,), 1e30)})
    base = Small().half()
    model = load(base, tmp_path)
    untouched = Before(base)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=re.escape("merging would write 24 values that are not finite in torch.f")):
            merge(safe_merge=True)
        assert untouched.holds()


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "null", ""])
def test_a_config_that_is_none_changes_nothing(content: str, tmp_path: Path) -> None:
    saved_small(tmp_path)
    (tmp_path / CONFIG).write_text(content)
    untouched = Before(base := Small())
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        load(base, tmp_path)
    assert untouched.holds()
