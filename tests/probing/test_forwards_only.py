"""Probes for scores that read no sensitivity: one forward per prompt, and no graph, signs or backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import config, gpt2, seeded, t5, tied_llama, tiny_llama, tiny_moe
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import peft_dowser.probing.passes
from peft_dowser import DowserLayer, probe
from peft_dowser.config import FORWARD_SCORES
from peft_dowser.probing import scores


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return seeded(lambda: BertForMaskedLM(BertConfig(vocab_size=64, **sizes, pad_token_id=0)))


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# A model, and the options that name its targets.
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "decoder": (tiny_llama, {}),
    "Conv1D": (gpt2, {}),
    "tied embeddings": (tied_llama, {"target_modules": ["embed_tokens", "up_proj"], "ensure_weight_tying": True}),
    "head": (tiny_llama, {"target_modules": ["lm_head", "up_proj"]}),
    "seq2seq": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "encoder": (bert, {"task_type": None}),
    "experts": (lambda: tiny_moe("qwen3_moe"), EXPERTS),
    "half": (lambda: tiny_llama(torch.bfloat16), {}),
}
PROMPTS = [torch.tensor([1, 5, 9, 13, 40, 7]), torch.tensor([1, 20, 3]), torch.tensor([1, 8, 8, 31])]


def fail(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a probe of forwards only came here")


@pytest.mark.parametrize("score", FORWARD_SCORES)
@pytest.mark.parametrize("kind", MODELS)
def test_no_graph_is_built_no_signs_are_drawn_and_nothing_runs_backward(
    kind: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = MODELS[kind]
    monkeypatch.setattr(peft_dowser.probing.passes, "_rademacher", fail)
    monkeypatch.setattr(torch.autograd, "grad", fail)
    with torch.autograd.graph.saved_tensors_hooks(fail, fail):
        found = probe(make(), config(score=score, **options))
    assert found.modules
    assert all(module.sensitivity is None and module.gradient is None for module in found.modules.values())
    assert found.info.num_rademacher == 0


@pytest.mark.parametrize("kind", MODELS)
def test_what_it_measures_are_the_bits_of_a_full_probe(kind: str) -> None:
    make, options = MODELS[kind]
    full, cheap = (probe(make(), config(score=score, **options)) for score in ("dowser", "activity"))
    assert cheap.info == full.of_forwards().info != full.info
    assert cheap.samples == full.samples
    assert list(cheap.modules) == list(full.modules)
    for name, module in cheap.modules.items():
        assert torch.equal(module.activity, full.modules[name].activity)
        assert torch.equal(module.energy, full.modules[name].energy)


@pytest.mark.parametrize("kind", ["decoder", "encoder", "experts"])
def test_it_costs_one_forward_of_each_prompt(kind: str) -> None:
    """And one more of two prompts, which tells whether they can share a batch: 1.03 in all at N = 64."""
    make, options = MODELS[kind]
    model, (count, length) = make(), (64, 12)
    tokens: list[int] = []

    def count_tokens(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        tokens.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count_tokens, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    prompts = list(torch.randint(3, 64, (count, length), generator=generator))
    probe(model, config(score="activity", **options), prompts=prompts)
    assert count * length <= sum(tokens) <= 1.1 * count * length


@pytest.mark.parametrize("batch_size", [1, 3])
def test_activity_and_energy_are_those_of_the_inputs_of_each_prompt(batch_size: int) -> None:
    model, name = tiny_llama(torch.float64), "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    with torch.no_grad():
        for ids in PROMPTS:
            model(input_ids=ids[None])
    hook.remove()
    given = config(score="activity", target_modules=[name], probe_batch_size=batch_size)
    found = probe(model, given, prompts=PROMPTS).modules[name]
    expected = torch.stack([hidden.abs().mean(0) for hidden in seen])
    torch.testing.assert_close(found.activity.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.energy.double(), torch.cat(seen).square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.mean_activity(found).double(), expected.mean(0), rtol=1e-6, atol=0)


def test_a_plain_module_is_probed_with_the_callers_inputs() -> None:
    """Also one whose output has no shape that a projection could have."""

    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"found": self.linear(x)}

    inputs = [{"x": torch.tensor([[1.0, -2, 3, number]])} for number in (0.0, 4.0)]
    given = config(score="activity", target_modules=["linear"], task_type=None)
    found = probe(seeded(Loose), given, prompts=inputs).modules["linear"]
    assert found.activity.tolist() == [[1, 2, 3, 0], [1, 2, 3, 4]]
    assert found.energy.tolist() == [2, 8, 18, 16]


@pytest.mark.filterwarnings("ignore:.*none of its weights is among those selected")
@pytest.mark.parametrize("scope", ["matrix", "row", "layer", "model"])
def test_the_quietest_channels_train(scope: str) -> None:
    """Against a walk from the quietest channel on, to a quarter of every group; of the last channel the first rows."""
    base = tiny_llama()
    found = probe(base, config(score="activity")).modules
    chosen = {name: torch.zeros(base.get_submodule(name).weight.shape, dtype=torch.bool) for name in found}
    groups: dict[str, list[tuple[float, int, str, int]]] = {}
    for number, (name, module) in enumerate(found.items()):
        group = {"layer": name.split(".")[2], "model": ""}.get(scope, name)
        mean = module.activity.double().mean(0).float().tolist()
        groups.setdefault(group, []).extend((h, number, name, channel) for channel, h in enumerate(mean))
    for channels in groups.values():
        left = round(0.25 * sum(len(chosen[name]) for *_, name, _ in channels))
        for *_, name, channel in sorted(channels):
            chosen[name][:left, channel] = True
            left -= min(left, len(chosen[name]))
    model = get_peft_model(base, config(score="activity", scope=scope, update_ratio=0.25))
    layers = {layer.module_name: layer for layer in model.modules() if isinstance(layer, DowserLayer)}
    assert layers.keys() == {name for name, mask in chosen.items() if mask.any()}
    for name, layer in layers.items():
        assert torch.equal(layer.index("default").decoded().long(), chosen[name].view(-1).nonzero().view(-1)), name


@pytest.mark.parametrize("score", ["shift", "activity"])
@pytest.mark.parametrize("kind", ["Conv1D", "head", "seq2seq", "encoder"])
def test_the_lowest_scores_of_every_matrix_train(kind: str, score: str) -> None:
    make, options = MODELS[kind]
    modules = probe(make(), config(**options)).modules
    model = get_peft_model(make(), config(score=score, **options))
    layers = [layer for layer in model.modules() if isinstance(layer, DowserLayer)]
    assert {layer.module_name for layer in layers} == modules.keys()
    for layer in layers:
        module = modules[layer.module_name]
        gain = module.sensitivity if score == "shift" else torch.ones_like(module.sensitivity)
        expected = gain.double().T @ module.activity.double()
        expected = expected.T if kind == "Conv1D" else expected
        trained = torch.zeros(expected.shape, dtype=torch.bool)
        trained.view(-1)[layer.index("default").decoded().long()] = True
        assert int(trained.sum()) == round(0.1 * trained.numel())
        assert expected[trained].max() <= expected[~trained].min() * (1 + 1e-6)
