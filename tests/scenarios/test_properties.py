"""Properties that hold for every mask, adapter and order of operations; hypothesis looks for one where they do not."""

import copy
import pickle
import warnings
from collections.abc import Callable
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import config, set_values
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_dowser import DeltaFormatError, DowserConfig, DowserLayer
from peft_dowser.delta.apply import Delta
from peft_dowser.delta.arithmetic import weighted_sum
from peft_dowser.delta.codec import code_length, decode, encode, position_dtype

# Ranked over the model as a whole, a module may get no values.
pytestmark = pytest.mark.filterwarnings("ignore:.* of the target modules stay frozen")
quick = settings(derandomize=True, max_examples=100, deadline=None)
slower = settings(quick, max_examples=40)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = st.sampled_from(DTYPES)
MODULES = ["0", "2", "4"]


# The index code


@st.composite
def masks(draw: st.DrawFn) -> tuple[list[int], int]:
    """Positions, and the number of weights that they are of: few of very many, any of some, all, or none."""
    numel = draw(st.one_of(st.integers(1, 300), st.integers(1, 5000), st.integers(1, 2**62)))
    some = st.sets(st.integers(0, numel - 1), max_size=200)
    ends = some.map(lambda chosen: chosen | {0, numel - 1})
    whole = st.just(set(range(numel if numel <= 5000 else 0)))
    without = some.map(lambda chosen: set(range(numel if numel <= 5000 else 0)) - chosen)
    return sorted(draw(st.one_of(some, ends, whole, without))), numel


@quick
@given(masks())
def test_every_mask_comes_back_from_a_code_whose_length_its_counts_give(mask: tuple[list[int], int]) -> None:
    positions, numel = mask
    code = encode(torch.tensor(positions, dtype=torch.int64), numel)
    assert (code.dtype, tuple(code.shape)) == (torch.uint8, (code_length(numel, len(positions)),))
    found = decode(code, numel, len(positions))
    assert found.dtype == position_dtype(numel)
    assert found.tolist() == positions


@quick
@given(masks(), st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=4))
def test_bytes_that_are_read_are_the_code_of_what_was_read(
    mask: tuple[list[int], int], changes: list[tuple[int, int]]
) -> None:
    positions, numel = mask
    code = encode(torch.tensor(positions, dtype=torch.int64), numel)
    for at, bits in changes if len(code) else []:
        code[at % len(code)] ^= bits
    try:
        found = decode(code, numel, len(positions))
    except DeltaFormatError:
        return
    assert torch.equal(encode(found, numel), code)


# Adapters of a small model


def base_of(dtype: torch.dtype) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7, bias=False), nn.ReLU(), nn.Linear(7, 5)
        return nn.Sequential(*layers).to(dtype).eval()


adapters = st.fixed_dictionaries(
    {
        "target_modules": st.sets(st.sampled_from(MODULES), min_size=1).map(sorted),
        "update_ratio": st.floats(0.1, 1.0),
        "select": st.sampled_from(["low", "high"]),
        "scope": st.sampled_from(["matrix", "row", "model"]),
        "score": st.sampled_from(["random", "magnitude"]),
        "seed": st.integers(0, 2**32),
    }
)


# Of single weights or, not within rows, of input channels.
either = st.tuples(adapters, st.booleans()).map(
    lambda drawn: drawn[0] | {"granularity": "input_channel" if drawn[1] and drawn[0]["scope"] != "row" else "weight"}
)


def config_of(adapter: dict) -> DowserConfig:
    return config(**adapter, task_type=None)


def made(adapter: dict, dtype: torch.dtype) -> PeftModel:
    model = get_peft_model(base_of(dtype), config_of(adapter))
    set_values(model, std=0.5)
    return model.eval()


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the base."""
    return next(parameter.dtype for name, parameter in model.named_parameters() if ".dowser_" not in name)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.linspace(-2, 2, 24, dtype=torch.float64).view(4, 6).to(dtype_of(model)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@slower
@given(either, dtypes)
def test_what_is_saved_is_what_is_loaded(adapter: dict, dtype: torch.dtype) -> None:
    model = made(adapter, dtype)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(base_of(dtype), folder).eval()
    assert_same(state(loaded), state(model))
    assert torch.equal(output(loaded), output(model))


steps = st.lists(
    st.one_of(
        st.permutations(["a", "b", "c"]).flatmap(lambda names: st.integers(1, 3).map(lambda count: names[:count])),
        st.sampled_from(["unmerge", "disable", "forward"]),
    ),
    max_size=8,
)


@slower
@given(st.tuples(either, either, either), dtypes, steps)
def test_merges_in_any_order_are_undone_bit_for_bit(given: tuple, dtype: torch.dtype, steps: list) -> None:
    model = get_peft_model(base_of(dtype), config_of(given[0]), adapter_name="a")
    for name, adapter in zip("bc", given[1:], strict=True):
        model.add_adapter(name, config_of(adapter))
    set_values(model.eval(), std=0.5)
    before, expected = state(model), output(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says what is merged already
        for step in steps:
            take(step, model)
        model.unmerge_adapter()
    assert_same(state(model), before)
    assert torch.equal(output(model), expected)


def take(step: str | list[str], model: PeftModel) -> None:
    if step == "unmerge":
        model.unmerge_adapter()
    elif step == "forward":
        output(model)
    elif step == "disable":
        with model.disable_adapter():
            assert torch.equal(output(model), output(base_of(dtype_of(model))))
    else:
        model.merge_adapter(list(step))


@slower
@given(st.tuples(adapters, adapters), dtypes)
def test_active_adapters_give_the_bits_of_their_merge_in_order(given: tuple, dtype: torch.dtype) -> None:
    model = get_peft_model(base_of(dtype), config_of(given[0]), adapter_name="a")
    model.add_adapter("b", config_of(given[1]))
    set_values(model.eval(), std=0.5)
    model.base_model.set_adapter(["b", "a"])
    expected = output(model)
    model.merge_adapter(["b", "a"])
    assert torch.equal(output(model), expected)


# The model as an object


def pickled(model: PeftModel) -> PeftModel:
    return pickle.loads(pickle.dumps(model))


@slower
@given(either, dtypes, st.lists(st.sampled_from([copy.deepcopy, pickled, *DTYPES]), min_size=1, max_size=4))
def test_copies_and_casts_keep_positions_and_round_values_as_torch_does(
    adapter: dict, dtype: torch.dtype, changes: list[Callable | torch.dtype]
) -> None:
    model = made(adapter, dtype)
    expected = state(model)
    for change in changes:
        if isinstance(change, torch.dtype):
            model = model.half() if change == torch.float16 else model.to(change)
            expected = {name: t.to(change) if t.is_floating_point() else t for name, t in expected.items()}
        else:
            original, model = model, change(model)
            for layer in original.modules():
                if isinstance(layer, DowserLayer):
                    layer.values("default").data.zero_()
    assert_same(state(model), expected)
    for layer in model.modules():
        if isinstance(layer, DowserLayer):
            index = layer.index("default")
            assert torch.equal(index.decoded(), decode(index.code, index.layout.size, index.count))
    adapted_output = output(model)
    merged_output = output(model.merge_and_unload())
    if adapter["granularity"] == "weight":
        assert torch.equal(merged_output, adapted_output)
    else:  # as LoRA: another order of sums
        tolerance = 64 * torch.finfo(adapted_output.dtype).eps
        torch.testing.assert_close(merged_output, adapted_output, rtol=tolerance, atol=16 * tolerance)


# Arithmetic: integers of up to twelve bits, whose sums float32 holds exactly


@st.composite
def deltas(draw: st.DrawFn) -> Delta:
    entries = draw(st.dictionaries(st.integers(0, 40), st.integers(-4096, 4096)))
    positions = sorted(entries)
    values = torch.tensor([float(entries[at]) for at in positions])
    return Delta(torch.tensor(positions, dtype=torch.int32), values)


def entries_of(delta: Delta) -> list[float]:
    entries = dict(zip(delta.positions.tolist(), delta.values.tolist(), strict=True))
    return [entries.get(at, 0.0) for at in range(41)]


@quick
@given(deltas(), deltas())
def test_what_is_added_can_be_taken_away(a: Delta, b: Delta) -> None:
    both = weighted_sum([a, b], [1.0, 1.0])
    assert entries_of(weighted_sum([both, b], [1.0, -1.0])) == entries_of(a)
    assert entries_of(weighted_sum([both, a], [1.0, -1.0])) == entries_of(b)
    assert both.positions.tolist() == sorted({*a.positions.tolist(), *b.positions.tolist()})


@quick
@given(
    st.lists(st.tuples(deltas(), st.integers(-8, 8)), min_size=1, max_size=5).flatmap(
        lambda terms: st.tuples(st.just(terms), st.permutations(terms))
    )
)
def test_a_weighted_sum_has_no_order(orders: tuple[list, list]) -> None:
    sums = [weighted_sum([delta for delta, _ in terms], [float(w) for _, w in terms]) for terms in orders]
    entries = zip(*([weight * entry for entry in entries_of(delta)] for delta, weight in orders[0]), strict=True)
    assert entries_of(sums[0]) == entries_of(sums[1]) == [sum(entry) for entry in entries]
