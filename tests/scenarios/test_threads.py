"""Work side by side: results in order, the first failure, and any number of threads."""

import threading

import pytest
import torch
from models import config, tiny_llama
from peft import get_peft_model

from peft_dowser.delta.codec import side_by_side
from peft_dowser.delta.format import CODE, VALUES, with_adapter_name
from peft_dowser.layers.layer import layers_with_adapter
from peft_dowser.tuner.loading import read_file


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


@pytest.mark.parametrize("on_cpu", [True, False])
def test_only_tensors_on_the_cpu_are_read_side_by_side(on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere as many modules as there are threads would take memory of a GPU at once."""
    together: list[int] = []

    def noted(work, items):
        together.append(len(items))
        return [work(item) for item in items]

    monkeypatch.setattr("peft_dowser.tuner.loading.side_by_side", noted)
    layers = layers_with_adapter(get_peft_model(tiny_llama(), config(score="random")), "default")
    tensors = {}
    for name, layer in layers.items():
        tensors[name + with_adapter_name(VALUES, "default")] = layer.values("default").detach()
        tensors[name + with_adapter_name(CODE, "default")] = layer.index("default").code
    if not on_cpu:
        tensors["lm_head.weight"] = torch.empty(2, device="meta")
    read_file(layers, "default", tensors, ())
    assert together == ([14] if on_cpu else [])
