"""Deltas made after training: each method against its published formula, written out in numpy entry by entry."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peft_dowser
from peft_dowser.baselines import postmerge
from peft_dowser.baselines.grafting import _Graft, learn_graft
from peft_dowser.baselines.postmerge import dare, graft, tailor, top_delta, wise_ft
from peft_dowser.delta.apply import Delta, add_delta_
from peft_dowser.delta.seeds import derived_seed

OUT, IN = 12, 10
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(dtype: torch.dtype = torch.float32, shape=(OUT, IN), change: float = 0.3) -> tuple[Tensor, Tensor]:
    """A base, and a fine-tuned matrix that differs from it everywhere."""
    base = normal(*shape, seed=1)
    return base.to(dtype), (base + change * normal(*shape, seed=2)).to(dtype)


def matrix_of(delta: Delta, shape: torch.Size | tuple[int, ...]) -> np.ndarray:
    """The delta as a matrix, once its positions are those that an adapter can hold."""
    numel = int(np.prod(shape))
    assert delta.positions.dtype == torch.int32
    assert delta.values.dtype == torch.float32
    assert delta.positions.shape == delta.values.shape
    positions = delta.positions.tolist()
    assert positions == sorted(set(positions))
    assert not positions or (0 <= positions[0] and positions[-1] < numel)
    matrix = np.zeros(numel)
    matrix[positions] = delta.values.numpy()
    return matrix.reshape(shape)


def merged(base: Tensor, delta: Delta) -> Tensor:
    weight = base.clone()
    add_delta_(weight, delta.positions, delta.values)
    return weight


# top_delta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 1.0])
def test_top_delta_keeps_the_largest_differences(ratio: float, dtype: torch.dtype) -> None:
    base, tuned = matrices(dtype)
    difference = (tuned.double() - base.double()).float().numpy()
    order = sorted(range(OUT * IN), key=lambda at: (-abs(difference.flat[at]), at))[: round(ratio * OUT * IN)]
    expected = np.zeros(OUT * IN)
    expected[order] = difference.reshape(-1)[order]
    found = top_delta(base, tuned, ratio)
    assert len(found.positions) == round(ratio * OUT * IN)
    assert np.array_equal(matrix_of(found, base.shape), expected.reshape(OUT, IN))


def test_ties_go_to_the_lowest_position() -> None:
    found = top_delta(torch.zeros(3, 4), torch.tensor([[1.0, -1, 1, 2], [-1, 1, 0, 1], [0, 0, 1, 1]]), 0.25)
    assert found.positions.tolist() == [0, 1, 3]
    assert found.values.tolist() == [1, -1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_whole_delta_gives_the_tuned_weight_back(dtype: torch.dtype) -> None:
    base, tuned = matrices(dtype, (256, 256))
    found = merged(base, top_delta(base, tuned, 1.0))
    ratio = tuned.double() / base.double()
    near = (ratio >= 0.5) & (ratio <= 2)
    assert 0.5 < near.double().mean() < 0.95
    assert torch.equal(found[near], tuned[near])
    error, difference = (found.double() - tuned.double()).abs(), (tuned.double() - base.double()).abs()
    rounding = torch.finfo(dtype).eps * tuned.double().abs()
    assert bool((error <= 2**-24 * difference + rounding).all())
    # Measured: weights that change by more than a factor of two come back exactly, or as the next float.
    assert (found != tuned).double().mean() < {torch.float32: 0.2}.get(dtype, 0.001)


@pytest.mark.parametrize("method", [lambda *pair: top_delta(*pair, 0.3), lambda *pair: dare(*pair, 0.3, 0)])
def test_inputs_are_read_only_and_may_be_views(method) -> None:
    base, tuned = matrices()
    before = base.clone(), tuned.clone()
    plain = method(base, tuned)
    assert torch.equal(base, before[0])
    assert torch.equal(tuned, before[1])
    strided = method(base.T.contiguous().T, tuned.T.contiguous().T.requires_grad_())
    assert torch.equal(plain.positions, strided.positions)
    assert torch.equal(plain.values, strided.values)
    assert not strided.values.requires_grad


def test_a_ratio_too_small_for_one_entry_keeps_none() -> None:
    assert matrix_of(top_delta(*matrices(), 0.001), (OUT, IN)).any() == np.False_


# dare


def test_dare_is_a_scaled_part_of_the_difference() -> None:
    base, tuned = matrices(shape=(200, 300))
    difference = (tuned - base).numpy()
    found = matrix_of(dare(base, tuned, 0.1, seed=3), base.shape)
    kept = found != 0
    np.testing.assert_allclose(found[kept], difference[kept] / 0.1, rtol=1e-6)
    # 60000 draws of probability 0.1: standard deviation 73.
    assert abs(kept.sum() - 6000) < 4 * 73


def test_dare_draws_entries_independently_and_without_bias() -> None:
    base, tuned = matrices()
    draws = np.stack([matrix_of(dare(base, tuned, 0.25, seed=seed), (OUT, IN)) for seed in range(2000)])
    difference = (tuned - base).numpy()
    deviation = np.abs(difference) * np.sqrt(0.75 / 0.25 / 2000)
    assert (np.abs(draws.mean(0) - difference) < 5 * deviation).all()
    kept = (draws != 0).reshape(2000, -1).astype(float)
    correlation = np.corrcoef(kept.T) - np.eye(OUT * IN)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)


def test_one_seed_is_one_draw_and_the_global_generator_is_left_alone() -> None:
    base, tuned = matrices()
    state = torch.get_rng_state()
    first, second, other = (dare(base, tuned, 0.5, seed) for seed in (4, 4, 5))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.positions, second.positions)
    assert not torch.equal(first.positions, other.positions)


def test_dare_of_everything_is_the_difference() -> None:
    base, tuned = matrices()
    assert np.array_equal(matrix_of(dare(base, tuned, 1.0, seed=0), base.shape), (tuned - base).numpy())


# wise_ft


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, -0.5])
def test_wise_ft_is_a_point_between_the_two(alpha: float) -> None:
    base, tuned = matrices()
    tuned[3], tuned[:, 4] = base[3], base[:, 4]
    found = wise_ft(base, tuned, alpha)
    assert torch.equal(found.positions.long(), (tuned != base).view(-1).nonzero().view(-1))
    expected = (1 - alpha) * base.double() + alpha * tuned.double()
    np.testing.assert_allclose(merged(base, found).numpy(), expected.numpy(), atol=1e-6)


# graft


def test_graft_ranks_all_matrices_together() -> None:
    shapes, calls = [(4, 5), (7, 3), (2, 2), (6, 6)], [0] * 4
    pairs = [(normal(*shape, seed=i), normal(*shape, seed=9 + i)) for i, shape in enumerate(shapes)]
    pairs[2] = (pairs[2][0], pairs[2][0].clone())

    def read(number: int) -> tuple[Tensor, Tensor]:
        calls[number] += 1
        return pairs[number]

    found = graft([lambda number=number: read(number) for number in range(4)], 0.3)
    differences = np.concatenate([(tuned - base).numpy().reshape(-1) for base, tuned in pairs])
    count = round(0.3 * len(differences))
    keep = np.argsort(-np.abs(differences), kind="stable")[:count]
    expected = np.zeros_like(differences)
    expected[keep] = differences[keep]
    together = np.concatenate([matrix_of(delta, shape).reshape(-1) for delta, shape in zip(found, shapes, strict=True)])
    assert np.array_equal(together, expected)
    assert sum(len(delta.positions) for delta in found) == count
    assert len(found[2].positions) == 0
    assert calls == [5] * 4


def test_graft_of_one_matrix_is_top_delta_and_of_none_is_none() -> None:
    base, tuned = matrices()
    (found,) = graft([lambda: (base, tuned)], 0.2)
    expected = top_delta(base, tuned, 0.2)
    assert torch.equal(found.positions, expected.positions)
    assert torch.equal(found.values, expected.values)
    assert graft([], 0.2) == []


# tailor


def hessian(width: int = IN, samples: int = 40) -> Tensor:
    """Of inputs whose features are correlated and of very different size."""
    inputs = normal(samples, width, seed=5) @ normal(width, width, seed=6) * torch.linspace(0.3, 3, width)
    return 2 / samples * inputs.T @ inputs


def by_formula(base, tuned, hessian, ratio, alpha, damping, block, sign) -> tuple[np.ndarray, np.ndarray]:
    """ModelTailor entry by entry, in float64: which entries stay, and W - W* at the end."""
    origin, weight = base.double().numpy(), tuned.double().numpy().copy()
    salience = np.abs(weight - origin)
    damped = hessian.double().numpy().copy()
    damped += damping * np.trace(damped) / len(damped) * np.eye(len(damped))
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T  # inverse = upper^T upper
    rows, width = weight.shape
    kept = np.zeros((rows, width), dtype=bool)
    for start in range(0, width, block):
        stop = min(start + block, width)
        score = np.zeros((rows, stop - start))
        for row in range(rows):
            terms = [salience[row, start:stop], [(weight[row, j] / upper[j, j]) ** 2 for j in range(start, stop)]]
            first, second = ((t - np.mean(t)) / np.std(t) if np.std(t) else 0 * np.asarray(t) for t in terms)
            score[row] = alpha * first + (1 - alpha) * second
        count = round(ratio * rows * stop) - round(ratio * rows * start)
        for at in np.argsort(-score.reshape(-1), kind="stable")[:count]:
            kept[at // (stop - start), start + at % (stop - start)] = True
        for column in range(start, stop):
            for row in range(rows):
                if not kept[row, column]:
                    residual = (weight[row, column] - origin[row, column]) / upper[column, column]
                    for later in range(column + 1, width):
                        weight[row, later] += sign * residual * upper[column, later]
    return kept, weight - origin


@pytest.mark.parametrize("block", [3, 7, 10, 128])
@pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
@pytest.mark.parametrize(("compensation", "sign"), [("obs", -1), ("official", 1), (None, 0)])
def test_tailor_is_its_formula(block: int, alpha: float, compensation: str | None, sign: int) -> None:
    base, tuned = matrices()
    given = hessian()
    kept, difference = by_formula(base, tuned, given, 0.3, alpha, 0.01, block, sign)
    found = tailor(base, tuned, given, 0.3, alpha, block=block, compensation=compensation)
    assert found.positions.tolist() == np.flatnonzero(kept).tolist()
    assert len(found.positions) == round(0.3 * OUT * IN)
    expected = np.where(kept, difference, 0)
    np.testing.assert_allclose(matrix_of(found, base.shape), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    # The compensation is what is compared: it changes most of the values by far more than the tolerance.
    plain = np.where(kept, (tuned - base).numpy(), 0)
    changed = np.abs(expected - plain)[kept] > 0.01
    assert changed.mean() > 0.5 if sign else not changed.any()


# Little damping leaves an ill-conditioned inverse, and entries of bfloat16 that tie within the rounding of float32.
@pytest.mark.parametrize(("damping", "dtype"), [(0.001, torch.float32), (0.5, torch.bfloat16)])
def test_tailor_damps_the_hessian(damping: float, dtype: torch.dtype) -> None:
    base, tuned = matrices(dtype)
    kept, difference = by_formula(base, tuned, hessian(), 0.2, 0.8, damping, 4, -1)
    found = matrix_of(tailor(base, tuned, hessian(), 0.2, damping=damping, block=4), base.shape)
    np.testing.assert_allclose(found, np.where(kept, difference, 0), rtol=1e-4, atol=1e-4)


def test_compensation_by_obs_lowers_the_error_on_the_data_and_the_official_sign_raises_it() -> None:
    inputs = normal(400, 8, seed=7) @ normal(8, 64, seed=8) + 0.1 * normal(400, 64, seed=9)
    base, tuned = matrices(shape=(32, 64))
    errors = {}
    for compensation in ("obs", None, "official"):
        delta = tailor(base, tuned, 2 / 400 * inputs.T @ inputs, 0.3, block=16, compensation=compensation)
        errors[compensation] = ((merged(base, delta) - tuned) @ inputs.T).norm().item()
    assert errors["obs"] < 0.8 * errors[None]
    assert errors[None] < 0.8 * errors["official"]


def test_where_one_column_is_reset_the_others_take_the_least_squares_solution() -> None:
    inputs = normal(200, 6, seed=7) @ normal(6, 6, seed=8)
    base = normal(4, 6, seed=1)
    tuned = base + torch.tensor([0.5, 1, -1, 1, -1, 1])
    delta = tailor(base, tuned, 2 / 200 * inputs.T @ inputs, 5 / 6, alpha=1.0, damping=0.0)
    found = merged(base, delta)
    assert torch.equal(found[:, 0], base[:, 0])
    lost = 0.5 * inputs[:, :1].double()
    best = torch.linalg.lstsq(inputs[:, 1:].double(), lost.expand(-1, 4)).solution.T
    torch.testing.assert_close((found - tuned)[:, 1:].double(), best, rtol=1e-3, atol=1e-4)


def test_rows_of_equal_entries_are_ranked_as_average() -> None:
    base = torch.ones(4, 8)
    tuned = base + torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    tuned[3, 5] += 1
    kept, _ = by_formula(base, tuned, hessian(8), 0.25, 1.0, 0.01, 8, -1)
    found = tailor(base, tuned, hessian(8), 0.25, alpha=1.0, block=8)
    assert found.positions.tolist() == np.flatnonzero(kept).tolist()
    assert 3 * 8 + 5 in found.positions


def test_an_input_that_is_always_zero_is_no_obstacle() -> None:
    given = hessian()
    given[2], given[:, 2] = 0, 0
    base, tuned = matrices()
    kept, difference = by_formula(base, tuned, given, 0.3, 0.8, 0.01, 4, -1)
    found = matrix_of(tailor(base, tuned, given, 0.3, block=4), base.shape)
    np.testing.assert_allclose(found, np.where(kept, difference, 0), rtol=1e-4, atol=1e-4)


# learn_graft


class Regression(nn.Module):
    """Two linear layers; a batch is (inputs, targets)."""

    def __init__(self, seed: int = 0, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = 0.5 * normal(*parameter.shape, seed=seed + number)
            parameter.requires_grad_(not frozen)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.dropout(self.first(inputs).tanh()))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def task() -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Fine-tuned weights of which only small changes matter: some inputs are nearly silent, and they change most."""
    base, target = Regression(), Regression()
    tuned = {name: getattr(base, name.split(".")[0]).weight.detach().clone() for name in NAMES}
    tuned["first.weight"] += torch.cat([3 * normal(8, 3, seed=20), normal(8, 3, seed=21)], dim=1)
    target.first.weight.data = tuned["first.weight"]
    inputs = normal(3, 40, 6, seed=22) * torch.tensor([0.01, 0.01, 0.01, 2, 2, 2])
    return tuned, [(batch, target.eval()(batch).detach()) for batch in inputs]


NAMES = ["first.weight", "second.weight"]


def mean_loss(model: nn.Module, deltas: dict[str, Delta], batches: list) -> float:
    model = model.eval()
    for name, delta in deltas.items():
        add_delta_(model.get_parameter(name).data, delta.positions, delta.values)
    with torch.no_grad():
        return float(np.mean([squared_error(model, batch).item() for batch in batches]))


def start_of(name: str, tuned: dict[str, Tensor]) -> Tensor:
    """The first logits of a parameter."""
    generator = torch.Generator().manual_seed(derived_seed(0, "graft", name))
    return torch.rand(tuned[name].shape, generator=generator)


def test_a_learned_graft_is_better_than_its_base_patch() -> None:
    tuned, batches = task()
    model = Regression()
    patches = graft([lambda name=name: (model.get_parameter(name), tuned[name]) for name in NAMES], 0.2)
    found = learn_graft(model, tuned, iter(batches), 0.2, steps=15, learning_rate=1e5, loss=squared_error)
    assert list(found) == NAMES
    base = mean_loss(Regression(), {}, batches)
    before = mean_loss(Regression(), dict(zip(NAMES, patches, strict=True)), batches)
    assert before > 0.8 * base
    assert mean_loss(Regression(), found, batches) < 0.2 * before
    for name in NAMES:
        difference = (tuned[name] - Regression().get_parameter(name)).detach().numpy()
        matrix = matrix_of(found[name], difference.shape)
        assert np.array_equal(matrix, np.where(matrix != 0, difference, 0))


def test_a_learned_graft_follows_gradient_descent_on_g() -> None:
    """The same descent with autograd through g and a functional call."""
    tuned, batches = task()
    base = Regression().eval()
    origin = {name: base.get_parameter(name).detach() for name in NAMES}
    difference = {name: tuned[name] - origin[name] for name in NAMES}
    patches = graft([lambda name=name: (origin[name], tuned[name]) for name in NAMES], 0.2)
    patch = {}
    logits = {}
    for name, delta in zip(NAMES, patches, strict=True):
        patch[name] = torch.zeros(origin[name].numel()).index_fill(0, delta.positions.long(), 1).view_as(origin[name])
        logits[name] = start_of(name, tuned)
    best, expected = float("inf"), None
    for step in range(4):
        if step:
            for value in logits.values():
                value.requires_grad_()
            share = {n: patch[n] + (1 - 2 * patch[n]) * torch.sigmoid(logits[n] - 4.0) for n in NAMES}
            weights = {n: origin[n] * (1 - share[n]) + tuned[n] * share[n] for n in NAMES}
            losses = [
                (torch.func.functional_call(base, weights, batch[0]) - batch[1]).square().mean() for batch in batches
            ]
            gradients = torch.autograd.grad(torch.stack(losses).mean(), list(logits.values()))
            logits = {n: logits[n].detach() - 50.0 * g for n, g in zip(NAMES, gradients, strict=True)}
        mask = {n: (patch[n] + (1 - 2 * patch[n]) * torch.sigmoid(logits[n] - 4.0)).detach() > 0.5 for n in NAMES}
        deltas = {n: Delta(mask[n].view(-1).nonzero().view(-1).int(), difference[n][mask[n]]) for n in NAMES}
        value = mean_loss(Regression(), deltas, batches)
        if value < best:
            best, expected = value, deltas
    found = learn_graft(Regression(), tuned, batches, 0.2, steps=3, learning_rate=50.0, beta=4.0, loss=squared_error)
    assert not torch.equal(expected["first.weight"].positions, patches[0].positions)
    for name in NAMES:
        assert torch.equal(found[name].positions, expected[name].positions)
        assert torch.equal(found[name].values, expected[name].values)


def test_the_gradient_of_the_logits_is_that_of_autograd() -> None:
    base, tuned = matrices()
    patch = normal(OUT, IN, seed=9) > 0.5
    one = _Graft(nn.Parameter(base.clone()), base, tuned - base, patch, 3 * normal(OUT, IN, seed=10))
    target = normal(OUT, IN, seed=11)
    logits = one.logits.clone().requires_grad_()
    share = patch + (1 - 2 * patch.float()) * torch.sigmoid(logits - 2.0)
    torch.testing.assert_close(one.share(2.0), share.detach())
    assert torch.equal(one.mask(2.0), share > 0.5)
    weight = base * (1 - share) + tuned * share
    weight.retain_grad()
    ((weight - target) ** 4).sum().backward()
    torch.testing.assert_close(one.slope(weight.grad, 2.0), logits.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_learning_a_graft_leaves_no_trace(frozen: bool) -> None:
    tuned, batches = task()
    model = Regression(frozen=frozen)
    model.second.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, grad = torch.get_rng_state(), torch.is_grad_enabled()
    learn_graft(model, tuned, batches, 0.2, steps=2, loss=squared_error)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled() == grad
    assert [module.training for module in (model, model.dropout, model.second)] == [True, True, False]
    assert all(p.grad is None and p.requires_grad is not frozen for p in model.parameters())

    def broken(model: nn.Module, batch: tuple) -> Tensor:
        raise KeyError("broken")

    with torch.no_grad(), pytest.raises(KeyError):
        learn_graft(model, tuned, batches, 0.2, loss=broken)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_learning_runs_under_no_grad() -> None:
    tuned, batches = task()
    outside = learn_graft(Regression(), tuned, batches, 0.2, steps=2, learning_rate=1e5, loss=squared_error)
    with torch.no_grad():
        inside = learn_graft(Regression(), tuned, batches, 0.2, steps=2, learning_rate=1e5, loss=squared_error)
    assert all(torch.equal(outside[name].positions, inside[name].positions) for name in NAMES)


# Mistakes

METHODS = {
    "top_delta": lambda base, tuned, ratio: top_delta(base, tuned, ratio),
    "dare": lambda base, tuned, ratio: dare(base, tuned, ratio, 0),
    "graft": lambda base, tuned, ratio: graft([lambda: (base, tuned)], ratio),
    "tailor": lambda base, tuned, ratio: tailor(base, tuned, torch.eye(IN), ratio),
    "wise_ft": lambda base, tuned, ratio: wise_ft(base, tuned, ratio),
}


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["top_delta", "dare", "graft", "tailor"])
def test_a_ratio_out_of_range_is_refused(method: str, ratio: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"update_ratio must be a number in (0, 1], got {ratio!r}.")):
        METHODS[method](*matrices(), ratio)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        (torch.zeros(OUT, IN + 1), "base and tuned must have one shape, got (12, 10) and (12, 11)."),
        (
            torch.zeros(OUT, IN, dtype=torch.float16),
            "base and tuned must have one dtype of float16, bfloat16, float32 or float64, got torch.float32 and "
            "torch.float16.",
        ),
        (torch.zeros(OUT, IN).index_fill(1, torch.tensor([3]), float("nan")), "tuned - base has 12 entries that are"),
        (torch.full((OUT, IN), float("inf")), "tuned - base has 120 entries that are not finite; one of the two is"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(method: str, tuned: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        METHODS[method](matrices()[0], tuned, 0.5)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_dtype_without_a_delta_is_refused(dtype: torch.dtype) -> None:
    weight = torch.zeros(OUT, IN, dtype=dtype)
    with pytest.raises(ValueError, match="one dtype of float16, bfloat16, float32 or float64"):
        top_delta(weight, weight, 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alpha": 1.5}, "alpha must be a number in [0, 1], got 1.5."),
        ({"alpha": float("nan")}, "alpha must be a number in [0, 1], got nan."),
        ({"damping": -1.0}, "damping must be a finite number of at least 0, got -1.0."),
        ({"block": 0}, "block must be an integer of at least 1, got 0."),
        ({"compensation": "plus"}, "compensation must be one of 'obs', 'official' and None, got 'plus'."),
        (
            {"hessian": torch.eye(4)},
            "tailor takes a weight (out, in) and a Hessian (in, in), got shapes (12, 10) and (4, 4).",
        ),
        ({"hessian": torch.full((IN, IN), float("nan"))}, "The Hessian has entries that are not finite."),
        (
            {"hessian": torch.zeros(IN, IN)},
            "The Hessian is not positive definite with damping=0.01. Use a larger damping, or more calibration "
            "samples.",
        ),
    ],
)
def test_arguments_of_tailor_are_checked(given: dict, message: str) -> None:
    base, tuned = matrices()
    with pytest.raises(ValueError, match=re.escape(message)):
        tailor(**({"base": base, "tuned": tuned, "hessian": torch.eye(IN), "update_ratio": 0.3} | given))


def test_a_compensation_that_diverges_is_refused() -> None:
    """An input that the next two foretell: the published sign multiplies the residual by -1.8 a column."""
    width = 400
    factor = torch.eye(width) - 1.5 * torch.eye(width).roll(1, 1).triu() + 0.6 * torch.eye(width).roll(2, 1).triu()
    given = torch.linalg.inv(factor.T @ factor)
    base, tuned = matrices(shape=(2, width))
    tuned[:, -1] += 100
    arguments = (base, tuned, (given + given.T) / 2, 1 / width, 1.0, 0.0, width)
    with pytest.raises(
        ValueError,
        match=r"The compensation 'official' diverged: some kept entries are no longer finite\. Use compensation='obs',",
    ):
        tailor(*arguments, compensation="official")
    assert tailor(*arguments, compensation="obs").positions.tolist() == [width - 1, 2 * width - 1]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_not_finite_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"alpha must be a finite number, got {alpha!r}.")):
        wise_ft(*matrices(), alpha)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batches": []}, "batches is empty; a graft is learned on at least one batch."),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0."),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0, got nan."),
        ({"beta": float("inf")}, "beta must be a finite number, got inf."),
        ({"tuned": {"third.weight": torch.zeros(2, 2)}}, "'third.weight' is not a parameter of the model; tuned maps"),
        (
            {"tuned": {"first.weight": torch.zeros(8, 6).half()}},
            "Parameter 'first.weight' is torch.float32 of shape (8, 6), but the fine-tuned weight is torch.float16 of "
            "shape (8, 6).",
        ),
        ({"loss": lambda model, batch: squared_error(model, batch) * float("nan")}, "The loss is not finite, whatever"),
        ({"update_ratio": 0}, "update_ratio must be a number in (0, 1], got 0."),
    ],
)
def test_arguments_of_learn_graft_are_checked(given: dict, message: str) -> None:
    tuned, batches = task()
    arguments = {"tuned": tuned, "batches": batches, "update_ratio": 0.2, "loss": squared_error, "steps": 1}
    with pytest.raises(ValueError, match=re.escape(message)):
        learn_graft(Regression(), **(arguments | given))


def test_the_functions_are_public() -> None:
    for name in ("dare", "graft", "tailor", "top_delta", "wise_ft"):
        assert getattr(peft_dowser.baselines, name) is getattr(postmerge, name)
