"""PEFT's `convert_to_lora` on a Dowser adapter: a low-rank approximation for tools that know LoRA only."""

from pathlib import Path

import pytest
import torch
from models import adapted, gpt2, logits, tiny_llama
from peft import PeftModel, convert_to_lora, save_as_lora
from torch import nn


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # of LoRA's, about Conv1D
@pytest.mark.parametrize("base", [tiny_llama, gpt2])
def test_at_full_rank_the_lora_adapter_gives_the_same_outputs(base, tmp_path: Path) -> None:
    model = adapted(base(), score="random")
    assert model.supports_lora_conversion()
    save_as_lora(tmp_path, model, rank=32)
    found = logits(PeftModel.from_pretrained(base(), tmp_path))
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)


def test_a_lower_rank_is_the_best_approximation_of_the_delta() -> None:
    model = adapted(tiny_llama())
    _, factors = convert_to_lora(model, rank=4)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    name = "base_model.model.model.layers.0.mlp.up_proj"
    delta = layer.get_delta_weight("default")
    left = delta - factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    expected = torch.linalg.svdvals(delta)[4:].square().sum().sqrt()
    torch.testing.assert_close(left.norm(), expected)


def test_a_bfloat16_base_does_not_round_the_delta() -> None:
    model = adapted(tiny_llama(torch.bfloat16))
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    delta = layer.get_delta_weight("default")
    assert delta.dtype == torch.float32
    positions = layer.index("default").positions.long()
    assert torch.equal(delta.view(-1)[positions], layer.values("default"))


def test_an_unknown_adapter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Adapter 'absent' has no values in module 'model\.layers\.0.*\['default'\]"):
        convert_to_lora(adapted(tiny_llama()), rank=4, adapter_name="absent")


def test_linears_that_share_a_weight_are_refused() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    base[2].weight = base[0].weight
    model = adapted(base, target_modules=["0"], score="random", ensure_weight_tying=True, task_type=None)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*dowser.*Linear"):
        convert_to_lora(model, rank=4)


def test_an_embedding_is_refused() -> None:
    model = adapted(tiny_llama(), target_modules=["embed_tokens", "q_proj"], score="random")
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*dowser.*Embedding"):
        convert_to_lora(model, rank=4)
