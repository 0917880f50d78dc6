"""Layouts: what positions and values mean in a weight, against dense matrices."""

import pytest
import torch
from torch import Tensor

from peft_dowser.delta.apply import Delta
from peft_dowser.delta.codec import DeltaFormatError
from peft_dowser.delta.layout import Layout, StoredDelta
from peft_dowser.delta.lora import lora_factors

OUT, IN = 6, 10
CHANNELS = [0, 3, 4, 9]

over_dims = pytest.mark.parametrize("dim", [1, 0], ids=["linear", "conv1d"])


def layout_of(dim: int | None) -> Layout:
    return Layout((IN, OUT) if dim == 0 else (OUT, IN), dim)


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def stored(channels: list[int] = CHANNELS) -> StoredDelta:
    return StoredDelta(torch.tensor(channels, dtype=torch.int32), numbers(OUT, len(channels)))


def dense(delta: Delta, layout: Layout) -> Tensor:
    """The delta as it is added to a weight, in the shape of the weight; entry by entry."""
    matrix = torch.zeros(layout.shape)
    for position, value in zip(delta.positions.tolist(), delta.values.tolist(), strict=True):
        matrix[position // layout.shape[1], position % layout.shape[1]] = value
    return matrix


@over_dims
@pytest.mark.parametrize("channels", [CHANNELS, [5], list(range(IN))])
def test_channels_are_columns_of_an_out_by_in_matrix(dim: int, channels: list[int]) -> None:
    layout, given = layout_of(dim), stored(channels)
    delta = layout.delta(given)
    expected = torch.zeros(OUT, IN)
    for place, channel in enumerate(channels):
        expected[:, channel] = given.values[:, place]
    assert torch.equal(dense(delta, layout), expected.T if dim == 0 else expected)
    assert delta.positions.dtype == torch.int32
    assert bool((delta.positions.diff() > 0).all())
    assert torch.equal(layout.flat(given.positions), delta.positions)


@over_dims
def test_a_layout_counts_channels_and_the_weights_in_them(dim: int) -> None:
    layout = layout_of(dim)
    assert (layout.size, layout.group, layout.count(24), layout.values_shape(4)) == (IN, OUT, 4, (OUT, 4))
    assert Layout((OUT, IN)).values_shape(4) == (4,)
    assert (Layout((OUT, IN)).size, Layout((OUT, IN)).group, Layout((OUT, IN)).count(24)) == (60, 1, 24)
    assert Layout((3, OUT, IN)).size == 180


@over_dims
@pytest.mark.parametrize(
    ("nnz", "message"),
    [(25, "25 values, which are not whole input channels of 6 weights each"), (66, "66 values, .* only 60 entries")],
)
def test_counts_that_are_not_whole_channels_of_the_weight_are_refused(dim: int, nnz: int, message: str) -> None:
    with pytest.raises(DeltaFormatError, match=message):
        layout_of(dim).count(nnz)


@over_dims
def test_what_is_stored_comes_back_and_gaps_become_zeros(dim: int) -> None:
    layout, given = layout_of(dim), stored()
    again = layout.stored(layout.delta(given))
    assert torch.equal(again.positions, given.positions) and torch.equal(again.values, given.values)
    assert again.positions.dtype == torch.int32
    delta = layout.delta(given)
    some = torch.rand(len(delta.values), generator=torch.Generator().manual_seed(2)) < 0.4
    part = Delta(delta.positions[some], delta.values[some])
    filled = layout.delta(layout.stored(part))
    assert torch.equal(dense(filled, layout), dense(part, layout))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_weight_beyond_two_billion_entries_has_wide_positions(device: str) -> None:
    """2**16 input channels of 2**16 weights: each number fits int32, the flat positions do not."""
    layout = Layout((2**16, 2**16), 0)
    channels = torch.tensor([2**16 - 1], dtype=torch.int32, device=device)
    flat = layout.flat(channels)
    assert flat.dtype == torch.int64
    if device == "cpu":
        assert flat[0].item() == (2**16 - 1) * 2**16 and flat[-1].item() == 2**32 - 1


@pytest.mark.parametrize("rank", [4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_are_one_hot_and_exact(rank: int, dtype: torch.dtype) -> None:
    given = stored()._replace(values=stored().values.to(dtype))
    first, second = lora_factors(given, IN, rank)
    assert (first.shape, second.shape, first.dtype, second.dtype) == ((rank, IN), (OUT, rank), dtype, dtype)
    assert first.sum().item() == len(CHANNELS) and set(first.view(-1).tolist()) == {0.0, 1.0}
    assert first.nonzero().tolist() == [[row, channel] for row, channel in enumerate(CHANNELS)]
    product = (second.double() @ first.double()).to(dtype)
    expected = torch.zeros(OUT, IN, dtype=dtype)
    expected[:, CHANNELS] = given.values
    assert torch.equal(product, expected)
