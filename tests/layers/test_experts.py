"""Fused weights of experts: exact products, statistics and ranking per expert, and the life of such adapters."""

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import cpu_offload
from datasets import Dataset
from groups import on_ranks
from models import MOE, CountedOps, config, set_values, tiny_llama, tiny_moe
from packaging.version import Version
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
)
from trl import SFTConfig, SFTTrainer

from peft_dowser import DeltaFormatError, DowserLayer, ProbeStatistics, probe
from peft_dowser.base.fused import Product, standing_in, weight_of, wrapped_forward
from peft_dowser.base.search import resolve_targets
from peft_dowser.cli import main
from peft_dowser.delta.apply import add_delta_
from peft_dowser.delta.seeds import derived_seed
from peft_dowser.files.inspection import inspect
from peft_dowser.files.merging import merge, verify
from peft_dowser.layers.experts import Experts
from peft_dowser.layers.experts_op import expert_bounds, sparse_experts
from peft_dowser.layers.layer import dowser_layers
from peft_dowser.probing import scores

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss"]
GATE_UP, DOWN = (f"model.layers.0.{name}" for name in PARAMETERS)


def with_experts(model: PreTrainedModel, **changes: Any) -> PeftModel:
    """The model with an adapter on all experts and on no linear, whose values look trained."""
    options = {"target_parameters": PARAMETERS, "target_modules": [], "score": "magnitude"} | changes
    peft_model = get_peft_model(model, config(**options))
    set_values(peft_model)
    return peft_model


def layers_of(model: nn.Module) -> dict[str, DowserLayer]:
    return {layer.module_name: layer for layer in model.modules() if isinstance(layer, DowserLayer)}


def by_hand(base: PreTrainedModel, model: nn.Module, adapters: tuple[str, ...] = ("default",)) -> PreTrainedModel:
    """The base with the deltas written into it, by the rule of a merge."""
    merged = copy.deepcopy(base)
    for layer in layers_of(model).values():
        for adapter in adapters:
            delta = layer.delta(adapter)
            add_delta_(merged.get_parameter(layer.target.tensor_name).data, delta.positions, delta.values)
    return merged


def some_ids(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_those_of_the_merged_model_bit_for_bit(
    family: str, dtype: torch.dtype, implementation: str
) -> None:
    base = tiny_moe(family, dtype)
    base.set_experts_implementation(implementation)
    original = copy.deepcopy(base)
    model = with_experts(base)
    model.add_adapter("other", config(target_parameters=PARAMETERS, target_modules=[], score="random", seed=5))
    set_values(model, seed=1)
    ids = some_ids()
    for adapters in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(adapters)
        expected = by_hand(original, model, tuple(adapters))(ids).logits
        assert not torch.equal(expected, original(ids).logits)
        assert torch.equal(model(ids).logits, expected)
        model.merge_adapter()
        assert torch.equal(model(ids).logits, expected)
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, original(ids).logits)
    unloaded = model.merge_and_unload()
    assert not any(isinstance(module, Experts) for module in unloaded.modules())
    assert torch.equal(unloaded(ids).logits, expected)


def test_stand_ins_are_inside_the_forward_of_accelerate() -> None:
    """Which brings the parameters of an offloaded module by their names, and takes them away again."""
    experts = tiny_moe("gpt_oss").model.layers[0].mlp.experts
    x, chosen, weights = torch.randn(5, 16), torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
    expected = experts(x, chosen, weights)
    cpu_offload(experts, execution_device=torch.device("cpu"))
    seen = []

    def bare(product: Product) -> Tensor:
        seen.append(product)
        return product.compute(weight_of(experts, "down_proj"))

    def forward(inner: Callable[..., Any], *args: Any) -> Any:
        with standing_in(experts, {"down_proj": bare}):
            return inner(*args)

    with wrapped_forward(experts, forward):
        assert torch.equal(experts(x, chosen, weights), expected)
    assert len(seen) == 1
    assert experts.down_proj.is_meta
    assert torch.equal(experts(x, chosen, weights), expected)


def test_the_fallback_of_grouped_products_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.moe._can_use_grouped_mm", lambda *args: False)
    base = tiny_moe("qwen3_moe")
    model, ids = with_experts(copy.deepcopy(base)), some_ids()
    assert torch.equal(model(ids).logits, by_hand(base, model)(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_unload_gives_the_base_back_bit_for_bit(family: str) -> None:
    base = tiny_moe(family, torch.bfloat16)
    original = copy.deepcopy(base)
    model = with_experts(base)
    model.merge_adapter()
    unloaded = model.unload()
    assert unloaded.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(value, original.state_dict()[key]) for key, value in unloaded.state_dict().items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_dense_twin_at_the_positions(family: str, implementation: str) -> None:
    base = tiny_moe(family)
    base.set_experts_implementation(implementation)
    model = with_experts(copy.deepcopy(base))
    dense = by_hand(base, model)
    ids = some_ids()
    for each in (model, dense):
        each(input_ids=ids, labels=ids).loss.backward()
    for name, layer in layers_of(model).items():
        full = dense.get_parameter(name).grad.view(-1)
        found = layer.values("default").grad
        torch.testing.assert_close(found, full[layer.delta("default").positions], rtol=1e-4, atol=1e-7)
        assert layer.weight.grad is None


def test_eager_mode_runs_no_op_of_the_library() -> None:
    for implementation in IMPLEMENTATIONS:
        model = with_experts(tiny_moe("mixtral"))
        model.set_experts_implementation(implementation)
        with CountedOps() as ops:
            model(input_ids=some_ids(), labels=some_ids()).loss.backward()
        assert ops.counts["aten::index_add_"]
        assert not [name for name in ops.counts if name.startswith("dowser::")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_size_of_an_expert_is_kept_for_the_backward(family: str, implementation: str) -> None:
    base = tiny_moe(family, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    base.set_experts_implementation(implementation)
    model = with_experts(base)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(some_ids(1, 3))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    smallest = min(layer.weight[0].numel() for layer in layers_of(model).values())
    own = [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights]
    assert own
    assert max(tensor.numel() for tensor in own if tensor.is_floating_point()) < smallest


def test_autocast_gives_the_bits_of_the_merged_model() -> None:
    for implementation in IMPLEMENTATIONS:
        base = tiny_moe("mixtral")
        base.set_experts_implementation(implementation)
        model = with_experts(copy.deepcopy(base))
        merged = by_hand(base, model)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(input_ids=some_ids(), labels=some_ids())
            assert torch.equal(outputs.logits, merged(some_ids()).logits)
        outputs.loss.backward()
        assert all(layer.values("default").grad.abs().sum() > 0 for layer in layers_of(model).values())


traced = pytest.mark.skipif(Version(torch.__version__) < Version("2.13"), reason="torch cannot trace stand-ins")


# Not grouped in bfloat16: on a CPU torch cannot trace how transformers chooses the product, without an adapter either.
@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [
        ("mixtral", "batched_mm", torch.bfloat16),
        ("mixtral", "grouped_mm", torch.float32),
        ("gpt_oss", "batched_mm", torch.float32),
        pytest.param("gpt_oss", "grouped_mm", torch.float32, marks=pytest.mark.slow),
    ],
)
@traced
def test_compiled_without_graph_breaks(family: str, implementation: str, dtype: torch.dtype) -> None:
    base = tiny_moe(family, dtype, num_hidden_layers=1)
    model, other = with_experts(copy.deepcopy(base)), with_experts(base, select="high")
    merged = copy.deepcopy(model).merge_and_unload()
    for each in (model, other, merged):
        each.set_experts_implementation(implementation)
    ids = some_ids()
    torch._dynamo.reset()
    expected = torch.compile(merged, fullgraph=True, backend="eager")(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
        model.load_state_dict(other.state_dict())
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, other(input_ids=ids).logits, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("implementation", "autocast"), [("batched_mm", True), ("grouped_mm", False)])
@traced
def test_compiled_gradients_are_those_of_the_model(implementation: str, autocast: bool) -> None:
    model = with_experts(tiny_moe("mixtral", num_hidden_layers=1))
    model.set_experts_implementation(implementation)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
    found = []
    for each in (model, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            each(input_ids=some_ids(), labels=some_ids(), use_cache=False).loss.backward()
        found.append([layer.values("default").grad.clone() for layer in layers_of(model).values()])
        model.zero_grad()
    for ours, theirs in zip(*found, strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3 if autocast else 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_block_gives_the_same_bits() -> None:
    model = with_experts(tiny_moe("mixtral"))
    block = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    x = torch.randn(2, 5, 16)
    found = torch.compile(block, backend="eager")(x)
    assert torch.equal(found, block(x))
    found.sum().backward()
    assert layers_of(model)[GATE_UP].values("default").grad.any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["one", "each"])
def test_the_gradient_of_a_product_is_right_in_float64(kind: str, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 5) if transposed else (3, 5, 4)
    module = nn.Module()
    module.weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator), requires_grad=False)
    weight = module.weight
    positions = torch.tensor([0, 3, 19, 20, 21, 45, 59], dtype=torch.int32)  # in all of the experts
    chosen = torch.tensor([2, 0, 2, 2])

    def run(x: Tensor, values: Tensor) -> Tensor:
        def multiply(product: Product) -> Tensor:
            if product.expert is None:
                return sparse_experts(product, weight, [values], [positions])
            return sparse_experts(product, weight, [values[5:]], [positions[5:]])

        with standing_in(module, {"weight": multiply}):
            if kind == "one":
                return x @ module.weight[2] if transposed else F.linear(x, module.weight[2])
            several = module.weight[chosen]
            return torch.bmm(x[:, None], several) if transposed else torch.bmm(several, x[..., None])

    x = torch.randn(4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    values = torch.randn(7, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, values))
    dense = weight.detach().clone()
    add_delta_(dense, positions, values.detach())
    expected = torch.stack([row @ (dense[e] if transposed else dense[e].T) for row, e in zip(x, chosen, strict=True)])
    if kind == "each":
        torch.testing.assert_close(run(x, values).reshape(4, 5), expected)


def test_experts_of_more_than_two_to_the_31_weights_are_told_apart() -> None:
    shape = (4, 1 << 15, 1 << 15)  # not allocated
    positions = torch.tensor([5, (1 << 30) - 1, 1 << 30, (1 << 31) + 7, (1 << 32) - 1])
    assert expert_bounds(positions, shape) == [0, 2, 3, 4, 5]
    largest = torch.tensor([0, (1 << 31) - 2], dtype=torch.int32)
    assert expert_bounds(largest, (1, 1, (1 << 31) - 1)) == [0, 2]


class Odd(nn.Module):
    """An experts module that does something to its parameter."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.ones(4, 3, 2))
        self.use = use

    def forward(self, x: Tensor) -> Any:
        return self.use(x, self.down_proj)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight: x + weight,
        lambda x, weight: torch.mul(weight[0], 2),
        lambda x, weight: torch.einsum("ab,cb->ac", x, weight[0]),
        lambda x, weight: F.linear(x, weight[0], torch.ones(3)),
        lambda x, weight: x[None] @ weight.mT,
        lambda x, weight: torch.bmm(x[None].expand(4, -1, -1), weight.mT),
        lambda x, weight: weight.data,
        lambda x, weight: weight[0][0],
        lambda x, weight: weight[:2],
        lambda x, weight: weight.transpose(0, 1),
        lambda x, weight: weight.sum(),
    ],
)
def test_a_product_that_cannot_be_followed_is_an_error(use: Callable[[Tensor, Tensor], Any]) -> None:
    odd = Odd(use)
    with (
        standing_in(odd, {"down_proj": lambda product: product.x}),
        pytest.raises(
            (NotImplementedError, AttributeError), match=r"forward of Odd uses .* of its parameter 'down_proj'.*'eager'"
        ),
    ):
        odd(torch.ones(5, 2))
    assert isinstance(odd.down_proj, nn.Parameter)


def test_the_metadata_of_a_stand_in_is_that_of_the_parameter() -> None:
    def shapes(x: Tensor, weight: Tensor) -> list[Any]:
        several = weight[torch.tensor([0, 1, 1])]
        parts = (weight, weight[1], weight.mT, weight[1].T, several, several.transpose(-2, -1))
        return [(*part.shape, part.dim(), part.dtype, part.device) for part in parts]

    odd = Odd(shapes)
    expected = odd(torch.ones(1))
    with standing_in(odd, {"down_proj": lambda product: product.x}):
        assert odd(torch.ones(1)) == expected


def test_stand_ins_go_when_the_forward_fails() -> None:
    model = with_experts(tiny_moe("gpt_oss"))
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    with pytest.raises(Exception):  # noqa: B017
        experts(torch.zeros(3, 16))
    assert isinstance(experts.base_layer.down_proj, nn.Parameter)


# Off the CPU


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are not on a CPU, so that they take the way of a GPU."""
    monkeypatch.setattr(Tensor, "is_cpu", False)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("tokens", [1, 9])  # of which each goes to two experts: fewer rows than experts, and more
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_off_the_cpu_outputs_and_gradients_are_those_of_a_dense_twin(
    family: str, implementation: str, dtype: torch.dtype, tokens: int
) -> None:
    base = tiny_moe(family, dtype)
    base.set_experts_implementation(implementation)
    model = with_experts(copy.deepcopy(base))
    model.add_adapter("other", config(target_parameters=PARAMETERS, target_modules=[], score="random", seed=5))
    set_values(model, seed=1)
    model.base_model.set_adapter(["default", "other"])
    dense = by_hand(base, model, ("default", "other"))
    ids = some_ids(1, tokens)
    outputs = [each(input_ids=ids) for each in (model, dense)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.logits.float().square().sum().backward()
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
    for name, layer in layers_of(model).items():
        full = dense.get_parameter(name).grad.view(-1).float()
        for adapter in ("default", "other"):
            found, expected = layer.values(adapter).grad, full[layer.delta(adapter).positions]
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(full.abs().max()))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("transposed", [False, True])
def test_off_the_cpu_grouped_gradients_are_those_of_one_product_per_expert(transposed: bool) -> None:
    """Also where experts have no rows, and rows no expert."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((4, 16, 24) if transposed else (4, 24, 16), generator=generator)
    positions = torch.randperm(weight.numel(), generator=generator)[:300].sort().values.int()
    values = torch.randn(300, generator=generator, requires_grad=True)
    x = torch.randn(10, 16, generator=generator, requires_grad=True)
    grad = torch.randn(10, 24, generator=generator)
    ends = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    output = sparse_experts(Product(x, "grouped_mm", transposed, 24, ends=ends), weight, [values], [positions])
    of_x, of_values = torch.autograd.grad(output, (x, values), grad)
    dense = weight.clone()
    add_delta_(dense, positions, values.detach())
    of_weight = torch.zeros_like(dense)
    for expert, rows in ((0, slice(0, 3)), (2, slice(3, 8)), (3, slice(8, 9))):
        matrix = dense[expert].T if transposed else dense[expert]
        product = grad[rows].T @ x[rows].detach()
        of_weight[expert] = product.T if transposed else product
        torch.testing.assert_close(output[rows], F.linear(x[rows], matrix))
        torch.testing.assert_close(of_x[rows], grad[rows] @ matrix)
    torch.testing.assert_close(of_values, of_weight.view(-1)[positions.long()])


# Probing, against a model in which every expert is a linear of its own.


class Listed(nn.Module):
    """The experts as linears, each token by itself."""

    def __init__(self, experts: nn.Module, transposed: bool) -> None:
        super().__init__()
        self.gate = getattr(experts, "_apply_gate", None)
        self.linears = {}
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name).detach()
            bias = getattr(experts, f"{name}_bias", None)
            for expert in range(len(weight)):
                matrix = weight[expert].T if transposed else weight[expert]
                linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, dtype=weight.dtype)
                linear.weight.data = matrix.clone()
                if bias is not None:
                    linear.bias.data = bias[expert].detach().clone()
                self.linears[name, expert] = linear
        self.seen: list[tuple[str, int, Tensor, Tensor]] = []

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        rows = []
        for token in range(len(hidden)):
            total = 0
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                between = self.gate(self.apply_to("gate_up_proj", expert, hidden[token]))
                total = total + weight * self.apply_to("down_proj", expert, between)
            rows.append(total)
        return torch.stack(rows)

    def apply_to(self, name: str, expert: int, x: Tensor) -> Tensor:
        z = self.linears[name, expert](x)
        if not z.requires_grad:
            z = z.detach().requires_grad_(True)
        self.seen.append((name, expert, x.detach(), z))
        return z


def oracle(model: PreTrainedModel, prompts: list[Tensor], seed: int, draws: int) -> dict[str, dict[str, Tensor]]:
    """Statistics of every expert of layer 0, prompt by prompt and token by token."""
    model = copy.deepcopy(model).requires_grad_(False)
    block = model.model.layers[0].mlp
    transposed = type(block.experts).__name__ == "GptOssExperts"
    sizes = {name: getattr(block.experts, name).shape for name in ("gate_up_proj", "down_proj")}
    block.experts = listed = Listed(block.experts, transposed).requires_grad_(False)
    found: dict[str, dict[str, Tensor]] = {}
    for name, (experts, rows, columns) in sizes.items():
        out, width = (columns, rows) if transposed else (rows, columns)
        for expert in range(experts):
            found[f"model.layers.0.mlp.experts.{name}[{expert}]"] = {
                "sensitivity": torch.zeros(len(prompts), out),
                "activity": torch.zeros(len(prompts), width),
                "energy": torch.zeros(width),
                "tokens": torch.zeros(()),
            }
    for number, ids in enumerate(prompts):
        listed.seen = []
        logits = model(input_ids=ids[None], use_cache=False).logits[0, -1]
        generator = torch.Generator().manual_seed(derived_seed(seed, "rademacher", number))
        for name, expert, x, _ in listed.seen:
            statistics = found[f"model.layers.0.mlp.experts.{name}[{expert}]"]
            statistics["activity"][number] += x.abs() / len(ids)
            statistics["energy"] += x.square()
            statistics["tokens"] += 1
        for _ in range(draws):
            xi = 2.0 * torch.randint(2, logits.shape, generator=generator, dtype=torch.int8) - 1
            grads = torch.autograd.grad(logits, [z for *_, z in listed.seen], xi, retain_graph=True)
            for (name, expert, *_), grad in zip(listed.seen, grads, strict=True):
                key = f"model.layers.0.mlp.experts.{name}[{expert}]"
                found[key]["sensitivity"][number] += grad.abs() / len(ids) / draws
    return found


PROMPTS = [torch.tensor([1, 5, 9, 13, 40, 7]), torch.tensor([1, 20, 3]), torch.tensor([1, 8, 8, 31])]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_experts_that_are_linears(family: str, implementation: str) -> None:
    model = tiny_moe(family)
    expected = oracle(model, PROMPTS, seed=4, draws=3)
    model.set_experts_implementation(implementation)
    settings = config(target_parameters=PARAMETERS, target_modules=[], num_rademacher=3, seed=4)
    found = probe(model, settings, prompts=PROMPTS).modules
    reached = {name for name, statistics in expected.items() if statistics.pop("tokens") > 0}
    assert {name for name in found if ".layers.0." in name} == reached
    for name in reached:
        for field, value in expected[name].items():
            torch.testing.assert_close(getattr(found[name], field), value, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*of the target matrices stay frozen")
@pytest.mark.parametrize("score", ["shift", "activity"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_trains_its_own_lowest_scores(family: str, score: str, tmp_path: Path) -> None:
    """Against the factors of experts that are linears, multiplied prompt by prompt."""
    base = tiny_moe(family)
    given = config(score=score, target_parameters=PARAMETERS, target_modules=[], seed=4)
    probe(base, given, prompts=PROMPTS).save(tmp_path / "probe.safetensors")
    expected = oracle(base, PROMPTS, seed=4, draws=given.num_rademacher)
    given.statistics = str(tmp_path / "probe.safetensors")
    model = get_peft_model(base, given)
    layers = [layer for layer in dowser_layers(model) if ".layers.0." in layer.module_name]
    assert len(layers) == 2
    for layer in layers:
        trained = torch.zeros(layer.weight.shape, dtype=torch.bool)
        trained.view(-1)[layer.index("default").decoded().long()] = True
        for expert, mask in enumerate(trained):
            factors = expected[f"{layer.module_name}[{expert}]"]
            chosen = mask.T if family == "gpt_oss" else mask
            gain = factors["sensitivity"] if score == "shift" else torch.ones_like(factors["sensitivity"])
            found = gain.double().T @ factors["activity"].double()
            assert int(chosen.sum()) == (round(0.1 * chosen.numel()) if factors["tokens"] else 0)
            assert not chosen.any() or found[chosen].max() <= found[~chosen].min() * (1 + 1e-5)


def test_batches_and_untargeted_parameters_do_not_matter() -> None:
    model = tiny_moe("qwen3_moe")
    settings = {"target_parameters": PARAMETERS, "target_modules": None, "seed": 5}
    together = probe(model, config(**settings), prompts=PROMPTS).modules
    alone = probe(model, config(**settings, probe_batch_size=1), prompts=PROMPTS).modules
    only_down = probe(model, config(**settings | {"target_modules": [], "target_parameters": PARAMETERS[1:]}), PROMPTS)
    assert together.keys() == alone.keys()
    assert all(
        key.startswith(tuple(f"model.layers.{n}.mlp.experts.down_proj[" for n in (0, 1))) for key in only_down.modules
    )
    for name, module in together.items():
        others = [alone[name]] + ([only_down.modules[name]] if name in only_down.modules else [])
        for other in others:
            torch.testing.assert_close(module.sensitivity, other.sensitivity, rtol=1e-4, atol=1e-8)
            torch.testing.assert_close(module.activity, other.activity, rtol=1e-4, atol=1e-8)


def test_the_gradient_score_is_that_of_the_dense_gradient() -> None:
    for family in FAMILIES:
        model = tiny_moe(family)
        settings = config(target_parameters=PARAMETERS, target_modules=[], score="gradient")
        found = probe(model, settings, prompts=PROMPTS).modules
        for ids in PROMPTS:
            logits = model(input_ids=ids[None]).logits[0]
            (F.cross_entropy(logits[:-1], ids[1:]) / len(PROMPTS)).backward()
        gradient = model.get_parameter(GATE_UP).grad
        for expert in range(len(gradient)):
            if f"{GATE_UP}[{expert}]" in found:
                dense = gradient[expert].T if family == "gpt_oss" else gradient[expert]
                torch.testing.assert_close(found[f"{GATE_UP}[{expert}]"].gradient, dense, rtol=1e-4, atol=1e-7)
            else:
                assert not gradient[expert].any()


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = tiny_moe("gpt_oss")
    before = copy.deepcopy(model.state_dict())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    probe(model, config(target_parameters=PARAMETERS))
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, nn.Parameter)


# Ranking


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_expert_is_ranked_by_itself(family: str) -> None:
    model = tiny_moe(family)
    settings = config(target_parameters=PARAMETERS, target_modules=[], update_ratio=0.2, num_probes=32)
    statistics = probe(model, settings).modules
    weight = model.get_parameter(GATE_UP).detach().clone()
    layer = layers_of(get_peft_model(model, settings))[GATE_UP]
    numel = weight[0].numel()
    positions = layer.delta("default").positions.long()
    assert (positions.diff() > 0).all()
    for expert, matrix in enumerate(weight):
        dense = matrix.T if family == "gpt_oss" else matrix
        score = scores.dowser(dense, statistics[f"{GATE_UP}[{expert}]"])
        score = (score.T if family == "gpt_oss" else score).reshape(-1)
        own = positions[(positions >= expert * numel) & (positions < (expert + 1) * numel)] - expert * numel
        assert len(own) == round(0.2 * numel)
        frozen = torch.ones(numel, dtype=torch.bool).index_fill_(0, own, False)
        assert score[own].max() <= score[frozen].min()


def test_statistics_from_a_file_give_the_same_masks(tmp_path: Path) -> None:
    settings = {"target_parameters": PARAMETERS, "num_probes": 32}
    probe(tiny_moe("gpt_oss"), config(**settings)).save(tmp_path / "statistics")
    saved = get_peft_model(tiny_moe("gpt_oss"), config(**settings, statistics=str(tmp_path / "statistics")))
    probed = layers_of(get_peft_model(tiny_moe("gpt_oss"), config(**settings)))
    for name, layer in layers_of(saved).items():
        assert torch.equal(layer.delta("default").positions, probed[name].delta("default").positions)


@pytest.mark.parametrize("scope", ["row", "layer", "model"])
def test_the_other_scopes_count_exactly(scope: str) -> None:
    layers = layers_of(with_experts(tiny_moe("mixtral"), scope=scope, update_ratio=0.25))
    numel = sum(layer.target.numel for layer in layers.values())
    assert sum(layer.delta("default").values.numel() for layer in layers.values()) == numel // 4
    if scope == "row":
        layer = layers[DOWN]
        rows = torch.bincount(layer.delta("default").positions // layer.target.shape[2], minlength=4 * 16)
        assert set(rows.tolist()) == {6}


def test_a_ratio_pattern_names_the_parameter() -> None:
    layers = layers_of(
        with_experts(tiny_moe("mixtral"), ratio_pattern={"experts.down_proj": 0.5, "0.mlp.experts.gate_up_proj": 0})
    )
    assert GATE_UP not in layers
    assert layers[DOWN].delta("default").values.numel() == layers[DOWN].target.numel // 2


def test_experts_without_a_token_are_frozen_and_named() -> None:
    model = tiny_moe("gpt_oss")
    for layer in model.model.layers:
        layer.mlp.router.bias.data[[1, 3]] = -1e4
    message = r"mlp\.experts\.gate_up_proj: experts 1, 3 \(no probe reached"
    with pytest.warns(UserWarning, match=message):
        peft_model = get_peft_model(model, config(target_parameters=PARAMETERS, target_modules=[]))
    for layer in layers_of(peft_model).values():
        trained = (layer.delta("default").positions // layer.weight[0].numel()).unique()
        assert trained.tolist() == [0, 2]


# Files, several adapters, training


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_to_load_gives_the_same_model(family: str, tmp_path: Path) -> None:
    base = tiny_moe(family)
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = with_experts(copy.deepcopy(base), target_modules=None)
    ids = some_ids()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    keys = set(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert f"base_model.model.{GATE_UP}.dowser_values.weight" in keys
    assert f"base_model.model.{GATE_UP}.dowser_index.code" in keys
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].nnz_pattern[GATE_UP] == layers_of(model)[GATE_UP].values("default").numel()
    plain = copy.deepcopy(base)
    plain.load_adapter(str(tmp_path / "adapter"))
    low = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"), low_cpu_mem_usage=True)
    auto = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    for other in (loaded, plain, low, auto):
        assert torch.equal(other(ids).logits, expected)
    assert torch.equal(copy.deepcopy(loaded)(ids).logits, expected)


def test_a_damaged_file_is_refused_and_the_model_is_the_base_again(tmp_path: Path) -> None:
    base = tiny_moe("mixtral")
    with_experts(copy.deepcopy(base)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.{DOWN}.dowser_index.code"]
    save_file(tensors, path, metadata={"format": "pt"})
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(DeltaFormatError, match="missing"):
        PeftModel.from_pretrained(base, str(tmp_path))
    assert [name for name, _ in base.named_parameters()] == names
    assert not any(isinstance(module, Experts) for module in base.modules())


def test_adapters_on_different_parameters_live_side_by_side(tmp_path: Path) -> None:
    base = tiny_moe("mixtral")
    model = with_experts(copy.deepcopy(base), target_parameters=PARAMETERS[:1], target_modules=["q_proj"])
    model.add_adapter(
        "down", config(target_parameters=PARAMETERS[1:], target_modules=["q_proj", "o_proj"], score="magnitude")
    )
    set_values(model)
    ids = some_ids()
    both = {}
    for name in ("default", "down"):
        model.set_adapter(name)
        both[name] = model(ids).logits
        assert torch.equal(both[name], by_hand(base, model, (name,))(ids).logits)
    model.save_pretrained(tmp_path)
    alone = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "down"), adapter_name="down")
    assert torch.equal(alone(ids).logits, both["down"])
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, both["down"])
    assert {name for name, layer in layers_of(model).items() if layer.dowser_values} == set(layers_of(alone))


def test_adapters_are_combined_and_copied() -> None:
    base = tiny_moe("gpt_oss")
    settings = config(target_parameters=PARAMETERS, target_modules=["q_proj"], score="random")
    model = get_peft_model(copy.deepcopy(base), settings)
    model.add_adapter("second", config(target_parameters=PARAMETERS[:1], target_modules=[], score="random", seed=3))
    set_values(model)
    model.base_model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "sum")
    model.set_adapter("sum")
    ids = some_ids()
    expected = copy.deepcopy(base)
    for layer in layers_of(model).values():
        weight = expected.get_parameter(layer.target.tensor_name).data
        for adapter, factor in (("default", 1.0), ("second", 0.5)):
            delta = layer.delta(adapter)
            add_delta_(weight, delta.positions, factor * delta.values)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-6)
    model.set_adapter("default")
    before = model(ids).logits
    model.add_adapter("ref", model.peft_config["default"])  # as TRL makes its reference model
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_the_chosen_weights_only(family: str) -> None:
    base = tiny_moe(family)
    original = copy.deepcopy(base)
    model = get_peft_model(base, config(target_parameters=PARAMETERS, target_modules=["q_proj"], num_probes=32))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, losses = some_ids(), []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = {name: layer.delta("default").positions.long() for name, layer in layers_of(model).items()}
    merged = model.merge_and_unload().state_dict()
    for key, value in original.state_dict().items():
        changed = (merged[key] != value).view(-1).nonzero().view(-1)
        allowed = trained.get(key, trained.get(key.removesuffix(".weight"), torch.empty(0)))
        assert torch.isin(changed, allowed).all()
    assert (merged[DOWN] != original.state_dict()[DOWN]).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(reentrant: bool) -> None:
    model = with_experts(tiny_moe("gpt_oss")).train()
    ids, found = some_ids(), []
    for checkpointing in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
                model.enable_input_require_grads()
            model.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
        found.append([layer.values("default").grad.clone() for layer in layers_of(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert all(grad.abs().sum() > 0 for grad in found[0])


@pytest.mark.filterwarnings("ignore")
def test_sft_trains_saves_and_generates(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "examples" / "tiny_llava")
    base = tiny_moe("mixtral", vocab_size=len(tokenizer))
    trainer = SFTTrainer(
        model=copy.deepcopy(base),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"rev {a}b?", "completion": f"b{a}"} for a in "abcdefgh"]),
        processing_class=tokenizer,
        peft_config=config(target_parameters=PARAMETERS, num_probes=32),
    )
    trainer.train()
    model = trainer.model.eval()
    assert all(layer.values("default").abs().sum() > 0 for layer in layers_of(model).values())
    trained = {name: layer.values("default").detach().clone() for name, layer in layers_of(model).items()}
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # at its last step: loads and stops
    assert all(torch.equal(layer.values("default"), trained[name]) for name, layer in layers_of(model.eval()).items())
    ids = some_ids(1, 4)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "checkpoint-2")).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    written = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, by_hand(base, model).generate(ids, max_new_tokens=5, do_sample=False))


def sharded_losses(rank: int, size: int = 2) -> dict[str, list[float]]:
    """Losses of a few steps on this rank's part of every batch, by experts implementation; size 1 is not sharded."""
    found = {}
    for implementation in ("eager", "grouped_mm"):
        base = tiny_moe("mixtral")
        base.set_experts_implementation(implementation)
        model = with_experts(base, target_modules=["q_proj"]).train()
        if size > 1:
            mesh = init_device_mesh("cpu", (size,))
            for layer in base.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
        found[implementation] = []
        for _ in range(3):
            part = some_ids(4, 10).chunk(size)[rank]
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found[implementation].append(loss.item())
    return found


@pytest.mark.slow
def test_sharded_experts_train_as_one_process_does(tmp_path: Path) -> None:
    parts = on_ranks(sharded_losses, tmp_path)
    for implementation, losses in sharded_losses(0, size=1).items():
        means = [sum(pair) / 2 for pair in zip(*(part[implementation] for part in parts), strict=True)]
        assert means == pytest.approx(losses, rel=1e-5)
        assert losses[2] < losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_streams_fused_parameters_and_those_in_pieces(family: str, tmp_path: Path) -> None:
    base = tiny_moe(family, torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    stored = {key for path in (tmp_path / "base").glob("*.safetensors") for key in load_file(path)}
    assert (GATE_UP in stored) == (family == "gpt_oss")
    model = with_experts(base, target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    counts = merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    assert counts == {name: layer.values("default").numel() for name, layer in layers_of(model).items()}
    model.merge_and_unload().save_pretrained(tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in merged.items())
    assert verify(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") == []
    assert verify(tmp_path / "adapter", tmp_path / "base", tmp_path / "base") != []


def test_pieces_of_another_shape_are_refused(tmp_path: Path) -> None:
    tiny_moe("mixtral").save_pretrained(tmp_path / "base")
    with_experts(tiny_moe("mixtral")).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "layers.0" in key and key.endswith("experts.2.w2.weight"))
    for change, message in (
        ({key: tensors[key][:-1].contiguous()}, r"\(3 times\) and F32 of shape \(15,"),
        ({key: tensors[key].to(torch.int8)}, r"\(3 times\) and I8 of shape \(16,"),
    ):
        save_file(tensors | change, path, metadata={"format": "pt"})
        with pytest.raises(DeltaFormatError, match=rf"target weight '{DOWN}' is F32 of shape \(16, .*{message}"):
            merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, path, metadata={"format": "pt"})
    with pytest.raises(DeltaFormatError, match=rf"'{DOWN}' is F32 of shape \(16, \d+\) \(3 times\) in"):
        merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "base")


def test_the_command_knows_experts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = tiny_moe("mixtral")
    base.save_pretrained(tmp_path / "base")
    output = tmp_path / "statistics"
    options = ["--num-probes", "4", "--num-rademacher", "1", "--probe-length", "8", "--target-parameters", *PARAMETERS]
    assert main(["probe", str(tmp_path / "base"), "-o", str(output), *options]) == 0
    assert any(name.startswith(f"{DOWN}[") for name in ProbeStatistics.load(output).modules)
    with_experts(base).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "adapter")]) == 0
    assert GATE_UP in capsys.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_experts_that_vanish_are_counted_however_the_checkpoint_holds_them(
    family: str, tmp_path: Path
) -> None:
    base = tiny_moe(family, torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    original = copy.deepcopy(base)
    model = with_experts(base)
    set_values(model, std=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    merged = by_hand(original, model)
    found = inspect(tmp_path / "adapter", tmp_path / "base")["modules"]
    assert {row["module"] for row in found} == layers_of(model).keys()
    for row in found:
        changed = int((merged.get_parameter(row["module"]) != original.get_parameter(row["module"])).sum())
        assert row["vanished"] * row["trained"] == pytest.approx(row["trained"] - changed)
        assert 0 < row["vanished"] < 1


# Names


def test_the_default_leaves_experts_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_dowser.tuner.model"):
        model = get_peft_model(tiny_moe("qwen3_moe"), config())
    assert not any("experts" in name for name in layers_of(model))
    assert "0.0 million weights of experts are not adapted" in caplog.text
    assert "target_parameters=['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']" in caplog.text


def test_other_parameters_of_three_dimensions_are_no_experts(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    model.model.layers[0].self_attn.bias_table = nn.Parameter(torch.ones(2, 3, 4))
    with caplog.at_level(logging.WARNING, logger="peft_dowser.tuner.model"):
        get_peft_model(model, config(score="magnitude"))
    assert caplog.text == ""


OTHERS: dict[str, Any] = {
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 4}),
    "granitemoe": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 4}),
    "jamba": (
        JambaForCausalLM,
        JambaConfig,
        {"num_experts": 4, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1}
        | {"expert_layer_offset": 0, "use_mamba_kernels": False},
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
        | {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        | {"head_dim": 4, "num_key_value_heads": 2},
    ),
}


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_adapted_alike(family: str) -> None:
    if family in ("granitemoe", "jamba") and Version(transformers.__version__) < Version("5.15"):
        pytest.skip("transformers calls these experts otherwise before 5.15, or cannot run this model")
    kind, settings, changes = OTHERS[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = kind(settings(**MOE | changes)).eval()
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(copy.deepcopy(base), config(target_parameters=names, target_modules=[], num_probes=32))
    set_values(model)
    ids = some_ids()
    outputs = model(input_ids=ids, labels=ids)
    assert torch.equal(outputs.logits, by_hand(base, model)(ids).logits)
    outputs.loss.backward()
    assert all(layer.values("default").grad.any() for layer in layers_of(model).values())


def test_last_layers_and_layer_lists_hold_for_experts_too() -> None:
    for changes in ({"last_layers": 1}, {"layers_to_transform": [1]}):
        for modules in (None, ["q_proj"]):
            settings = config(target_parameters=PARAMETERS, target_modules=modules, **changes)
            targets = resolve_targets(tiny_moe("mixtral"), settings)
            assert all(".layers.1." in name for name in targets)
            assert "model.layers.1.mlp.experts.down_proj" in targets


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"target_parameters": ["mlp.experts.up_proj"]},
            NoMatchingPeftModuleError,
            r"\['mlp.experts.up_proj'\] not found.*are \['mlp.experts.down_proj'",
        ),
        ({"target_parameters": ["q_proj.weight"]}, ValueError, "not the fused weights of experts.*target_modules"),
        (
            {"target_modules": ["q_proj", "gate_up_proj"]},
            ValueError,
            r"target_parameters=\['mlp.experts.gate_up_proj'\]",
        ),
        ({"target_modules": ["experts"]}, TypeError, r"MixtralExperts.*target_parameters=\['mlp.experts.gate_up_proj'"),
    ],
)
def test_wrong_names_are_refused_with_the_right_ones(changes: dict, error: type[Exception], message: str) -> None:
    model = tiny_moe("mixtral")
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**changes))
    assert not any(isinstance(module, DowserLayer) for module in model.modules())


@pytest.mark.parametrize("names", [["default", "__base__"], ["__base__", "__base__"]])
def test_experts_are_refused_in_mixed_batches(names: list[str]) -> None:
    model = with_experts(tiny_moe("mixtral"))
    with pytest.raises(
        ValueError, match="changes the fused weights of experts, where the rows of a batch cannot be told"
    ):
        model(input_ids=torch.tensor([[1, 5, 9], [1, 20, 3]]), adapter_names=names)


class Loop(nn.Module):
    """Experts as anybody may write them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.linear(x, self.weight[expert]) for expert in range(3))


class AtOnce(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x.expand(3, -1, -1), self.weight).sum(0)


class NoProduct(Loop):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum((0, 1))


def llama4() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = {"num_local_experts": 4, "moe_layers": [0, 1], "interleave_moe_layer_step": 1, "intermediate_size_mlp": 32}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **own, num_key_value_heads=2, head_dim=8, vocab_size=64))


@pytest.mark.parametrize("score", ["dowser", "random"])
@pytest.mark.parametrize(
    ("build", "parameter", "kind"),
    [
        (llama4, "feed_forward.experts.down_proj", "Llama4TextExperts"),
        (llama4, "feed_forward.experts.gate_up_proj", "Llama4TextExperts"),
        (lambda: nn.Sequential(AtOnce()), "0.weight", "AtOnce"),
        (lambda: nn.Sequential(NoProduct()), "0.weight", "NoProduct"),
    ],
)
def test_parameters_that_are_used_as_a_whole_are_refused_before_the_probe(
    build: Callable[[], nn.Module], parameter: str, kind: str, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_dowser.tuner.injection.probe_targets", lambda *args: pytest.fail("probed"))
    model = build()
    given = config(score=score, target_modules=[], target_parameters=[parameter], task_type=None)
    with pytest.raises(TypeError, match=f"target_parameters: '.*' is used by {kind} as a whole, .* Leave it out"):
        get_peft_model(model, given)
    assert not any(isinstance(module, DowserLayer) for module in model.modules())


def test_experts_in_a_loop_of_anybody_are_adapted() -> None:
    model = get_peft_model(
        nn.Sequential(Loop()),
        config(score="random", target_modules=[], target_parameters=["0.weight"], task_type=None),
    )
    set_values(model)
    x = torch.randn(5, 8)
    found = model(x)
    assert torch.equal(found, model.merge_and_unload()(x))


def test_cuda_graphs_leave_experts_out() -> None:
    """Their ops ask for the rows of each expert, which a capture does not allow."""
    for op in (torch.ops.dowser.experts.default, torch.ops.dowser.experts_grads.default):
        assert torch.Tag.cudagraph_unsafe in op.tags
