"""`set_scale`: a factor on an adapter's delta, and what follows from it for forward, merge, combination and saving."""

from pathlib import Path

import pytest
import torch
from models import IDS, adapted, logits, tiny_llama
from peft import PeftModel
from torch import nn

from peft_dowser import DowserLayer


def layers(model: nn.Module) -> list[DowserLayer]:
    return [module for module in model.modules() if isinstance(module, DowserLayer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [0.5, -1.0, 0.0, 3.7])
def test_a_scaled_adapter_is_one_with_scaled_values(dtype: torch.dtype, scale: float) -> None:
    model, twin = adapted(tiny_llama(dtype)), adapted(tiny_llama(dtype))
    model.set_scale("default", scale)
    for layer in layers(twin):
        layer.values("default").data.mul_(scale)
    scaled = logits(model)
    assert torch.equal(scaled, logits(twin))
    assert torch.equal(logits(model.merge_and_unload()), scaled)


def test_scaling_back_and_unmerging_restore_every_bit() -> None:
    model = adapted(tiny_llama(torch.bfloat16))
    before = logits(model)
    model.set_scale("default", 2.0)
    model.merge_adapter()
    model.unmerge_adapter()
    model.set_scale("default", 1.0)
    assert torch.equal(logits(model), before)


def test_the_gradient_of_a_scaled_value_is_scaled() -> None:
    model, plain = adapted(), adapted()
    for layer in layers(plain):
        layer.values("default").data.mul_(0.5)
    model.set_scale("default", 0.5)
    for one in (model, plain):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for layer, other in zip(layers(model), layers(plain), strict=True):
        assert torch.equal(layer.values("default").grad, 0.5 * other.values("default").grad)


def test_a_combination_takes_adapters_as_they_are_scaled() -> None:
    model = adapted()
    model.set_scale("default", -0.25)
    scaled = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "baked")
    model.set_adapter("baked")
    assert torch.equal(logits(model), scaled)


def test_saving_says_that_the_scale_is_not_saved(tmp_path: Path) -> None:
    model = adapted()
    unscaled = logits(model)
    model.set_scale("default", 0.5)
    with pytest.warns(UserWarning, match="saved as it was trained, without its scale of 0.5"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), unscaled)


def test_a_deleted_adapter_leaves_no_scale() -> None:
    model = adapted()
    model.add_weighted_adapter(["default"], [1.0], "other")
    model.set_adapter("other")
    model.delete_adapter("default")
    assert all(set(layer.scaling) == {"other"} for layer in layers(model))


def test_scales_that_cannot_be() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        model.set_scale("default", float("nan"))
    with pytest.raises(ValueError, match=r"Unknown adapter 'absent'; the model has \['default'\]"):
        model.set_scale("absent", 1.0)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into the base.*unmerge_adapter\(\) first"):
        model.set_scale("default", 2.0)
