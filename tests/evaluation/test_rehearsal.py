"""Rehearsal: the gradient of weight times KL(base || adapted), against autograd of the formula written out."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.optimizer import AcceleratedOptimizer
from groups import on_ranks
from models import config, set_values, t5, tiny_llama
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor
from trainings import QUIET, rows, same, trained, weights
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from peft_dowser import DowserConfig, RehearsalCallback
from peft_dowser.evaluation.rehearsal import rehearse

TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny_llava"
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


def hook_in(folder: Path) -> tuple:
    """What a Trainer hands to each of its hooks before the model."""
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[]), State(), None


def begun(model: Any, folder: Path, **options: Any) -> tuple[RehearsalCallback, tuple]:
    callback = RehearsalCallback(TEXTS, **options)
    hook = hook_in(folder)
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


def test_in_the_same_order_the_bits_are_the_same() -> None:
    """One text and then the loss, by the operations of the formula: nothing else touches the gradients."""
    model = adapted(dtype=torch.float32)
    ids, batch = torch.tensor(TEXTS[:1]), torch.tensor([[1, 3, 17, 25, 4]])
    rehearse(model, [{"input_ids": ids}], 0.3)
    model(input_ids=batch, labels=batch).loss.backward()
    found = gradients(model)
    model.zero_grad()
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    for parameter in trainable(model).values():
        parameter.requires_grad_(True)
    mask = torch.ones_like(ids)
    now = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    (F.kl_div(now, base, reduction="sum", log_target=True) * (1 / (ids.shape[1] - 1)) * 0.3).backward()
    model(input_ids=batch, labels=batch).loss.backward()
    assert same(found, gradients(model))


def test_the_base_is_in_eval_mode_and_the_model_has_its_dropout() -> None:
    """Of the adapter and of the base: one text, so that both draw the same numbers in the same order."""
    model = adapted("lora", dropout=0.5)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    ids = torch.tensor([TEXTS[0], TEXTS[0][::-1]])
    torch.manual_seed(7)
    rehearse(model, [{"input_ids": row[None]} for row in ids], 1.0)
    found = gradients(model)
    assert all(module.training for module in model.modules())

    model.zero_grad()
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        p = model(input_ids=ids).logits[:, :-1].softmax(-1)
    for parameter in trainable(model).values():
        parameter.requires_grad_(True)
    model.train()
    torch.manual_seed(7)
    q = model(input_ids=ids).logits[:, :-1].softmax(-1)
    (p * (p.log() - q.log())).sum(-1).mean().backward()
    assert all(torch.allclose(found[name], expected, rtol=1e-9) for name, expected in gradients(model).items())


def test_full_fine_tuning_is_held_to_a_base_of_its_own(tmp_path: Path) -> None:
    model, base = tiny_llama(torch.float64).train(), tiny_llama(torch.float64).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    callback, hook = begun(model, tmp_path, weight=0.7, batch_size=4, base=base)
    callback.on_step_begin(*hook, model=model)
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert all(parameter.grad is None for parameter in base.parameters())
    assert base.training
    model.zero_grad()
    terms = []
    for text in TEXTS:
        ids = torch.tensor([text])
        p = base(input_ids=ids).logits[0, :-1].softmax(-1).detach()
        terms.append((p * (p.log() - model(input_ids=ids).logits[0, :-1].log_softmax(-1))).sum(-1))
    (0.7 * torch.cat(terms).mean()).backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-9), name


def test_after_it_has_generated_a_model_rehearses_as_before() -> None:
    """`generate` of Dowser writes its values into the base, and takes them back."""
    plain, generated = adapted(), adapted()
    generated.generate(input_ids=torch.tensor(TEXTS[:1]), max_new_tokens=3, do_sample=False)
    for model in (plain, generated):
        rehearse(model, [{"input_ids": torch.tensor([text])} for text in TEXTS], 1.0)
    assert same(gradients(plain), gradients(generated))


def test_texts_follow_each_other_in_a_circle(tmp_path: Path) -> None:
    model = adapted()
    callback, hook = begun(model, tmp_path, batch_size=3, every_n_steps=2)
    seen = []
    for step in range(5):
        hook[1].global_step = step
        model.zero_grad()
        callback.on_step_begin(*hook, model=model)
        seen.append({name: p.grad for name, p in trainable(model).items()})
    for step, first in ((1, 0), (3, 3)):
        model.zero_grad()
        divergence_by_hand(model, [TEXTS[(first + number) % 4] for number in range(3)]).backward()
        assert all(torch.allclose(seen[step][name], g, rtol=1e-9) for name, g in gradients(model).items())
    assert all(grad is None for step in (0, 2, 4) for grad in seen[step].values())


def shares(rank: int) -> dict[str, Tensor]:
    model = adapted()
    prompts = [{"input_ids": torch.tensor([text])} for text in TEXTS]
    rehearse(model, prompts, 0.7, rank=rank, ranks=2)
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


@pytest.mark.parametrize("kind", ["dowser", "channels", "lora", "full"])
def test_a_resumed_training_is_a_straight_one(kind: str, tmp_path: Path) -> None:
    """With dropout: the texts, their order and the random numbers are the same."""
    options = {"save_strategy": "steps", "save_steps": 2}
    found = []
    for folder, checkpoint in (("straight", None), ("resumed", str(tmp_path / "straight" / "checkpoint-2"))):
        torch.manual_seed(0)
        model = tiny_llama() if kind == "full" else adapted(kind, torch.float32, dropout=0.2)
        base = tiny_llama() if kind == "full" else None
        callback = RehearsalCallback(config=OWN, batch_size=3, base=base)
        trained(model, tmp_path / folder, [callback], resume=checkpoint, **options)
        found.append(weights(model))
    assert same(*found)


def test_after_an_evaluation_it_has_its_dropout_again(tmp_path: Path) -> None:
    """An evaluation leaves the model in eval mode until the next batch."""
    found = []
    for mode in (True, False):
        model = adapted("lora", dropout=0.5)
        callback, hook = begun(model, tmp_path)
        model.train(mode)
        callback.on_step_begin(*hook, model=model)
        found.append(gradients(model))
    assert same(*found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_training_is_the_same(reentrant: bool, tmp_path: Path) -> None:
    found = []
    checkpointed = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    for number, options in enumerate(({}, checkpointed)):
        model = adapted("lora", torch.float32, dropout=0.2)
        model.enable_input_require_grads()
        torch.manual_seed(3)
        trained(model, tmp_path / str(number), [RehearsalCallback(TEXTS)], **options)
        found.append(weights(model))
    assert same(*found)


def test_under_autocast_it_runs_as_the_training_does(tmp_path: Path) -> None:
    before, model = adapted("lora", torch.float32), adapted("lora", torch.float32)
    options = {"bf16": True, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    _, recorder = trained(model, tmp_path, [RehearsalCallback(TEXTS, weight=5.0, batch_size=4)], **options)
    found = {name: parameter.detach() for name, parameter in trainable(model).items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = before(input_ids=recorder.batches[0], labels=recorder.batches[0]).loss
        (loss + 5.0 * divergence_by_hand(before, TEXTS)).backward()
    for name, parameter in trainable(before).items():
        step = parameter.detach() - found[name]
        assert float((step - parameter.grad).norm()) < 0.05 * float(parameter.grad.norm())
        assert not torch.allclose(step, torch.zeros_like(step))


def test_the_base_writes_its_own_texts_and_the_logs_have_the_divergence(tmp_path: Path) -> None:
    model = adapted("dowser", torch.float32)
    trainer, _ = trained(model, tmp_path, [RehearsalCallback(config=OWN)])
    logged = [entry["rehearsal_kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(value > 0 for value in logged)


class Reporter(TrainerCallback):
    """A report integration."""

    def __init__(self) -> None:
        self.logged: list[dict] = []

    def on_log(self, *args: Any, logs: dict, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def test_with_the_trainer_its_report_integrations_get_the_divergence(tmp_path: Path) -> None:
    model, reporter = adapted("dowser", torch.float32), Reporter()
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, **QUIET)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[reporter])
    trainer.add_callback(RehearsalCallback(TEXTS, trainer=trainer))
    trainer.train()
    history = [entry["rehearsal_kl"] for entry in trainer.state.log_history if "loss" in entry]
    assert history == [logs["rehearsal_kl"] for logs in reporter.logged if "loss" in logs]
    assert len(history) == 2


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


def test_the_gradient_is_scaled_as_a_scaler_scales_the_loss(tmp_path: Path) -> None:
    """And is itself again once the scaler has divided it before the optimizer step."""
    plain, scaled = adapted(), adapted()
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    optimizer = AcceleratedOptimizer(torch.optim.SGD(trainable(scaled).values(), lr=0.1), scaler=scaler)
    for model, its_optimizer in ((plain, None), (scaled, optimizer)):
        callback, hook = begun(model, tmp_path, batch_size=4)
        callback.on_step_begin(*hook, model=model, optimizer=its_optimizer)
    for name, expected in gradients(plain).items():
        assert torch.allclose(gradients(scaled)[name], 128 * expected, rtol=1e-9)
    scaler.unscale_(optimizer.optimizer)
    for name, expected in gradients(plain).items():
        assert torch.allclose(gradients(scaled)[name], expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointed_gradients_are_the_same() -> None:
    plain, checkpointed = adapted(), adapted()
    checkpointed.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        rehearse(model, [{"input_ids": torch.tensor([text])} for text in TEXTS], 1.0)
    assert all(torch.equal(g, gradients(checkpointed)[name]) for name, g in gradients(plain).items())


# The base's own texts


def texts_of(model: torch.nn.Module, folder: Path, **options: Any) -> list[Tensor]:
    callback = RehearsalCallback(config=OWN, **options)
    callback.on_train_begin(*hook_in(folder), model=model)
    return [prompt["input_ids"] for prompt in callback.prompts]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list:
    """Calls of `generate`."""
    calls = []
    generate = LlamaForCausalLM.generate
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda *a, **k: calls.append(0) or generate(*a, **k))
    return calls


def test_texts_are_written_once(tmp_path: Path, written: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """For adapters of every kind and state: they are disabled."""
    without_cache = texts_of(adapted(dtype=torch.float32), tmp_path)
    monkeypatch.setenv("DOWSER_CACHE", str(tmp_path / "cache"))
    random, lora = adapted(dtype=torch.float32), adapted("lora", torch.float32)
    ia3 = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    written.clear()
    assert equal(texts_of(random, tmp_path), without_cache)
    assert len(written) == 1
    assert [path.name[:8] for path in (tmp_path / "cache").iterdir()] == ["prompts-"]
    set_values(random, seed=5)
    for model in (random, lora, ia3):
        assert equal(texts_of(model, tmp_path), without_cache)
    assert equal(texts_of(tiny_llama(), tmp_path, base=tiny_llama()), without_cache)
    assert len(written) == 1


def test_texts_of_another_base_or_seed_are_written(
    tmp_path: Path, written: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOWSER_CACHE", str(tmp_path / "cache"))
    first = texts_of(adapted(dtype=torch.float32), tmp_path)
    other = get_peft_model(tiny_llama(seed=1), LoraConfig(target_modules=["q_proj"]))
    assert not equal(texts_of(other, tmp_path), first)
    callback = RehearsalCallback(config=DowserConfig(num_probes=4, probe_length=10, seed=4))
    callback.on_train_begin(*hook_in(tmp_path), model=adapted(dtype=torch.float32))
    assert len(written) == 3


def test_without_the_cache_texts_are_the_same_and_no_file_is_written(tmp_path: Path, written: list) -> None:
    """As in all tests, DOWSER_CACHE is off."""
    model = adapted(dtype=torch.float32)
    assert equal(texts_of(model, tmp_path), texts_of(model, tmp_path))
    assert len(written) == 2


def test_a_damaged_file_of_texts_is_written_again(
    tmp_path: Path, written: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DOWSER_CACHE", str(tmp_path / "cache"))
    first = texts_of(adapted(dtype=torch.float32), tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:20])
    assert equal(texts_of(adapted(dtype=torch.float32), tmp_path), first)
    assert f"those in the cache, '{path}', cannot be used" in caplog.text
    assert len(written) == 2


@pytest.fixture(scope="module")
def seeing() -> PeftModel:
    """A small image-text model with a LoRA that does something, in float64."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(TINY_LLAVA, dtype=torch.float64)
    layers = r".*language_model\.layers\.[01]\..*(q_proj|up_proj)"
    model = get_peft_model(model, LoraConfig(target_modules=layers, init_lora_weights=False))
    return model.double().train()


def kl_of_inputs(model: PeftModel, prompts: list[dict]) -> Tensor:
    """As `divergence_by_hand`, of any inputs, at the tokens whose label is not -100."""
    terms = []
    for prompt in prompts:
        inputs = {key: value for key, value in prompt.items() if key != "labels"}
        places = prompt["labels"][0, 1:] != -100
        with torch.no_grad(), model.disable_adapter():
            p = model(**inputs).logits[0, :-1].softmax(-1)
        for parameter in trainable(model).values():
            parameter.requires_grad_(True)
        q = model(**inputs).logits[0, :-1].softmax(-1)
        terms.append((p * (p.log() - q.log())).sum(-1)[places])
    return torch.cat(terms).mean()


def test_noise_images_begin_the_texts_of_an_image_text_model(seeing: PeftModel, tmp_path: Path) -> None:
    config = DowserConfig(num_probes=4, probe_length=12, probe_images=0.5, seed=1)
    callback = RehearsalCallback(config=config, batch_size=4)
    seeing.zero_grad()
    callback.on_train_begin(*hook_in(tmp_path), model=seeing)
    assert ["pixel_values" in prompt for prompt in callback.prompts] == [True, True, False, False]
    image_token = seeing.get_base_model().config.image_token_id
    for prompt in callback.prompts[:2]:
        placeholders = prompt["input_ids"] == image_token
        assert placeholders.any()
        assert (prompt["labels"][placeholders] == -100).all()
    callback.on_step_begin(*hook_in(tmp_path), model=seeing)
    found = gradients(seeing)
    seeing.zero_grad()
    kl_of_inputs(seeing, callback.prompts).backward()
    for name, expected in gradients(seeing).items():
        assert torch.allclose(found[name], expected, rtol=1e-6, atol=1e-12), name


def test_images_of_the_user_are_read(seeing: PeftModel, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(TINY_LLAVA)
    given, prompts = [], []
    for shade, question in ((40, "What is this?"), (200, "And this, in the dark?")):
        image = Image.new("RGB", (30, 30), (shade, 10, shade))
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        inputs = dict(processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt"))
        is_image = inputs["input_ids"] == seeing.get_base_model().config.image_token_id
        assert is_image.any()
        given.append(inputs)
        prompts.append(inputs | {"labels": inputs["input_ids"].masked_fill(is_image, -100)})
    callback = RehearsalCallback(given, batch_size=2)
    seeing.zero_grad()
    callback.on_train_begin(*hook_in(tmp_path), model=seeing)
    callback.on_step_begin(*hook_in(tmp_path), model=seeing)
    found = gradients(seeing)
    seeing.zero_grad()
    kl_of_inputs(seeing, prompts).backward()
    for name, expected in gradients(seeing).items():
        assert torch.allclose(found[name], expected, rtol=1e-6, atol=1e-12), name


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
        ({"max_length": 1}, "max_length must be at least 2, or no token has a next one, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RehearsalCallback(**options)


def longer_than_the_model() -> tuple[Any, dict]:
    return adapted(dtype=torch.float32), {"texts": [[1] * 40, [1] * 200]}


def nothing_counts() -> tuple[Any, dict]:
    labels = torch.full((1, 3), -100)
    return adapted(), {"texts": [[1, 2, 3], {"input_ids": torch.tensor([[1, 2, 3]]), "labels": labels}]}


def body_alone() -> tuple[Any, dict]:
    return get_peft_model(copy.deepcopy(tiny_llama().model), LoraConfig(target_modules=["q_proj"])), {}


def body_with_texts() -> tuple[Any, dict]:
    return body_alone()[0], {"texts": TEXTS}


def without_an_adapter() -> tuple[Any, dict]:
    return tiny_llama(), {"texts": TEXTS}


def biases_of_the_base() -> tuple[Any, dict]:
    return get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], bias="all")), {"texts": TEXTS}


def base_that_trains() -> tuple[Any, dict]:
    model = tiny_llama()
    return model, {"texts": TEXTS, "base": model}


def base_with_an_adapter() -> tuple[Any, dict]:
    return tiny_llama(), {"texts": TEXTS, "base": adapted()}


def base_of_another_vocabulary() -> tuple[Any, dict]:
    return tiny_llama(), {"texts": TEXTS, "base": tiny_llama(vocab=70)}


def encoder_and_decoder() -> tuple[Any, dict]:
    return get_peft_model(t5(), LoraConfig(target_modules=["q"])), {}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (longer_than_the_model, r"texts\[1\] has 200 tokens, but LlamaForCausalLM reads 128 at most .*max_length=128"),
        (nothing_counts, r"texts\[1\] has no token that counts: all its labels are -100"),
        (body_alone, "RehearsalCallback has no texts, and LlamaModel cannot write its own"),
        (body_with_texts, "needs a model that predicts the next token"),
        (encoder_and_decoder, "RehearsalCallback has no texts, and T5ForConditionalGeneration cannot write its own"),
        (without_an_adapter, "LlamaForCausalLM is not a PeftModel: its base is gone.*loaded once more, as base="),
        (biases_of_the_base, "bias='all' of adapter 'default' trains biases of the base itself"),
        (base_that_trains, "base shares weights with the LlamaForCausalLM that trains"),
        (base_with_an_adapter, "base is a PeftModel, and whether its adapter is to count is not clear"),
        (base_of_another_vocabulary, "base predicts 70 tokens and LlamaForCausalLM 64"),
    ],
)
def test_a_training_that_cannot_rehearse_does_not_begin(case, message: str, tmp_path: Path) -> None:
    model, options = case()
    before = weights(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=1, **QUIET)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=[RehearsalCallback(**options)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert same(before, weights(model))


def test_strings_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="RehearsalCallback cannot read its texts: they are strings"):
        trained(adapted(dtype=torch.float32), tmp_path, [RehearsalCallback(["a text"])])


def test_deepspeed_is_refused(tmp_path: Path) -> None:
    """Also where accelerate's own config asks for it."""
    arguments, *others = hook_in(tmp_path)
    arguments.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="cannot add to the gradients of DeepSpeed"):
        RehearsalCallback(TEXTS).on_train_begin(arguments, *others, model=adapted())
