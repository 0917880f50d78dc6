"""SPIDER against numpy."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from models import config, tiny_llama
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DeviceMesh, distribute_tensor
from trainings import HOOK, same, trained, weights

from peft_dowser.baselines import SpiderCallback
from peft_dowser.baselines.spider import SPIDER_FILE, _pull_back, _relative_magnitude

pytestmark = pytest.mark.filterwarnings("ignore")


def rank(x: np.ndarray) -> np.ndarray:
    magnitude = np.abs(x)
    if not magnitude.any():
        return np.zeros_like(x)
    if (magnitude == magnitude.flat[0]).all():
        return np.full_like(x, 0.5)
    return 1 / (1 + np.exp(-(magnitude - magnitude.mean()) / magnitude.std(ddof=1)))


def spider(weight: np.ndarray, base: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    challenger, defender = rank(gradient), rank(base)
    wins = challenger > defender
    share = np.zeros_like(weight)
    share[wins] = challenger[wins] / (challenger[wins] + defender[wins])
    if wins.any():
        share = np.minimum(1, share / share[wins].mean())
    return base * (1 - share) + weight * share


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (2, 0.5)])
def test_spider_equals_the_formulas(tmp_path: Path, optimizer: str, accumulation: int, clip: float) -> None:
    options = {"optim": optimizer, "gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    model = tiny_llama(torch.float64)
    model.lm_head.requires_grad_(False)
    _, recorder = trained(model, tmp_path, [SpiderCallback()], **options)
    twin = tiny_llama(torch.float64)
    twin.lm_head.requires_grad_(False)
    parameters = [p for p in twin.parameters() if p.requires_grad]
    base = [p.detach().numpy().copy() for p in parameters]
    total = [np.zeros_like(weight) for weight in base]
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    stepper = kind(parameters, lr=1e-2, weight_decay=0)
    for step in range(4):
        stepper.zero_grad()
        for batch in recorder.batches[step * accumulation : (step + 1) * accumulation]:
            (twin(input_ids=batch, labels=batch).loss / accumulation).backward()
        if clip:
            norm = nn.utils.clip_grad_norm_(parameters, clip)
            assert norm > clip
        total = [g + p.grad.numpy() for g, p in zip(total, parameters, strict=True)]
        stepper.step()
        for parameter, start, gradient in zip(parameters, base, total, strict=True):
            parameter.data = torch.from_numpy(spider(parameter.detach().numpy(), start, gradient))
    start = tiny_llama(torch.float64).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=0, atol=1e-9)
        moved = (tensor != start[name]).double().mean()
        assert moved == 0 if name == "lm_head.weight" else 0.2 < moved <= 1


def test_spider_computes_in_float32_and_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    base, weight = (torch.randn(50, 40, generator=generator).bfloat16() for _ in range(2))
    gradient = torch.randn(50, 40, generator=generator)
    expected = spider(weight.double().numpy(), base.double().numpy(), gradient.double().numpy())
    wide = weight.float()
    _pull_back(wide, base.float(), gradient)
    _pull_back(weight, base, gradient)
    assert torch.equal(weight, wide.bfloat16())
    torch.testing.assert_close(wide.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_spider_is_exact_where_nothing_moved() -> None:
    base = torch.randn(30, 30, generator=torch.Generator().manual_seed(0))
    weight = base.clone()
    _pull_back(weight, base, torch.randn(30, 30, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(weight, base)


def test_spider_ranks_every_tensor() -> None:
    assert torch.equal(_relative_magnitude(torch.zeros(3)), torch.zeros(3))
    assert torch.equal(_relative_magnitude(torch.tensor([2.0, -2.0])), torch.full((2,), 0.5))
    assert torch.equal(_relative_magnitude(torch.tensor(-3.0)), torch.tensor(0.5))
    gradient, weight = torch.zeros(4), torch.ones(4)
    _pull_back(weight, torch.arange(4.0), gradient)
    assert torch.equal(weight, torch.arange(4.0))  # no gradient: nothing may move


def test_spider_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    straight, _ = trained(tiny_llama(), tmp_path, [SpiderCallback()], **options)
    resumed, _ = trained(tiny_llama(), tmp_path, [SpiderCallback()], str(tmp_path / "checkpoint-2"), **options)
    assert same(weights(straight.model), weights(resumed.model))
    assert not same(weights(straight.model), weights(tiny_llama()))


def test_spider_refuses_to_resume_from_the_wrong_file(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    trained(tiny_llama(), tmp_path / "a", [SpiderCallback()], **options)
    trained(tiny_llama(), tmp_path / "b", [SpiderCallback()], seed=1, **options)
    foreign = str(tmp_path / "b" / "checkpoint-2")
    with pytest.raises(
        ValueError, match=r"belongs to other weights .* for example for 'model.embed_tokens.weight'\. Resume"
    ):
        trained(tiny_llama(), tmp_path / "a", [SpiderCallback()], foreign, **options)
    path = tmp_path / "b" / "checkpoint-2" / SPIDER_FILE
    assert load_file(path)["gradient.model.norm.weight"].shape == (32,)
    path.unlink()
    with pytest.raises(ValueError, match=r"cannot resume: '.*spider\.safetensors' is missing"):
        trained(tiny_llama(), tmp_path / "b", [SpiderCallback()], foreign, **options)


def stepped(model: nn.Module, callback: SpiderCallback, optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step, with the hooks in the order of the Trainer."""
    callback.on_pre_optimizer_step(*HOOK, model=model)
    optimizer.step()
    callback.on_optimizer_step(*HOOK, model=model)


def test_spider_ignores_a_step_that_the_scaler_skips() -> None:
    model = nn.Linear(4, 4)
    callback = SpiderCallback()
    callback.on_train_begin(*HOOK, model=model)
    model.weight.grad = torch.full((4, 4), math.inf)
    callback.on_pre_optimizer_step(*HOOK, model=model)
    callback.on_optimizer_step(*HOOK, model=model)
    assert not callback.gradients["weight"].any()
    model.weight.grad = torch.arange(16.0).view(4, 4)
    stepped(model, callback, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(callback.gradients["weight"], model.weight.grad)
    callback.on_train_end(*HOOK)
    assert not callback.base and not callback.gradients


def test_spider_refuses_what_it_cannot_train() -> None:
    callback = SpiderCallback()
    with pytest.raises(ValueError, match="no parameter of Linear requires a gradient"):
        callback.on_train_begin(*HOOK, model=nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="this model trains a PEFT adapter"):
        callback.on_train_begin(*HOOK, model=get_peft_model(tiny_llama(), config(score="random")))
    model = nn.Linear(2, 2)
    callback.on_train_begin(*HOOK, model=model)
    with pytest.raises(ValueError, match=r"found no gradient at an optimizer step.*DeepSpeed"):
        callback.on_pre_optimizer_step(*HOOK, model=model)


def test_spider_refuses_sharded_parameters() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(2, 2)
        model.weight = nn.Parameter(distribute_tensor(model.weight.data, DeviceMesh("cpu", [0])))
        with pytest.raises(
            ValueError, match=r"the parameters of Linear are sharded \(FSDP, ZeRO-3 or tensor parallelism\)"
        ):
            SpiderCallback().on_train_begin(*HOOK, model=model)
    finally:
        dist.destroy_process_group()
    gathered: Any = nn.Linear(2, 2)
    gathered.weight.ds_id = 0  # the mark of ZeRO-3, which a parameter keeps while it is whole
    with pytest.raises(ValueError, match="the parameters of Linear are sharded"):
        SpiderCallback().on_train_begin(*HOOK, model=gathered)
