"""`hotswap`: another saved adapter in the place of one that is in use."""

from pathlib import Path

import pytest
import torch
from models import config, logits, saved, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peft_dowser import DeltaFormatError, DowserLayer, hotswap


def adapter(folder: Path, seed: int, **overrides) -> Path:
    saved(folder, seed=seed, **overrides)
    return folder


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(tiny_llama(), folder).eval()


def tensors_of(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, DowserLayer)]
    return [
        tensor
        for layer in layers
        for tensor in (layer.values("default"), layer.index("default").code, layer.index("default").positions)
    ]


@pytest.mark.parametrize("ratio", [0.1, 0.2])
def test_the_model_is_then_the_one_that_loads_the_other_adapter(tmp_path: Path, ratio: float) -> None:
    first, second = adapter(tmp_path / "a", 1), adapter(tmp_path / "b", 2, update_ratio=ratio)
    model, expected = loaded(first), loaded(second)
    hotswap(model, second)
    assert torch.equal(logits(model), logits(expected))
    assert model.peft_config["default"].to_dict() == expected.peft_config["default"].to_dict()
    model.save_pretrained(tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (second / name).read_bytes()
    assert torch.equal(logits(model.merge_and_unload()), logits(expected))


def test_adapters_of_one_ratio_keep_their_memory(tmp_path: Path) -> None:
    model = loaded(adapter(tmp_path / "a", 1))
    before = [(tensor, tensor.data_ptr()) for tensor in tensors_of(model)]
    hotswap(model, adapter(tmp_path / "b", 2))
    for (tensor, address), now in zip(before, tensors_of(model), strict=True):
        assert now is tensor and now.data_ptr() == address


def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    model = loaded(adapter(tmp_path / "a", 1))
    expected = logits(loaded(adapter(tmp_path / "b", 2)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        hotswap(model, tmp_path / "b")
        assert torch.equal(logits(compiled), expected)


def test_what_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    first = adapter(tmp_path / "a", 1)
    model = loaded(first)
    before = logits(model)
    with pytest.raises(ValueError, match=r"no Dowser adapter 'absent' to replace\. Load one with load_adapter"):
        hotswap(model, first, "absent")
    fewer = adapter(tmp_path / "fewer", 2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"is not for the modules of adapter 'default'; 12 differ: 'model\.layers\.0"):
        hotswap(model, fewer)
    heads = adapter(tmp_path / "heads", 2, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"heads' also trains modules_to_save=\['lm_head'\], which hotswap does not"):
        hotswap(model, heads)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"are merged into the base model\. Call unmerge_adapter\(\) before replacing"):
        hotswap(model, first)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    model = loaded(adapter(tmp_path / "a", 1))
    before = logits(model)
    file = adapter(tmp_path / "b", 2) / "adapter_model.safetensors"
    tensors = load_file(file)
    last = [key for key in tensors if key.endswith("values.weight")][-1]
    tensors[last][3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(DeltaFormatError, match="not finite"):
        hotswap(model, tmp_path / "b")
    assert torch.equal(logits(model), before)


def test_another_base_is_reported(tmp_path: Path) -> None:
    other = get_peft_model(tiny_llama(seed=5), config(score="random"))
    other.save_pretrained(tmp_path / "b")
    model = loaded(adapter(tmp_path / "a", 1))
    with pytest.warns(UserWarning, match="was made for other weights than this base model has in 14 of 14 modules"):
        hotswap(model, tmp_path / "b")
