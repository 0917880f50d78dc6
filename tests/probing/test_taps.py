"""Sums over rows: the same bits in every run, whatever the device does at the same time."""

import torch
from models import CountedOps

from peft_dowser.base.fused import Product
from peft_dowser.probing.expert_taps import ExpertsTap
from peft_dowser.probing.taps import LookupTap, sums_by_group

# What a GPU adds by atomic operations, in another order in every run.
ATOMIC = {"aten::index_add_", "aten::index_add", "aten::scatter_add_", "aten::index_put_"}


def test_the_rows_of_a_group_are_added_in_their_order() -> None:
    """Also where a group has none; float32 sums in another order would have other bits."""
    generator = torch.Generator().manual_seed(0)
    rows, groups = torch.randn(200, 33, generator=generator), torch.randint(6, (200,), generator=generator)
    expected = torch.zeros(8, 33)
    for row, group in zip(rows, groups.tolist(), strict=True):
        expected[group] += row
    assert torch.equal(sums_by_group(rows, groups, 8), expected)
    assert torch.equal(sums_by_group(rows[:0], groups[:0], 8), torch.zeros(8, 33))


def test_statistics_of_experts_need_no_atomic_addition() -> None:
    tap = ExpertsTap(torch.tensor([[1.0, 1, 1], [1, 1, 0]]), experts=4)
    x, experts = torch.randn(6, 5), torch.tensor([3, 0, 3, 3, 1, 1])
    with CountedOps() as ops:
        result = tap.multiply(Product(x, "rows_bmm", False, 7, experts=experts), torch.arange(6), torch.randn(4, 7, 5))
        result.sum().backward()
    assert ops.counts["aten::segment_reduce"] == 3
    assert not ATOMIC & set(ops.counts)
    found = dict(tap.by_expert())
    assert list(found) == [0, 1, 3]
    torch.testing.assert_close(
        found[3].activity, torch.stack([(x[0] + 0).abs() + x[2].abs(), x[3].abs()]) / torch.tensor([[3.0], [2]])
    )
    torch.testing.assert_close(found[1].energy, x[4].square())  # the other row is padding


def test_the_gradient_of_an_embedding_needs_no_atomic_addition() -> None:
    tap = LookupTap([torch.ones(1, 4)], 1, width=6)
    ids, grad = torch.tensor([[5, 2, 5, 0]]), torch.randn(1, 4, 3)
    with CountedOps() as ops:
        found = tap._product(grad, ids)
    assert not ATOMIC & set(ops.counts)
    expected = torch.nn.functional.one_hot(ids[0], 6).float().T @ grad[0]
    torch.testing.assert_close(found, expected.T)
