"""Base layers that are more than torch's linear: a forward of their own, or a weight that is computed from others."""

from collections.abc import Callable

import pytest
import torch
from models import config, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import FalconConfig, FalconForCausalLM

IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(0))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def on_the_first(base: nn.Module) -> PeftModel:
    return get_peft_model(base, config(score="random", target_modules=["0"], update_ratio=0.5, task_type=None))


def falcon(dtype: torch.dtype, bias: bool) -> FalconForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    model = FalconForCausalLM(FalconConfig(**shape, bias=bias)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter.data)
    return model


@pytest.mark.parametrize(
    "compute", [parametrizations.weight_norm, lambda layer: prune.random_unstructured(layer, "weight", 0.5)]
)
def test_a_weight_that_is_computed_from_others_is_refused(compute: Callable[[nn.Module], object]) -> None:
    base = network()
    compute(base[0])
    with pytest.raises(TypeError, match=r"'0' computes its weight from other tensors.*remove_parametrizations"):
        on_the_first(base)


def test_a_class_with_a_forward_of_its_own_is_refused() -> None:
    base = network()
    base[0] = Scaled(8, 16)
    with pytest.raises(TypeError, match=r"'0' is a Scaled.*with no other forward than theirs"):
        on_the_first(base)


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_a_layer_of_an_unknown_quantization_is_named(targets: list[str] | None) -> None:
    base = tiny_llama()
    for layer in base.model.layers:
        layer.self_attn.q_proj = Scaled(32, 32).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"q_proj' has a weight of torch\.float8_e4m3fn, and PEFT knows no library"):
        get_peft_model(base, config(score="random", target_modules=targets))


def test_a_forward_that_was_set_on_a_layer_runs() -> None:
    base, x = network(), torch.randn(3, 8)
    plain = base[0].forward
    base[0].forward = lambda x: 2 * plain(x)
    expected = base(x)
    model = on_the_first(base)
    assert torch.equal(model(x), expected)
    set_values(model)
    layer = base[0]
    torch.testing.assert_close(layer(x), 2 * plain(x) + x @ layer.get_delta_weight("default").T)


def test_a_forward_that_was_put_back_is_that_of_the_class() -> None:
    base, x = network(), torch.randn(3, 8)
    base[0].forward = base[0].forward  # what accelerate leaves when it takes a hook off
    model = on_the_first(base)
    set_values(model)
    assert not base[0].is_additive
    output = model(x)
    assert torch.equal(model.merge_and_unload()(x), output)


@pytest.mark.parametrize("bias", [False, True])
def test_falcon_whose_linears_round_before_the_bias(bias: bool) -> None:
    base = falcon(torch.bfloat16, bias)
    expected = base(input_ids=IDS).logits
    model = get_peft_model(base, config(score="random"))
    assert torch.equal(model(input_ids=IDS).logits, expected)
    set_values(model)
    output = model(input_ids=IDS).logits
    output.sum().backward()
    assert not torch.equal(output, expected)
    merged = model.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(merged, output, rtol=0, atol=0.05 if bias else 0)
