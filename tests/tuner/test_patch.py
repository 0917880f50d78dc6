"""`Patch`: a saved adapter in the weights of a plain model, and out again."""

from pathlib import Path

import pytest
import torch
from models import assert_same_bits, base_bits, saved, tiny_llama
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_dowser import DeltaFormatError, Patch
from peft_dowser.delta import apply

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def adapter(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    saved(folder, tiny_llama(dtype), seed, **overrides)
    return folder


def test_it_shows_itself_in_one_line(tmp_path: Path) -> None:
    patch = Patch(tiny_llama(), adapter(tmp_path, 1))
    assert repr(patch) == f"Patch({str(tmp_path)!r}, 14 modules, not applied)"
    with patch:
        assert repr(patch) == f"Patch({str(tmp_path)!r}, 14 modules, applied)"


@pytest.mark.parametrize("dtype", DTYPES)
def test_applied_it_is_the_merged_model_and_removed_the_base(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = adapter(tmp_path, 1, dtype)
    merged = base_bits(PeftModel.from_pretrained(tiny_llama(dtype), folder).merge_and_unload())
    model = tiny_llama(dtype)
    base = base_bits(model)
    patch = Patch(model, folder)
    assert_same_bits(base_bits(model), base)
    for _ in range(2):
        patch.apply()
        assert_same_bits(base_bits(model), merged)
        patch.remove()
        assert_same_bits(base_bits(model), base)


def test_switching_between_adapters(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(seed), seed, update_ratio=0.05 * seed) for seed in (1, 2, 3)]
    expected = [base_bits(PeftModel.from_pretrained(tiny_llama(), folder).merge_and_unload()) for folder in folders]
    model = tiny_llama()
    base, patches = base_bits(model), [Patch(model, folder) for folder in folders]
    for number in (0, 2, 1, 0):
        with patches[number]:
            assert_same_bits(base_bits(model), expected[number])
    assert_same_bits(base_bits(model), base)


def test_several_are_removed_in_reverse(tmp_path: Path) -> None:
    model = tiny_llama()
    base = base_bits(model)
    first, second = (Patch(model, adapter(tmp_path / str(seed), seed)) for seed in (1, 2))
    first.apply()
    second.apply()
    both = base_bits(model)
    with pytest.raises(ValueError, match=r"changed since\. Remove the patch that was applied after it first"):
        first.remove()
    assert_same_bits(base_bits(model), both)
    second.remove()
    first.remove()
    assert_same_bits(base_bits(model), base)


def test_a_sum_that_is_not_finite_changes_nothing(tmp_path: Path) -> None:
    folder = adapter(tmp_path, 1)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    last = [key for key in tensors if key.endswith("values.weight")][-1]
    tensors[last][3] = 1e30
    save_file(tensors, file)
    model = tiny_llama(torch.float16)
    base = base_bits(model)
    with pytest.raises(ValueError, match=r"1 values that are not finite in torch\.float16"):
        Patch(model, folder).apply()
    assert_same_bits(base_bits(model), base)


def test_an_interruption_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    base, patch = base_bits(model), Patch(model, adapter(tmp_path, 1))
    calls, write = [], apply._write_entries_

    def interrupted(*args) -> None:
        write(*args)
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(apply, "_write_entries_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.apply()
    assert_same_bits(base_bits(model), base)
    with pytest.raises(ValueError, match="is not applied"):
        patch.remove()


def test_what_a_patch_cannot_do_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", 1)
    patch = Patch(tiny_llama(), folder)
    with patch, pytest.raises(ValueError, match="is applied already"):
        patch.apply()
    with pytest.raises(ValueError, match="The model has Dowser adapters"):
        Patch(PeftModel.from_pretrained(tiny_llama(), folder), folder)
    heads = adapter(tmp_path / "heads", 1, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"also changes 1 whole tensors, such as 'lm_head\.weight'"):
        Patch(tiny_llama(), heads)
    with pytest.raises(DeltaFormatError, match=r"(belongs to|was made for) another base model"):
        Patch(tiny_llama(hidden=16), folder)
    with pytest.warns(UserWarning, match="was made for other weights than this base model has"):
        Patch(tiny_llama(seed=3), folder)
