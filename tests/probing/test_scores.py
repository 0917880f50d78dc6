"""Scores: each against its formula, written out in float64 prompt by prompt or weight by weight."""

import json
import re
from pathlib import Path

import pytest
import torch
from models import config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from peft_dowser.base.target import target_of
from peft_dowser.config import PROBED_SCORES
from peft_dowser.probing import scores
from peft_dowser.probing.selection import score_matrix
from peft_dowser.probing.statistics import ModuleStatistics, ProbeInfo, ProbeStatistics

N, OUT, IN = 5, 23, 17
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SCORES = {
    "dowser": scores.dowser,
    "shift": scores.shift,
    "activity": scores.activity,
    "wanda": scores.wanda,
    "gradient": scores.gradient,
    "magnitude": lambda weight, statistics: scores.magnitude(weight),
    "random": lambda weight, statistics: scores.random(weight, 0),
}
SIZED = [name for name in SCORES if name != "random"]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return normal(OUT, IN, seed=1).to(dtype)


def statistics(out: int = OUT, width: int = IN, gradient: bool = True) -> ModuleStatistics:
    """Statistics with the spread of real ones: a few rows and columns matter much more than the others."""
    return ModuleStatistics(
        sensitivity=normal(N, out, seed=2).exp(),
        activity=normal(N, width, seed=3).exp(),
        energy=normal(width, seed=4).exp(),
        gradient=normal(out, width, seed=5) if gradient else None,
    )


def by_formula(name: str, weight: Tensor, given: ModuleStatistics) -> Tensor:
    """The score weight by weight, in float64."""
    expected = torch.zeros(weight.shape, dtype=torch.float64)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            size = abs(weight[i, j].item())
            if name == "dowser":
                terms = [given.sensitivity[n, i].item() * size * given.activity[n, j].item() for n in range(N)]
                expected[i, j] = sum(terms) / N
            if name == "shift":
                expected[i, j] = sum(given.sensitivity[n, i].item() * given.activity[n, j].item() for n in range(N)) / N
            if name == "activity":
                expected[i, j] = sum(given.activity[n, j].item() for n in range(N)) / N
            if name == "magnitude":
                expected[i, j] = size
            if name == "wanda":
                expected[i, j] = size * given.energy[j].item() ** 0.5
            if name == "gradient":
                expected[i, j] = abs(given.gradient[i, j].item())
    return expected


def assert_score(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


# The formulas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SIZED)
def test_a_score_is_its_formula(name: str, dtype: torch.dtype) -> None:
    weight, given = weight_of(dtype), statistics()
    assert_score(SCORES[name](weight, given), by_formula(name, weight, given))


@pytest.mark.parametrize("name", SIZED)
def test_a_transposed_view_is_scored_as_it_is_seen(name: str) -> None:
    weight, given = normal(IN, OUT, seed=1).T, statistics()
    assert_score(SCORES[name](weight, given), by_formula(name, weight, given))


def test_dowser_is_the_mean_of_products_not_the_product_of_means() -> None:
    given = ModuleStatistics(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]), torch.ones(1))
    assert scores.dowser(torch.ones(1, 1), given).item() == 0
    given.activity = torch.tensor([[3.0], [1.0]])
    assert scores.dowser(torch.full((1, 1), -2.0), given).item() == 3


@pytest.mark.parametrize("rows", [1, 8])
def test_wanda_is_the_norm_over_all_inputs(rows: int) -> None:
    inputs, weight = normal(rows, IN, seed=6).double(), weight_of()
    given = ModuleStatistics(torch.ones(N, OUT), torch.ones(N, IN), inputs.square().sum(0).float())
    expected = torch.stack([weight[:, j].double().abs() * inputs[:, j].norm() for j in range(IN)], dim=1)
    assert_score(scores.wanda(weight, given), expected)


@pytest.mark.parametrize("name", ["dowser", "magnitude", "wanda"])
def test_a_zero_weight_scores_zero(name: str) -> None:
    weight = weight_of()
    weight[3], weight[:, 4], weight[5, 6] = 0, -0.0, 0
    found = SCORES[name](weight, statistics())
    assert torch.equal(found == 0, weight == 0)
    assert not bool(found.signbit().any())


FACTORS = [
    ("dowser", "activity"),
    ("dowser", "sensitivity"),
    ("shift", "activity"),
    ("shift", "sensitivity"),
    ("activity", "activity"),
    ("wanda", "energy"),
]


@pytest.mark.parametrize(("name", "factor"), FACTORS)
def test_a_silent_input_or_output_scores_zero(name: str, factor: str) -> None:
    given = statistics()
    getattr(given, factor)[..., 7] = 0
    found = SCORES[name](weight_of(), given)
    silent = found[7] if factor == "sensitivity" else found[:, 7]
    assert not bool(silent.any())
    assert int((found == 0).sum()) == silent.numel()


def test_a_gradient_of_minus_zero_scores_plus_zero() -> None:
    given = ModuleStatistics(torch.ones(1, 1), torch.ones(1, 2), torch.ones(2), torch.tensor([[-0.0, -2.0]]))
    found = scores.gradient(torch.ones(1, 2), given)
    assert found.tolist() == [[0, 2]]
    assert not bool(found.signbit().any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCORES)
def test_weights_and_statistics_are_only_read(name: str, dtype: torch.dtype) -> None:
    weight, given = weight_of(dtype), statistics()
    for row in SCORES[name](weight, given):
        row.fill_(-1)
    assert torch.equal(weight, weight_of(dtype))
    assert all(torch.equal(tensor, getattr(statistics(), field)) for field, tensor in vars(given).items())


@pytest.mark.parametrize("name", ["dowser", "shift"])
def test_the_sums_over_prompts_are_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of float32 may be computed in TF32 on a GPU; whole blocks or single rows, the scores are the same."""
    products: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.default:
                products.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    weight, given = weight_of(torch.float32), statistics()
    exact = given.sensitivity.double().T @ given.activity.double()
    expected = (exact.float() * weight).abs() / N if name == "dowser" else exact.float() / N
    for block in (1, 3 * IN, 1 << 20):
        monkeypatch.setattr(scores, "_BLOCK", block)
        with Products():
            assert torch.equal(SCORES[name](weight, given), expected)
    assert len(products) == OUT + -(-OUT // 3) + 1
    assert set(products) == {torch.float64}


def test_the_activity_of_channels_is_the_row_that_all_rows_of_its_scores_are() -> None:
    """Large rows of few bits less than a float32 has: only a wide sum keeps what the small one adds."""
    given = statistics(width=2)
    given.activity = torch.tensor([[2.0**24, 1], [1, 2], [1, 3]])
    assert scores.mean_activity(given).tolist() == [(2**24 + 2) / 3, 2]
    found = scores.activity(torch.empty(400, 2), given)
    assert torch.equal(found, scores.mean_activity(given).expand(400, 2))
    assert found.untyped_storage().nbytes() == 2 * 4


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.10
@pytest.mark.parametrize("name", ["dowser", "shift"])
def test_nothing_of_the_size_of_the_scores_is_allocated_but_the_scores(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "_BLOCK", 1 << 12)
    weight, given = torch.ones(300, 400), statistics(300, 400)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        found = SCORES[name](weight, given)
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    assert [size for size in sizes if size > found.nbytes // 8] == [found.nbytes]


# Statistics that do not fit


@pytest.mark.parametrize("shape", [(OUT, IN + 1), (OUT + 1, IN), (IN, OUT), (1, IN), (OUT, 1)])
@pytest.mark.parametrize("name", ["dowser", "shift", "gradient"])
def test_a_weight_of_another_shape_is_refused(name: str, shape: tuple[int, int]) -> None:
    message = f"The probe statistics belong to a weight of shape {(OUT, IN)}, this one has {shape}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SCORES[name](torch.ones(shape), statistics())


@pytest.mark.parametrize("width", [1, IN - 1, IN + 1])
@pytest.mark.parametrize("name", ["activity", "wanda"])
def test_a_weight_of_another_width_is_refused(name: str, width: int) -> None:
    message = f"The probe statistics belong to a weight of shape {(OUT, IN)}, this one has {(OUT, width)}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SCORES[name](torch.ones(OUT, width), statistics())


def test_statistics_without_a_gradient_are_refused_with_the_way_out() -> None:
    message = "hold no gradient; probe with DowserConfig(score='gradient') to use this score."
    with pytest.raises(ValueError, match=f"^The probe statistics {re.escape(message)}$"):
        scores.gradient(weight_of(), statistics(gradient=False))


@pytest.mark.parametrize("name", ["dowser", "shift"])
def test_statistics_without_a_sensitivity_are_refused_with_the_way_out(name: str) -> None:
    given = statistics()
    given.sensitivity = None
    message = (
        "The probe statistics hold no sensitivity, because their probe ran forwards only, as for score='activity' or "
        f"'wanda'. Choose one of these, or probe with DowserConfig(score='{name}') to use this score."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SCORES[name](weight_of(), given)
    for other in ("activity", "wanda", "gradient"):
        assert torch.equal(SCORES[other](weight_of(), given), SCORES[other](weight_of(), statistics()))


# Random scores


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_seed_gives_one_random_score(dtype: torch.dtype) -> None:
    found = scores.random(torch.zeros(OUT, IN, dtype=dtype), 2**62 + 1)
    torch.manual_seed(7)
    again = scores.random(torch.ones(OUT, IN), 2**62 + 1)
    assert found.dtype == again.dtype == torch.float32
    assert found.shape == (OUT, IN)
    assert torch.equal(found, again)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_random_scores_do_not_depend_on_the_default_dtype(default: torch.dtype) -> None:
    weight, before = weight_of(), torch.get_default_dtype()
    expected = scores.random(weight, 0)
    torch.set_default_dtype(default)
    try:
        found = scores.random(weight, 0)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_random_scores_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    scores.random(weight_of(), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_random_scores_are_uniform(seed: int) -> None:
    found = scores.random(torch.empty(400, 250), seed)
    share = torch.histc(found, bins=20, min=0, max=1) / found.numel()
    assert 0 <= float(found.min()) < 1e-3
    assert 1 - 1e-3 < float(found.max()) < 1
    # Five standard deviations of a share of 1/20 among 100,000.
    torch.testing.assert_close(share, torch.full((20,), 0.05), rtol=0, atol=5 * (0.05 * 0.95 / 1e5) ** 0.5)


def correlation(first: Tensor, second: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])


def test_neighbouring_seeds_are_unrelated() -> None:
    weight = torch.empty(100, 100)
    assert abs(correlation(scores.random(weight, 0), scores.random(weight, 1))) < 0.05


# Scores of a module


def test_random_scores_differ_between_modules_and_between_seeds() -> None:
    layer = nn.Linear(100, 100)
    first = score_matrix(target_of("a.q_proj", layer), config(score="random"), None)
    again = score_matrix(target_of("a.q_proj", nn.Linear(100, 100)), config(score="random"), None)
    assert torch.equal(first, again)
    for name, seed in [("a.k_proj", 0), ("b.q_proj", 0), ("a.q_proj", 1)]:
        other = score_matrix(target_of(name, layer), config(score="random", seed=seed), None)
        assert abs(correlation(first, other)) < 0.05


@pytest.mark.parametrize("name", SIZED)
def test_a_module_is_scored_by_the_score_of_the_config(name: str) -> None:
    layer = nn.Linear(IN, OUT)
    given = ProbeStatistics({"other": statistics(width=3), "own": statistics()}, ProbeInfo("", N, 2, 12, 0.0, 0))
    found = score_matrix(target_of("own", layer), config(score=name), given)
    assert not found.requires_grad
    assert_score(found, by_formula(name, layer.weight.detach(), given.modules["own"]))


@pytest.mark.parametrize("name", PROBED_SCORES)
def test_a_score_of_the_model_needs_statistics(name: str) -> None:
    with pytest.raises(ValueError, match=f"^score='{name}' needs probe statistics\\.$"):
        score_matrix(target_of("own", nn.Linear(IN, OUT)), config(score=name), None)
