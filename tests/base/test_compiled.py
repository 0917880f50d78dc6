"""`torch.compile` and `module.compile()`, before and after an adapter is made or loaded: nothing else is different."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import IDS, config, logits, tiny_llama
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from peft_dowser import DowserConfig, Patch, hotswap, merge, probe, verify

# torch asks for the gradient of an activation that it is about to trace.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def layers(model: nn.Module) -> nn.Module:
    """Every layer, and the attention inside it once more."""
    decoder = getattr(model, "get_base_model", lambda: model)().model
    for number, layer in enumerate(decoder.layers):
        layer.self_attn = torch.compile(layer.self_attn, backend="eager")
        decoder.layers[number] = torch.compile(layer, backend="eager")
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def plain(model: nn.Module) -> nn.Module:
    return model


WAYS = [whole, layers, in_place]
# What else is saved beside the deltas.
ALSO = [{"modules_to_save": ["lm_head"], "bias": "all"}, {"trainable_token_indices": [3, 5], "bias": "dowser_only"}]


def base(biased: bool = True) -> nn.Module:
    model = tiny_llama(layers=1)
    if biased:
        model.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))
    return model


def trained(model: nn.Module) -> nn.Module:
    """After a step of training, in eval mode."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return model.eval()


# Each order with one of the two always runs.
ORDERS = [
    pytest.param(*order, also, marks=pytest.mark.slow if number % 2 != kind else (), id=f"{number}-{name}")
    for number, order in enumerate([(way, plain) for way in WAYS] + [(plain, way) for way in WAYS])
    for kind, (name, also) in enumerate(zip(("head", "tokens"), ALSO, strict=True))
]


@pytest.mark.parametrize(("before", "after", "also"), ORDERS)
def test_every_order_gives_the_adapter_of_the_plain_model(
    before: Callable, after: Callable, also: dict, tmp_path: Path
) -> None:
    expected = trained(get_peft_model(base(), config(**also)))
    expected.save_pretrained(tmp_path / "plain")
    compiled = before(base())
    logits(compiled)  # so that something has to be compiled again
    model = trained(after(get_peft_model(compiled, config(**also))))
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path / "compiled")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "compiled" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


@pytest.mark.parametrize("also", ALSO, ids=["head", "tokens"])
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_adapter_loads_into_every_compiled_base(way: Callable, also: dict, tmp_path: Path) -> None:
    model = trained(get_peft_model(base(), config(score="random", **also)))
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(way(base()), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(loaded.merge_and_unload()), logits(model))


@pytest.mark.parametrize("way", WAYS)
def test_what_reads_a_model_reads_a_compiled_one(way: Callable, tmp_path: Path) -> None:
    """`probe`, `Patch`, `hotswap`, and a second adapter beside the first."""
    expected = probe(base(), config())
    found = probe(way(base()), config())
    assert found.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        assert torch.equal(found.modules[name].sensitivity, module.sensitivity)
        assert torch.equal(found.modules[name].activity, module.activity)
    saved = trained(get_peft_model(base(), config(score="random")))
    saved.save_pretrained(tmp_path)
    patched = way(base())
    with Patch(patched, tmp_path):
        assert torch.equal(logits(patched), logits(saved))
    assert torch.equal(logits(patched), logits(base()))
    model = get_peft_model(way(base()), config(score="random", seed=1)).eval()
    model.add_adapter("second", config(score="random", seed=2))
    hotswap(model, tmp_path)
    assert torch.equal(logits(model), logits(saved))


def test_a_compiled_base_stays_compiled() -> None:
    torch._dynamo.reset()  # after so many compilations of one function torch compiles no more
    calls = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        calls.append(graph)
        return graph.forward

    model = get_peft_model(torch.compile(base(), backend=counting), config(score="random")).eval()
    assert not any(isinstance(module, OptimizedModule) for module in model.modules())
    assert not calls  # neither the probe nor the injection runs compiled
    found = logits(model)
    assert calls
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), found)


@pytest.mark.parametrize("way", [whole, layers])
def test_merged_on_disk_like_any_other(way: Callable, tmp_path: Path) -> None:
    base(biased=False).save_pretrained(tmp_path / "base")
    model = trained(get_peft_model(way(base(biased=False)), config(score="random")))
    model.save_pretrained(tmp_path / "adapter")
    assert verify(tmp_path / "adapter", tmp_path / "base") == []
    merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    merged = type(tiny_llama()).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(merged), logits(model))


@pytest.mark.parametrize("way", [whole, layers])
def test_injected_without_a_peft_model(way: Callable) -> None:
    settings = {"score": "random", "target_modules": ["q_proj"]}
    expected = inject_adapter_in_model(DowserConfig(**settings), base())
    found = inject_adapter_in_model(DowserConfig(**settings), way(base()))
    assert torch.equal(logits(found), logits(expected))
