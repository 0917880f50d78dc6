"""Arithmetic on sparse deltas, against dense matrices; and the adapters that `add_weighted_adapter` makes of it."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from models import IDS, config, logits, set_values, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dowser import DowserConfig
from peft_dowser.delta.apply import Delta
from peft_dowser.delta.arithmetic import combine, elected_mean, keep_largest, keep_random, weighted_sum
from peft_dowser.layers.layer import dowser_layers

NUMEL = 200
TYPES = ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


# Dense twins and oracles


def random_delta(nnz: int, seed: int, dtype: torch.dtype = torch.float32, low: int = 0, high: int = NUMEL) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    positions = (torch.randperm(high - low, generator=generator)[:nnz] + low).sort().values
    return Delta(positions.int(), torch.randn(nnz, generator=generator).to(dtype))


def dense(delta: Delta) -> Tensor:
    matrix = torch.zeros(NUMEL, dtype=torch.float64)
    matrix[delta.positions.long()] = delta.values.double()
    return matrix


def stored(delta: Delta) -> Tensor:
    return torch.zeros(NUMEL, dtype=torch.bool).index_fill(0, delta.positions.long(), True)


def dense_sum(matrices: list[Tensor], weights: list[float]) -> Tensor:
    return torch.stack([weight * matrix for weight, matrix in zip(weights, matrices, strict=True)]).sum(0)


def dense_ties(matrices: list[Tensor], weights: list[float], method: str) -> Tensor:
    """Elect one sign per entry, then average the weighted values that have it (Yadav et al. 2023; PEFT's weights)."""
    result = torch.zeros(NUMEL, dtype=torch.float64)
    for entry in range(NUMEL):
        values = [float(matrix[entry]) for matrix in matrices]
        votes = [(value > 0) - (value < 0) for value in values]
        sign = 1 if sum(values if method == "total" else votes) >= 0 else -1
        agreeing = [w * value for w, value, vote in zip(weights, values, votes, strict=True) if vote == sign]
        result[entry] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result


def dense_largest(delta: Delta, density: float) -> Tensor:
    """The largest entries, counted among those that the delta stores."""
    matrix = dense(delta)
    order = sorted(range(NUMEL), key=lambda entry: (-abs(float(matrix[entry])), entry))
    kept = torch.zeros(NUMEL, dtype=torch.float64)
    for entry in order[: round(density * delta.values.numel())]:
        kept[entry] = matrix[entry]
    return kept


def assert_valid(delta: Delta) -> None:
    assert (delta.positions[1:] > delta.positions[:-1]).all()
    assert delta.positions.dtype == torch.int32
    assert delta.values.dtype == torch.float32
    assert delta.values.shape == delta.positions.shape


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


SUPPORTS = {
    "random": [random_delta(60, 1), random_delta(90, 2), random_delta(30, 3)],
    "disjoint": [random_delta(30, 1, high=60), random_delta(40, 2, low=60, high=120), random_delta(9, 3, low=120)],
    "identical": [Delta(random_delta(50, 1).positions, random_delta(50, seed).values) for seed in (4, 5, 6)],
    "one empty": [random_delta(40, 1), random_delta(0, 2), random_delta(70, 3)],
    "all empty": [random_delta(0, 1), random_delta(0, 2), random_delta(0, 3)],
    "everything": [random_delta(NUMEL, 1), random_delta(NUMEL, 2), random_delta(NUMEL, 3)],
    "bfloat16": [random_delta(60, 1, torch.bfloat16), random_delta(90, 2), random_delta(30, 3, torch.float16)],
}
WEIGHTS = [0.7, -1.3, 2.0]


# Plain functions


@pytest.mark.parametrize("deltas", SUPPORTS.values(), ids=SUPPORTS)
def test_the_weighted_sum_is_the_dense_sum_on_the_union(deltas: list[Delta]) -> None:
    before = copy.deepcopy(deltas)
    found = weighted_sum(deltas, WEIGHTS)
    assert_valid(found)
    assert torch.equal(stored(found), stored(deltas[0]) | stored(deltas[1]) | stored(deltas[2]))
    torch.testing.assert_close(dense(found), dense_sum([dense(d) for d in deltas], WEIGHTS), rtol=1e-6, atol=1e-6)
    for delta, untouched in zip(deltas, before, strict=True):
        assert torch.equal(delta.positions, untouched.positions)
        assert torch.equal(delta.values, untouched.values)


@pytest.mark.parametrize("deltas", SUPPORTS.values(), ids=SUPPORTS)
def test_sums_and_differences_of_two(deltas: list[Delta]) -> None:
    left, right, _ = deltas
    for sign in (1, -1):
        found = weighted_sum([left, right], [1.0, sign])
        assert_valid(found)
        assert torch.equal(stored(found), stored(left) | stored(right))
        exact = (dense(left) + sign * dense(right)).float().double()
        assert torch.equal(dense(found), exact)


def test_entries_that_cancel_stay() -> None:
    delta = random_delta(40, 1)
    found = weighted_sum([delta, delta], [1.0, -1.0])
    assert torch.equal(found.positions, delta.positions)
    assert not found.values.any()


def test_one_delta_with_weight_one_is_a_copy_bit_for_bit() -> None:
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, 1.1])
    found = weighted_sum([Delta(torch.arange(6, dtype=torch.int32), values)], [1.0])
    assert torch.equal(bits(found.values), bits(values))
    assert found.values.data_ptr() != values.data_ptr()


def test_float64_values_stay_exact() -> None:
    exact = random_delta(40, 1, torch.float64)
    exact.values.add_(1e-12)
    for found in (weighted_sum([exact, random_delta(0, 2)], [1.0, 1.0]), keep_random(exact, 1.0, 0)):
        assert torch.equal(found.values, exact.values)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("deltas", SUPPORTS.values(), ids=SUPPORTS)
def test_the_elected_mean_is_that_of_ties(deltas: list[Delta], method: str) -> None:
    found = elected_mean(deltas, WEIGHTS, method)
    assert_valid(found)
    assert torch.equal(stored(found), stored(deltas[0]) | stored(deltas[1]) | stored(deltas[2]))
    torch.testing.assert_close(
        dense(found), dense_ties([dense(d) for d in deltas], WEIGHTS, method), rtol=1e-6, atol=1e-6
    )


def test_the_two_elections_differ_and_a_tie_elects_the_plus() -> None:
    first, *others = (
        Delta(torch.arange(2, dtype=torch.int32), torch.tensor(values)) for values in ([5.0, 2], [-1.0, -2], [-2.0, 0])
    )
    assert elected_mean([first, *others], [1, 1, 1], "total").values.tolist() == [5, 2]
    assert elected_mean([first, *others], [1, 1, 1], "frequency").values.tolist() == [-1.5, 2]


@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_the_largest_stored_entries_are_kept(density: float) -> None:
    delta = random_delta(90, 1)
    delta.values[:10] = 0.5  # ties
    found = keep_largest(delta, density)
    assert found.values.numel() == round(density * 90)
    assert torch.equal(dense(found), dense_largest(delta, density))


def test_random_entries_are_kept_and_rescaled() -> None:
    delta = random_delta(20_000, 1, high=100_000)
    state = torch.get_rng_state()
    found, again, other = (keep_random(delta, 0.3, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found.positions, again.positions)
    assert not torch.equal(found.positions, other.positions)
    assert abs(found.values.numel() / 20_000 - 0.3) < 0.02
    kept = torch.isin(delta.positions, found.positions)
    assert torch.equal(found.values, delta.values[kept] / 0.3)
    assert abs(float(found.values.double().sum() - delta.values.double().sum())) < 5 * (20_000 * 0.7 / 0.3) ** 0.5


@pytest.mark.parametrize("deltas", SUPPORTS.values(), ids=SUPPORTS)
def test_pruned_combinations(deltas: list[Delta]) -> None:
    pruned = [dense_largest(delta, 0.4) for delta in deltas]
    found = combine(deltas, WEIGHTS, "magnitude_prune", 0.4)
    torch.testing.assert_close(dense(found), dense_sum(pruned, WEIGHTS), rtol=1e-6, atol=1e-6)
    for method in ("total", "frequency"):
        found = combine(deltas, WEIGHTS, "ties", 0.4, method)
        torch.testing.assert_close(dense(found), dense_ties(pruned, WEIGHTS, method), rtol=1e-6, atol=1e-6)


def test_random_combinations() -> None:
    deltas = SUPPORTS["identical"]
    empty = random_delta(0, 0)
    alone = [[delta if delta is kept else empty for delta in deltas] for kept in deltas]
    parts = [combine(terms, [1, 1, 1], "dare_linear", 0.4, seed=3) for terms in alone]
    assert len({tuple(part.positions.tolist()) for part in parts}) == 3  # every delta draws for itself
    dense_parts = [dense(part) for part in parts]
    found = combine(deltas, WEIGHTS, "dare_linear", 0.4, seed=3)
    torch.testing.assert_close(dense(found), dense_sum(dense_parts, WEIGHTS), rtol=1e-6, atol=1e-6)
    found = combine(deltas, WEIGHTS, "dare_ties", 0.4, seed=3)
    torch.testing.assert_close(dense(found), dense_ties(dense_parts, WEIGHTS, "total"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("combination_type", TYPES[1:])
def test_density_one_keeps_everything(combination_type: str) -> None:
    deltas = SUPPORTS["random"]
    join = elected_mean if combination_type.endswith("ties") else weighted_sum
    found = combine(deltas, WEIGHTS, combination_type, 1.0)
    assert torch.equal(found.values, join(deltas, WEIGHTS).values)


def test_deltas_on_several_devices_are_refused() -> None:
    here = random_delta(3, 0)
    with pytest.raises(ValueError, match="on several devices, cpu, meta; move them to one"):
        combine([here, Delta(here.positions.to("meta"), here.values.to("meta"))], [1, 1])


# Adapters


def two_adapters(dtype: torch.dtype = torch.float32) -> PeftModel:
    """Two adapters with different ratios and modules: 'other' has no v_proj, 'default' no up_proj."""
    first = config(score="random", update_ratio=0.2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_llama(dtype), first)
    model.add_adapter("other", config(score="random", update_ratio=0.3, seed=1, target_modules=["q_proj", "up_proj"]))
    set_values(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_merged_weight_is_the_dense_formula(dtype: torch.dtype) -> None:
    model = two_adapters(dtype)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "both")
    names = {layer.module_name.rpartition(".")[2] for layer in dowser_layers(model)}
    assert names == {"q_proj", "v_proj", "up_proj"}
    expected = {}
    for layer in dowser_layers(model):
        total = torch.zeros(layer.weight.numel(), dtype=torch.float32)
        for name, weight in (("default", 0.5), ("other", -2.0)):
            delta = layer.delta(name)
            total[delta.positions.long()] += delta.values * weight
        wide = torch.promote_types(dtype, torch.float32)
        merged = (layer.weight.detach().to(wide) + total.view(layer.weight.shape)).to(dtype)
        expected[layer.module_name] = merged
    model.set_adapter("both")
    before = logits(model)
    merged = model.merge_and_unload()
    for name, weight in expected.items():
        assert torch.equal(merged.get_submodule(name).weight, weight)
    assert torch.equal(logits(merged), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_with_weight_one_is_a_copy(dtype: torch.dtype) -> None:
    model = two_adapters(dtype)
    expected = logits(model)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    for layer in dowser_layers(model):
        assert ("copy" in layer.dowser_values) == ("default" in layer.dowser_values)
        own, copied = layer.delta("default"), layer.delta("copy")
        assert torch.equal(own.positions, copied.positions)
        assert torch.equal(bits(own.values), bits(copied.values))
        assert not own.values.numel() or own.values.data_ptr() != copied.values.data_ptr()
    model.set_adapter("copy")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("combination_type", TYPES)
def test_the_result_is_an_ordinary_adapter(combination_type: str, tmp_path: Path) -> None:
    model = two_adapters()
    before = logits(model)
    density = None if combination_type == "linear" else 0.5
    rng = torch.get_rng_state()
    model.add_weighted_adapter(["default", "other"], [1.0, 0.7], "both", combination_type, density)
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), before)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".dowser_values.default." in name for name in trainable)

    model.set_adapter("both")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".dowser_values.both." in name for name in trainable)
    expected = logits(model)
    assert not torch.equal(expected, before)
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    assert torch.equal(logits(loaded), expected)
    assert loaded.peft_config["default"].nnz_pattern == {
        layer.module_name: layer.dowser_values["both"].weight.numel() for layer in dowser_layers(model)
    }
    model.merge_adapter()
    assert torch.equal(logits(model), expected)
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT announces the next active adapter
        model.delete_adapter("both")
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
    assert set(model.peft_config) == {"default", "other"}


def test_the_config_says_what_the_result_is() -> None:
    model = two_adapters()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    found = model.peft_config["both"]
    layers = dowser_layers(model)
    nnz = {layer.module_name: layer.dowser_values["both"].weight.numel() for layer in layers}
    assert found.to_dict()["nnz_pattern"] == nnz
    assert found.update_ratio == sum(nnz.values()) / sum(layer.weight.numel() for layer in layers)
    assert found.task_type == "CAUSAL_LM"
    assert model.peft_config["default"].nnz_pattern is None


def test_a_combination_of_loaded_adapters_trains(tmp_path: Path) -> None:
    two_adapters().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model.load_adapter(tmp_path / "other", "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    model.set_adapter("both")
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(layer.dowser_values["both"].weight.grad.any() for layer in dowser_layers(model))


def test_one_seed_gives_one_adapter() -> None:
    def made(seed: int) -> list[Tensor]:
        model = two_adapters()
        model.add_weighted_adapter(["default", "other"], [1, 1], "both", "dare_linear", 0.5, seed=seed)
        return [layer.delta("both").positions for layer in dowser_layers(model)]

    first, again, other = made(0), made(0), made(1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))
    assert len({tuple(positions.tolist()) for positions in first}) == len(first)


def test_modules_without_values_are_left_out() -> None:
    model = two_adapters()
    model.add_weighted_adapter(["other"], [2.0], "twice")
    assert {name.rpartition(".")[2] for name in model.peft_config["twice"].nnz_pattern} == {"q_proj", "up_proj"}
    assert not [
        layer for layer in dowser_layers(model) if "v_proj" in layer.module_name and "twice" in layer.dowser_values
    ]


@pytest.mark.parametrize("combination_type", ["linear", "ties"])
def test_a_broken_adapter_is_refused(combination_type: str) -> None:
    model = two_adapters()
    dowser_layers(model)[0].values("other").data[3] = float("nan")
    with pytest.raises(ValueError, match=r"has 1 values that are not finite in module 'model.layers.0.*broken"):
        density = None if combination_type == "linear" else 0.9
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type, density)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": []}, "There is nothing to combine: name at least one adapter"),
        ({"adapters": ["default", "no"]}, r"Unknown adapters \['no'\]; the model has \['default', 'other'\]"),
        ({"weights": [1.0]}, r"weights must be finite numbers, one for each of the 2 adapters, got \[1.0\]"),
        ({"weights": [1.0, float("nan")]}, r"weights must be finite numbers, .*got \[1.0, nan\]"),
        ({"weights": [1e38, 1e38]}, "values that are not finite in module '.*q_proj'. Use smaller weights"),
        ({"adapter_name": "other"}, "Adapter 'other' exists already. Choose another adapter_name"),
        ({"adapter_name": "a.b"}, "'a.b' cannot be the name of an adapter: torch keeps"),
        ({"adapter_name": "double"}, "'double' cannot be the name of an adapter: .* Choose another name"),
        ({"combination_type": "svd"}, "one of linear, ties, dare_linear, dare_ties, magnitude_prune, got 'svd'"),
        ({"combination_type": "ties"}, r"'ties' needs a density in \(0, 1\], .*got None"),
        ({"combination_type": "ties", "density": 0}, r"'ties' needs a density in \(0, 1\], .*got 0"),
        ({"combination_type": "dare_linear", "density": 1.5}, r"'dare_linear' needs a density in .*got 1.5"),
        ({"combination_type": "ties", "density": 1e-9}, r"No value of adapters \['default', 'other'\] is left at dens"),
        ({"density": 0.5}, "'linear' keeps every entry and takes no density, got 0.5. Leave it out"),
        ({"majority_sign_method": "most"}, "majority_sign_method must be one of total, frequency, got 'most'"),
    ],
)
def test_a_wrong_argument_is_refused_and_the_model_untouched(changes: dict, message: str) -> None:
    model = two_adapters()
    set_values(model, std=10)  # large enough to overflow at a weight of 1e38
    asked = {"adapters": ["default", "other"], "weights": [1.0, 1.0], "adapter_name": "both"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(**(asked | changes))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert set(model.peft_config) == {"default", "other"}


def test_merged_adapters_are_refused() -> None:
    model = two_adapters()
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"Adapters \['other'\] are merged into the base model. Call unmerge_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "copy")
    assert set(model.peft_config) == {"default", "other"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"also trains modules_to_save=\['lm_head'\], which no sparse delta holds"),
        ({"bias": "all"}, "also trains bias='all'"),
        ({"trainable_token_indices": [3]}, "also trains trainable_token_indices"),
    ],
)
def test_adapters_that_train_more_than_deltas_are_refused(more: dict, message: str) -> None:
    model = get_peft_model(tiny_llama(), config(score="random", **more))
    with pytest.raises(ValueError, match=f"Adapter 'default' {message}"):
        model.add_weighted_adapter(["default"], [1.0], "copy")
    assert set(model.peft_config) == {"default"}


class Largest(TorchDispatchMode):
    """The most bytes that one result of an operation holds."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {id(argument) for argument in args}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor) not in given and not func.is_view:
                self.size = max(self.size, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("combination_type", TYPES)
def test_nothing_of_the_size_of_the_weight_is_made(combination_type: str) -> None:
    given = {"score": "random", "update_ratio": 0.01, "target_modules": ["0"]}
    model = get_peft_model(nn.Sequential(nn.Linear(2048, 1024)), DowserConfig(**given))
    model.add_adapter("other", DowserConfig(**given, seed=1))
    set_values(model)
    with Largest() as largest:
        density = None if combination_type == "linear" else 0.5
        model.add_weighted_adapter(["default", "other"], [1, 1], "both", combination_type, density)
    assert 0 < largest.size < 2048 * 1024
