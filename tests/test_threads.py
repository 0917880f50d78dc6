"""Work side by side: results in order, the first failure, and any number of threads."""

import threading

import pytest
import torch

from peft_dowser.threads import side_by_side


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_results_come_in_the_order_of_the_items(count: int, threads: int) -> None:
    assert side_by_side(lambda item: item**2, range(count)) == [item**2 for item in range(count)]


def test_the_first_failure_is_raised(threads: int) -> None:
    def work(item: int) -> None:
        if item in (17, 18, 60):
            raise ValueError(item)

    with pytest.raises(ValueError, match="17"):
        side_by_side(work, range(100))


def test_as_many_run_at_a_time_as_torch_has_threads(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)
    assert len(side_by_side(lambda _: together.wait(), range(threads))) == threads
