"""Whole trajectories: what should train alike does, bit for bit where the arithmetic permits."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from groups import batch_of
from models import config, tiny_llama
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from peft_dowser import DowserLayer

STEPS = 10
# Without weight decay, which would pull at the twin's frozen weights too.
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0),
}
# Below a density of 0.2 the gradient in float32 is sampled, and so summed in another order than that of a dense weight.
DENSE_GRADIENT, SAMPLED_GRADIENT = 0.5, 0.1


def trained(model: nn.Module, optimizer: str) -> list[Tensor]:
    """The losses of some steps."""
    chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(STEPS):
        chosen.zero_grad()
        loss = model(input_ids=batch_of(step), labels=batch_of(step)).loss
        loss.backward()
        chosen.step()
        losses.append(loss.detach())
    return losses


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def with_dense_twin(update_ratio: float) -> tuple[PeftModel, LlamaForCausalLM]:
    """A model, and fine-tuning of its whole weights with a gradient mask; the weights that train begin at zero.

    From there 0 + D is D without rounding, so both train the same numbers. From elsewhere W + D is rounded in other
    places than a weight that takes the steps itself.
    """
    base = tiny_llama()
    model = get_peft_model(base, config(update_ratio=update_ratio))
    layers = [layer for layer in model.modules() if isinstance(layer, DowserLayer)]
    for layer in layers:
        layer.base_layer.weight.data.view(-1)[layer.index("default").decoded().long()] = 0
    twin = copy.deepcopy(model).unload().requires_grad_(False)
    for layer in layers:
        weight = twin.get_submodule(layer.module_name).weight.requires_grad_(True)
        mask = torch.zeros_like(weight)
        mask.view(-1)[layer.index("default").decoded().long()] = 1
        weight.register_hook(mask.mul)
    return model, twin


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_full_fine_tuning_with_a_gradient_mask_is_the_same_bit_for_bit(optimizer: str) -> None:
    model, twin = with_dense_twin(DENSE_GRADIENT)
    frozen = {name: weight.clone() for name, weight in twin.named_parameters()}
    losses, expected = trained(model, optimizer), trained(twin, optimizer)
    assert losses == expected
    merged = model.merge_and_unload()
    for name, weight in twin.named_parameters():
        inside = frozen[name] == 0 if weight.requires_grad else torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(merged.get_parameter(name)[inside], weight[inside]), name
        assert torch.equal(merged.get_parameter(name)[~inside], frozen[name][~inside]), name
        assert bool(weight[inside].any()) == bool(inside.any()), name
    assert len(set(losses)) == STEPS


def test_a_sampled_gradient_changes_the_trajectory_by_its_rounding_only() -> None:
    model, twin = with_dense_twin(SAMPLED_GRADIENT)
    torch.testing.assert_close(trained(model, "sgd"), trained(twin, "sgd"), rtol=0, atol=1e-5)
    merged = model.merge_and_unload()
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(merged.get_parameter(name), weight, rtol=0, atol=1e-5)


def by_trainer(folder: Path, batch_size: int, accumulation: int) -> dict[str, Tensor]:
    """The values that transformers' trainer trains in two passes over sixteen rows."""
    model = get_peft_model(tiny_llama(torch.float64), config()).double()
    rows = [batch_of(number)[0].tolist() for number in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=2,
        learning_rate=1e-2,
        max_grad_norm=0.1,  # small enough to clip
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return values(model)


@pytest.mark.filterwarnings("ignore")
def test_a_batch_of_eight_is_eight_accumulated_rows(tmp_path: Path) -> None:
    whole, rows = by_trainer(tmp_path, 8, 1), by_trainer(tmp_path, 1, 8)
    assert all(bool(tensor.any()) for tensor in whole.values())
    for name, tensor in whole.items():  # in float64, as the sums over a batch have another order
        torch.testing.assert_close(rows[name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_bit_of_a_trajectory(dtype: torch.dtype) -> None:
    plain, checkpointed = (get_peft_model(tiny_llama(dtype), config()).train() for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
        assert trained(checkpointed, "adamw") == trained(plain, "adamw")
    expected = values(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in values(checkpointed).items())
