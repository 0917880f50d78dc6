"""Rehearsal: the gradient of weight times KL(base || adapted), against autograd of the formula written out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from groups import on_ranks
from models import config, set_values, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from trainings import same, trained, weights
from transformers import TrainingArguments

from peft_dowser import DowserConfig, RehearsalCallback
from peft_dowser.evaluation.rehearsal import rehearse

TEXTS = [[1, 5, 9, 30, 7, 11], [1, 40, 41, 42], [1, 8, 8, 20, 21], [1, 33, 12, 6, 60, 50, 44]]
OWN = DowserConfig(num_probes=4, probe_length=10, seed=3)


def adapted(kind: str = "dowser", dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> PeftModel:
    torch.manual_seed(0)
    if kind == "lora":
        model = get_peft_model(
            tiny_llama(dtype), LoraConfig(target_modules=["q_proj", "up_proj"], lora_dropout=dropout)
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        return model.to(dtype).train()
    granularity = "input_channel" if kind == "channels" else "weight"
    model = get_peft_model(tiny_llama(dtype), config(score="random", update_ratio=0.3, granularity=granularity))
    set_values(model)
    return model.train()


def divergence_by_hand(model: PeftModel, texts: list[list[int]]) -> Tensor:
    """Mean over all predicted tokens of the sum over the vocabulary of p (log p - log q), one text at a time."""
    terms = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.no_grad(), model.disable_adapter():
            p = model(input_ids=ids).logits[0, :-1].softmax(-1)
        for parameter in trainable(model).values():
            parameter.requires_grad_(True)
        q = model(input_ids=ids).logits[0, :-1].softmax(-1)
        terms.append((p * (p.log() - q.log())).sum(-1))
    return torch.cat(terms).mean()


def trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".dowser_values." in name or ".lora_" in name}


def gradients(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def begun(model: PeftModel, folder: Path, **options: Any) -> tuple[RehearsalCallback, tuple]:
    callback = RehearsalCallback(TEXTS, **options)
    hook = (TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[]), State(), None)
    callback.on_train_begin(*hook, model=model)
    return callback, hook


class State:
    global_step = 0
    log_history: list = []  # noqa: RUF012


@pytest.mark.parametrize("kind", ["dowser", "channels", "lora"])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_the_gradient_is_that_of_the_formula_beside_the_loss(kind: str, weight: float, tmp_path: Path) -> None:
    model = adapted(kind)
    batch = torch.tensor([[1, 3, 17, 25, 4]])
    callback, hook = begun(model, tmp_path, weight=weight, batch_size=4)
    callback.on_step_begin(*hook, model=model)
    model(input_ids=batch, labels=batch).loss.backward()
    found = gradients(model)

    model.zero_grad()
    loss = model(input_ids=batch, labels=batch).loss + weight * divergence_by_hand(model, TEXTS)
    loss.backward()
    assert all(torch.allclose(found[name], expected, rtol=1e-9) for name, expected in gradients(model).items())
    assert any(expected.abs().max() > 1e-4 for expected in gradients(model).values())
    logs = {"loss": 1.0}
    callback.on_log(*hook, logs=logs)
    assert logs["rehearsal_kl"] == pytest.approx(divergence_by_hand(model, TEXTS).item(), rel=1e-5)


def test_texts_follow_each_other_in_a_circle(tmp_path: Path) -> None:
    model = adapted()
    callback, hook = begun(model, tmp_path, batch_size=3, every_n_steps=2)
    seen = []
    for step in range(5):
        hook[1].global_step = step
        model.zero_grad()
        callback.on_step_begin(*hook, model=model)
        seen.append({name: p.grad for name, p in trainable(model).items()})
    for step, first in ((0, 0), (2, 3), (4, 2)):
        model.zero_grad()
        divergence_by_hand(model, [TEXTS[(first + number) % 4] for number in range(3)]).backward()
        assert all(torch.allclose(seen[step][name], g, rtol=1e-9) for name, g in gradients(model).items())
    assert all(grad is None for step in (1, 3) for grad in seen[step].values())


def shares(rank: int) -> dict[str, Tensor]:
    model = adapted()
    prompts = [{"input_ids": torch.tensor([text])} for text in TEXTS]
    rehearse(model, prompts, 0.7, rank, 2)
    return gradients(model)


@pytest.mark.slow
def test_two_ranks_average_to_one(tmp_path: Path) -> None:
    one, two = on_ranks(shares, tmp_path)
    model = adapted()
    (0.7 * divergence_by_hand(model, TEXTS)).backward()
    for name, expected in gradients(model).items():
        assert torch.allclose((one[name] + two[name]) / 2, expected, rtol=1e-9)


def test_a_part_of_a_prompt_that_does_not_count_has_no_gradient() -> None:
    whole, cut = adapted(), adapted()
    labels = torch.tensor([[1, 5, 9, -100, -100]])
    rehearse(whole, [{"input_ids": torch.tensor([[1, 5, 9, 30, 7]]), "labels": labels}], 1.0)
    divergence_by_hand(cut, [[1, 5, 9]]).backward()
    assert all(torch.allclose(g, gradients(cut)[name], rtol=1e-9) for name, g in gradients(whole).items())


# In a Trainer


@pytest.mark.parametrize("kind", ["dowser", "channels", "lora"])
def test_with_a_weight_of_zero_a_training_is_bit_for_bit_the_same(kind: str, tmp_path: Path) -> None:
    with_it, without = (adapted(kind, torch.float32, dropout=0.1) for _ in range(2))
    trained(with_it, tmp_path / "a", [RehearsalCallback(TEXTS, weight=0)])
    trained(without, tmp_path / "b", [])
    assert same(weights(with_it), weights(without))


def test_the_batches_and_the_dropout_of_the_training_stay_what_they_are(tmp_path: Path) -> None:
    torch.manual_seed(5)
    _, one = trained(adapted("lora", torch.float32, 0.1), tmp_path / "a", [RehearsalCallback(TEXTS, weight=1e-30)])
    state = torch.get_rng_state()
    torch.manual_seed(5)
    _, two = trained(adapted("lora", torch.float32, 0.1), tmp_path / "b", [])
    assert all(torch.equal(a, b) for a, b in zip(one.batches, two.batches, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_accumulated_batches_meet_one_rehearsal(tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = adapted()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trained(model, tmp_path / str(size), [RehearsalCallback(TEXTS)], optim="sgd", **options)
        found.append(weights(model))
    assert all(torch.allclose(tensor, found[1][name], rtol=1e-6, atol=1e-9) for name, tensor in found[0].items())


def test_it_is_clipped_with_the_loss(tmp_path: Path) -> None:
    before, model = adapted(), adapted()
    options = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 1e-3, "learning_rate": 1.0}
    trained(model, tmp_path, [RehearsalCallback(TEXTS, weight=100.0)], **options)
    steps = [(p - trainable(before)[name]).detach() for name, p in trainable(model).items()]
    assert float(torch.stack([step.norm() for step in steps]).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_resumed_training_is_a_straight_one(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    straight = adapted("dowser", torch.float32)
    trained(straight, tmp_path / "straight", [RehearsalCallback(config=OWN)], **options)
    resumed = adapted("dowser", torch.float32)
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    trained(resumed, tmp_path / "resumed", [RehearsalCallback(config=OWN)], resume=checkpoint, **options)
    assert same(weights(straight), weights(resumed))


def test_the_base_writes_its_own_texts_and_the_logs_have_the_divergence(tmp_path: Path) -> None:
    model = adapted("dowser", torch.float32)
    trainer, _ = trained(model, tmp_path, [RehearsalCallback(config=OWN)])
    logged = [entry["rehearsal_kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(value > 0 for value in logged)


def test_it_holds_the_model_to_its_base(tmp_path: Path) -> None:
    ids = torch.tensor(TEXTS[:1])
    drift = []
    for weight in (0.0, 30.0):
        model = get_peft_model(tiny_llama(), config(score="random", update_ratio=0.3))
        trained(model, tmp_path / str(weight), [RehearsalCallback(TEXTS, weight=weight)], max_steps=12)
        model.eval()
        with torch.no_grad():
            now = model(input_ids=ids).logits.log_softmax(-1)
            with model.disable_adapter():
                drift.append(float(F.kl_div(now, model(input_ids=ids).logits.softmax(-1), reduction="sum")))
    assert drift[1] < 0.5 * drift[0]


class Scaler:
    def get_scale(self) -> float:
        return 128.0


def test_the_gradient_is_scaled_as_a_scaler_scales_the_loss(tmp_path: Path) -> None:
    plain, scaled = adapted(), adapted()
    for model, optimizer in ((plain, None), (scaled, type("Optimizer", (), {"scaler": Scaler()})())):
        callback, hook = begun(model, tmp_path, batch_size=4)
        callback.on_step_begin(*hook, model=model, optimizer=optimizer)
    for name, expected in gradients(plain).items():
        assert torch.allclose(gradients(scaled)[name], 128 * expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_gradients_are_the_same() -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        rehearse(model, [{"input_ids": torch.tensor([text])} for text in TEXTS], 1.0)
    assert all(torch.equal(g, gradients(checkpointed)[name]) for name, g in gradients(plain).items())


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": "one"}, r"texts must be a list of texts, got a single string; pass \[text\]"),
        ({"texts": []}, "texts is empty"),
        ({"texts": TEXTS, "config": OWN}, "config is for the texts that the base writes"),
        ({"weight": -1.0}, r"weight must be a finite number of at least 0, got -1\.0"),
        ({"weight": float("inf")}, "weight must be a finite number"),
        ({"weight": float("nan")}, "weight must be a finite number"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RehearsalCallback(**options)


def test_a_training_that_cannot_rehearse_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a PeftModel: its base is gone after the first step"):
        trained(tiny_llama(), tmp_path, [RehearsalCallback(TEXTS)])
    with pytest.raises(ValueError, match="RehearsalCallback cannot read its texts: they are strings"):
        trained(adapted(dtype=torch.float32), tmp_path, [RehearsalCallback(["a text"])])
    body = get_peft_model(copy.deepcopy(tiny_llama().model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="RehearsalCallback has no texts, and LlamaModel cannot write its own"):
        trained(body, tmp_path, [RehearsalCallback()])
