"""Bases over several devices, as `device_map="auto"` spreads them: accelerate's hooks move inputs, and nothing else.

One device stands for several here: `force_hooks` gives every module the hook that it has on many.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module
from cases import every_granularity
from models import IDS, assert_as_merged, assert_same_bits, base_bits, config, gpt2, logits, set_values, tiny_llama
from peft import get_peft_model
from torch import nn

from peft_dowser import probe
from peft_dowser.delta.layout import Granularity
from peft_dowser.layers import linear_op as sparse_linear
from peft_dowser.layers.layer import Linear, dowser_layers


def dispatched(model: nn.Module) -> nn.Module:
    return dispatch_model(model, dict.fromkeys(dict(model.named_children()), "cpu"), "cpu", force_hooks=True)


@every_granularity
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_asks_a_gpu_for_no_number(
    dtype: torch.dtype, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is on a device without data, where every question for a number is an error."""
    monkeypatch.setattr(sparse_linear, "_PRODUCT_BLOCK", 1)
    choice = config(score="random", granularity=granularity)
    model = get_peft_model(tiny_llama(dtype), choice).to("meta").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=IDS.to("meta"), labels=IDS.to("meta")).loss.backward()
    assert all(layer.values("default").grad is not None for layer in dowser_layers(model))
    optimizer.step()


TARGETS: list[tuple[Granularity, Callable[[torch.dtype], nn.Module], list[str] | None]] = [
    ("weight", tiny_llama, None),
    ("weight", tiny_llama, ["embed_tokens", "up_proj", "lm_head"]),
    ("weight", gpt2, ["c_attn", "c_fc"]),
    ("input_channel", tiny_llama, ["up_proj", "lm_head"]),
    ("input_channel", gpt2, ["c_attn", "c_fc"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("granularity", "base", "targets"), TARGETS)
def test_the_adapted_model_gives_what_the_merged_one_gives(
    granularity: Granularity, base: Callable[[torch.dtype], nn.Module], targets: list[str] | None, dtype: torch.dtype
) -> None:
    choice = config(score="magnitude", target_modules=targets, granularity=granularity)
    here = get_peft_model(base(dtype), choice).eval()
    model = get_peft_model(dispatched(base(dtype)), choice).eval()
    before = base_bits(model)
    for each in (here, model):
        set_values(each)
    assert all("_hf_hook" in layer.get_base_layer().__dict__ for layer in dowser_layers(model))
    assert not any(layer.is_additive for layer in dowser_layers(model))
    adapted = logits(model)
    assert torch.equal(adapted, logits(here))
    model.merge_adapter()
    assert_as_merged(adapted, logits(model), granularity)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)


@every_granularity
def test_gradients_are_those_of_the_base_at_hand(granularity: Granularity) -> None:
    found = []
    for base in (tiny_llama(), dispatched(tiny_llama())):
        model = get_peft_model(base, config(score="magnitude", granularity=granularity))
        set_values(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({layer.module_name: layer.values("default").grad for layer in dowser_layers(model)})
    assert_same_bits(*found)


def test_the_probe_is_that_of_the_base_at_hand() -> None:
    expected, found = probe(tiny_llama(), config()), probe(dispatched(tiny_llama()), config())
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].sensitivity, module.sensitivity)


def test_the_logits_to_keep_are_a_number() -> None:
    """A tensor would go to the first device with the other inputs, and the hidden states are on the last one."""
    model, kept = tiny_llama(), []
    forward = model.forward

    def spy(*args: Any, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        kept.append(logits_to_keep)
        return forward(*args, logits_to_keep=logits_to_keep, **kwargs)

    model.forward = spy  # type: ignore[method-assign]
    statistics = probe(model, config(), prompts=[[3, 4, 5, 6, 7, 8], [9, 8, 7]])
    assert set(kept) == {4}
    assert all(type(number) is int for number in kept)
    alone = probe(tiny_llama(), config(probe_batch_size=1), prompts=[[3, 4, 5, 6, 7, 8], [9, 8, 7]])
    for name, module in statistics.modules.items():
        torch.testing.assert_close(module.sensitivity, alone.modules[name].sensitivity)


def of_the_user(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def another_hook(layer: nn.Module) -> None:
    add_hook_to_module(layer, SequentialHook(AlignDevicesHook("cpu"), ModelHook()))


def back_again(layer: nn.Module) -> None:
    add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))


def moved(layer: nn.Module) -> None:
    add_hook_to_module(layer, AlignDevicesHook("cpu"))


@pytest.mark.parametrize(
    ("changes", "additive"),
    [
        ([], False),
        ([moved], False),
        ([of_the_user], True),
        ([of_the_user, moved], True),
        ([moved, of_the_user], True),
        ([another_hook], True),
        ([back_again], True),
    ],
)
def test_only_a_hook_that_moves_inputs_is_passed_over(
    changes: list[Callable[[nn.Module], None]], additive: bool
) -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    for change in changes:
        change(base[0])
    expected = base[0](torch.ones(2, 8))
    model = get_peft_model(base, config(score="random", target_modules=["0"], task_type=None))
    (layer,) = dowser_layers(model)
    assert isinstance(layer, Linear)
    assert layer.is_additive == additive
    assert torch.equal(layer(torch.ones(2, 8)), expected)


@every_granularity
def test_an_input_is_moved_to_the_weight(granularity: Granularity) -> None:
    """A device without data stands for the second one."""
    base = nn.Sequential(nn.Linear(16, 4))
    choice = config(score="random", granularity=granularity, target_modules=["0"], task_type=None)
    model = get_peft_model(base, choice)
    (layer,) = dowser_layers(model)
    add_hook_to_module(layer.to("meta").get_base_layer(), AlignDevicesHook("meta"))
    assert layer(torch.zeros(2, 16)).device.type == "meta"
