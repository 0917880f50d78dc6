"""The merge for the length of a `generate`, which several threads share."""

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event, Thread

import pytest
import torch
from models import assert_same_bits, base_bits, config, set_values, tiny_llama, tiny_moe
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_dowser import Patch, hotswap
from peft_dowser.layers.layer import DowserLayer, dowser_layers
from peft_dowser.tuner import writing

THREADS = 4
IDS = torch.tensor([[3, 5, 9, 4], [8, 1, 2, 7]])


@pytest.fixture(autouse=True)
def eager_switches():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def generated(model: nn.Module) -> Tensor:
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)


def of_linears() -> PeftModel:
    return get_peft_model(tiny_llama(torch.bfloat16), config(score="random"))


def of_channels() -> PeftModel:
    return get_peft_model(tiny_llama(torch.bfloat16), config(score="random", granularity="input_channel"))


def of_experts() -> PeftModel:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(tiny_moe("mixtral"), config(score="random", target_modules=[], target_parameters=names))


@pytest.mark.parametrize("make", [of_linears, of_channels, of_experts])
def test_threads_that_generate_at_once_get_the_right_tokens_and_leave_the_base(make) -> None:
    model = make()
    set_values(model)
    before, expected = base_bits(model), generated(model)
    together = Barrier(THREADS)

    def work(thread: int) -> bool:
        right = True
        for _ in range(10):
            together.wait()
            right &= torch.equal(generated(model), expected)
        return right

    with ThreadPoolExecutor(THREADS) as threads:
        assert all(threads.map(work, range(THREADS)))
    assert not any(layer.merged for layer in dowser_layers(model))
    assert_same_bits(base_bits(model), before)


def test_the_last_one_to_end_unmerges() -> None:
    model = of_linears()
    set_values(model)
    layer = dowser_layers(model)[0]
    seen = []

    def another(module, args, output) -> None:
        if len(seen) < 2:
            seen.append(layer.merged)
            generated(model)
            seen.append(layer.merged)

    handle = model.base_model.model.lm_head.register_forward_hook(another)
    generated(model)
    handle.remove()
    assert set(seen) == {True}
    assert not layer.merged


def test_a_model_that_has_generated_can_be_copied_and_pickled() -> None:
    model = of_linears()
    set_values(model)
    expected = generated(model)
    assert torch.equal(generated(copy.deepcopy(model)), expected)
    assert torch.equal(generated(pickle.loads(pickle.dumps(model))), expected)


def failing(layer: DowserLayer) -> None:
    raise RuntimeError("out of reach")


def test_an_error_of_an_unmerge_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_linears()
    set_values(model)
    before = base_bits(model)
    with monkeypatch.context() as patched:
        patched.setattr(DowserLayer, "unmerge", failing)
        with pytest.raises(RuntimeError, match="out of reach"):
            generated(model)
    model.unmerge_adapter()
    assert_same_bits(base_bits(model), before)


def test_a_hotswap_is_refused_beside_a_generate_that_began_after_its_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_linears()
    set_values(model)
    model.save_pretrained(tmp_path)
    before, merged, swapped = base_bits(model), Event(), Event()

    def wait(*args) -> None:
        merged.set()
        swapped.wait()

    handle = model.base_model.model.lm_head.register_forward_hook(wait)
    other = Thread(target=generated, args=(model,))

    def generating(*args) -> None:
        other.start()
        merged.wait()

    monkeypatch.setattr(sys.modules[hotswap.__module__], "warn_of_other_base", generating)
    try:
        with pytest.raises(ValueError, match=r"Adapters \['default'\] are merged into the base"):
            hotswap(model, tmp_path)
    finally:
        swapped.set()
        other.join()
        handle.remove()
    assert_same_bits(base_bits(model), before)


def test_a_patch_waits_for_other_writers(tmp_path: Path) -> None:
    of_linears().save_pretrained(tmp_path)
    patch = Patch(tiny_llama(torch.bfloat16), tmp_path)
    for call in (patch.apply, patch.remove):
        done = Event()
        with writing.lock:
            other = Thread(target=lambda call=call, done=done: (call(), done.set()))
            other.start()
            assert not done.wait(0.2)
        other.join()
        assert done.is_set()
