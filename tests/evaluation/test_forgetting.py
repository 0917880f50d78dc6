"""What `ForgettingCallback` measures, against one text at a time."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import GRANULARITIES, every_granularity
from datasets import Dataset
from models import config, set_values, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from trainings import EVALUATED, QUIET, rows, same, trained, weights
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from peft_dowser import ForgettingCallback
from peft_dowser.delta.layout import Granularity

pytestmark = pytest.mark.filterwarnings("ignore")

TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny_llava"
TEXTS = [row["input_ids"][: 3 + number] for number, row in enumerate(rows(7, seed=1))]


def loss_of(model: nn.Module, texts: Sequence[Sequence[int]] = TEXTS) -> float:
    """Cross-entropy per token, one text at a time."""
    losses = []
    with torch.no_grad():
        for text in texts:
            logits = model(input_ids=torch.tensor([text])).logits[0, :-1].double()
            losses += F.cross_entropy(logits, torch.tensor(text[1:]), reduction="none").tolist()
    return sum(losses) / len(losses)


def history(trainer: Trainer, key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in trainer.state.log_history if key in entry]


@every_granularity
def test_upstream_loss_and_forgetting_at_every_evaluation(granularity: Granularity, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(update_ratio=0.5, granularity=granularity))
    trainer, _ = trained(model, tmp_path, [ForgettingCallback(TEXTS, batch_size=3, kl=True)], **EVALUATED)
    losses, rises = history(trainer, "upstream_loss"), history(trainer, "forgetting")
    assert [step for step, _ in losses] == [0, 2, 4]  # the end is the last evaluation
    assert losses[0][1] == pytest.approx(loss_of(tiny_llama()), rel=1e-5)
    assert losses[2][1] == pytest.approx(loss_of(model.eval()), rel=1e-5)
    assert rises[0][1] == 0
    assert [rise for _, rise in rises] == [loss - losses[0][1] for _, loss in losses]
    assert rises[2][1] != 0
    kl = history(trainer, "upstream_kl")
    assert kl[0][1] == 0
    with torch.no_grad():
        now, base = (
            torch.cat([m(input_ids=torch.tensor([text])).logits[0, :-1].double() for text in TEXTS]).log_softmax(-1)
            for m in (model, tiny_llama())
        )
    assert kl[2][1] == pytest.approx(float((base.exp() * (base - now)).sum(-1).mean()), rel=1e-3)


def test_the_baseline_is_exactly_that_of_the_bare_base(tmp_path: Path) -> None:
    """Also with modules_to_save, a second adapter, and an adapter that has been trained before."""
    model = get_peft_model(tiny_llama(), config(modules_to_save=["lm_head"]))
    model.add_adapter("other", config(score="random"))
    set_values(model)
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.mul_(2)
    trainable = [p.requires_grad for p in model.parameters()]
    callback = ForgettingCallback(TEXTS)
    trainer, _ = trained(model, tmp_path, [callback], max_steps=1)
    dense = ForgettingCallback(TEXTS)
    trained(tiny_llama(), tmp_path, [dense], max_steps=1)
    assert callback.baseline == dense.baseline
    assert history(trainer, "forgetting")[0][1] > 0
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert model.training  # as the Trainer left it


@pytest.mark.parametrize("adapted", [*GRANULARITIES, None])
def test_measuring_changes_no_trained_weight(tmp_path: Path, adapted: Granularity | None) -> None:
    def run(callbacks: list[TrainerCallback]) -> dict[str, Tensor]:
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.2  # training draws random numbers
        if adapted:
            model = get_peft_model(model, config(granularity=adapted))
        torch.manual_seed(0)
        trained(model, tmp_path, callbacks, **EVALUATED)
        return weights(model)

    callback = ForgettingCallback(config=config(), kl=adapted is not None, accuracy=lambda model: float(torch.rand(())))
    expected = run([])
    assert same(run([callback]), expected)


def test_prompts_of_the_model_need_no_data(tmp_path: Path) -> None:
    callbacks = [ForgettingCallback(config=config()) for _ in range(2)]
    for callback, model in zip(callbacks, (tiny_llama(), get_peft_model(tiny_llama(), config())), strict=True):
        before = model.generation_config
        trainer, _ = trained(model, tmp_path, [callback], max_steps=1)
        assert [step for step, _ in history(trainer, "forgetting")] == [0, 1]
        assert model.generation_config is before
    plain, adapted = ([prompt["input_ids"] for prompt in callback.prompts] for callback in callbacks)
    assert all(torch.equal(a, b) for a, b in zip(plain, adapted, strict=True))
    assert [ids.shape for ids in plain] == [(1, 12)] * 4
    assert callbacks[0].baseline == callbacks[1].baseline
    assert callbacks[0].baseline["upstream_loss"] == pytest.approx(
        loss_of(tiny_llama(), [ids[0].tolist() for ids in plain]), rel=1e-5
    )


def test_labels_padding_and_length_decide_which_tokens_count(tmp_path: Path) -> None:
    ids = torch.tensor([TEXTS[6]])
    padded = {"input_ids": F.pad(ids, (0, 2)), "attention_mask": F.pad(torch.ones_like(ids), (0, 2))}
    callback = ForgettingCallback([padded, TEXTS[0]], max_length=3)
    trained(tiny_llama(), tmp_path, [callback], max_steps=1)
    assert callback.baseline["upstream_loss"] == pytest.approx(loss_of(tiny_llama(), [TEXTS[6], TEXTS[0]]), rel=1e-5)
    labels = ids.clone()
    labels[0, 3:] = -100
    callback = ForgettingCallback([{"input_ids": ids, "labels": labels}])
    trained(tiny_llama(), tmp_path, [callback], max_steps=1)
    assert callback.baseline["upstream_loss"] == pytest.approx(loss_of(tiny_llama(), [TEXTS[6][:3]]), rel=1e-5)
    with pytest.raises(ValueError, match="No token of the upstream texts counts"):
        nothing = ForgettingCallback([{"input_ids": ids, "labels": labels - labels - 100}])
        trained(tiny_llama(), tmp_path, [nothing], max_steps=1)


class Seen(TrainerCallback):
    """Stands for a report integration: what it is told, and the metrics of the evaluations."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.metrics: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **kwargs) -> None:
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, metrics, **kwargs) -> None:
        self.metrics.append(dict(metrics))


def test_a_trainer_lets_the_values_reach_report_integrations(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, eval_on_start=True, **QUIET, **EVALUATED)
    seen = Seen()
    trainer = Trainer(
        tiny_llama(), arguments, train_dataset=rows(), eval_dataset={"a": rows(2), "b": rows(2)}, callbacks=[seen]
    )
    trainer.add_callback(ForgettingCallback(TEXTS, trainer=trainer))
    trainer.train()
    reported = [logs["forgetting"] for logs in seen.logs if "forgetting" in logs]
    assert reported == [value for _, value in history(trainer, "forgetting")]
    assert [step for step, _ in history(trainer, "forgetting")] == [0, 2]  # once for both evaluation sets
    after = trainer.evaluate(rows(2))
    assert after["eval_forgetting"] == reported[-1]


def test_the_best_model_can_be_the_one_that_forgot_least(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = EVALUATED | {"save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True}
    model = get_peft_model(tiny_llama(), config(update_ratio=0.5))
    trainer, _ = trained(
        model,
        tmp_path,
        [ForgettingCallback(TEXTS)],
        metric_for_best_model="forgetting",
        greater_is_better=False,
        **options,
    )
    found = history(trainer, "forgetting")
    best = min(found[1:3], key=lambda entry: entry[1])
    assert trainer.state.best_global_step == best[0]
    assert trainer.state.best_metric == best[1]
    assert len(found) == 4  # the end measures the model that was loaded
    assert found[3] == (4, best[1])
    assert f"\nLoaded checkpoint-{best[0]}: forgetting {best[1]:.4f} nats per token" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"'forgetting' with greater_is_better=True would keep .* set greater_is"):
        trained(tiny_llama(), tmp_path, [ForgettingCallback(TEXTS)], metric_for_best_model="eval_forgetting", **options)


def test_training_stops_at_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny_llama(), config(update_ratio=0.5))
    callback = ForgettingCallback(TEXTS, max_forgetting=0.001)
    trainer, _ = trained(model, tmp_path, [callback], max_steps=20, learning_rate=0.1, **EVALUATED)
    assert trainer.state.global_step == 2
    assert [record.message for record in caplog.records if record.name == "peft_dowser.evaluation.forgetting"] == [
        f"Training stops at step 2: the upstream loss has risen by {history(trainer, 'forgetting')[-1][1]:.4g}, "
        "more than max_forgetting=0.001."
    ]
    with pytest.raises(ValueError, match=r"max_forgetting=1 could never stop .* Pass every_n_steps"):
        trained(tiny_llama(), tmp_path, [ForgettingCallback(TEXTS, max_forgetting=1)])


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("disable_tqdm", [False, True])
@pytest.mark.parametrize("added", ["callbacks", "add_callback", "with its trainer"])
def test_the_console_and_the_checkpoint_tell_every_measurement(
    tmp_path: Path, added: str, disable_tqdm: bool, evaluated: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    options = QUIET | {"max_steps": 5, "save_strategy": "steps", "save_steps": 5, "disable_tqdm": disable_tqdm}
    arguments = TrainingArguments(output_dir=str(tmp_path), **options | (EVALUATED if evaluated else {}))
    callback = ForgettingCallback(TEXTS, every_n_steps=3)
    trainer = Trainer(
        tiny_llama(),
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(2) if evaluated else None,
        callbacks=[callback] if added == "callbacks" else None,
    )
    if added != "callbacks":
        trainer.add_callback(callback)
    callback.trainer = trainer if added == "with its trainer" else None
    trainer.train()
    found = history(trainer, "forgetting")
    assert [step for step, _ in found] == ([0, 2, 3, 4, 5] if evaluated else [0, 3, 5])
    losses = [loss for _, loss in history(trainer, "upstream_loss")]
    expected = [
        f"Step {step}: forgetting {rise:.4f} nats per token (upstream_loss {losses[0]:.4f} -> {loss:.4f})"
        for (step, rise), loss in zip(found, losses, strict=True)
    ]
    shown = capfd.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("Step ")] == expected
    assert [step for step, _ in history(trainer, "loss")] == [1, 2, 3, 4, 5]  # the losses are still logged
    saved = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["log_history"]
    assert [entry["forgetting"] for entry in saved if "forgetting" in entry] == [rise for _, rise in found]


def test_only_the_first_rank_tells_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Other(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            state.is_world_process_zero = False

    trainer, _ = trained(tiny_llama(), tmp_path, [Other(), ForgettingCallback(TEXTS)], max_steps=1)
    assert [step for step, _ in history(trainer, "forgetting")] == [0, 1]
    assert "forgetting" not in capfd.readouterr().out


def test_the_bound_holds_between_evaluations_too(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(update_ratio=0.5))
    callback = ForgettingCallback(TEXTS, max_forgetting=0.001, every_n_steps=3)
    trainer, _ = trained(model, tmp_path, [callback], max_steps=20, learning_rate=0.1)
    *before, (step, rise) = history(trainer, "forgetting")
    assert trainer.state.global_step == step < 20
    assert [step for step, _ in before] == list(range(0, step, 3))
    assert rise > 0.001 >= max(rise for _, rise in before)


def test_an_accuracy_of_the_users_own(tmp_path: Path) -> None:
    def bias(model: nn.Module) -> float:
        assert not model.training and not torch.is_grad_enabled()
        return float(model.lm_head.weight.sum())

    model = tiny_llama()
    trainer, _ = trained(model, tmp_path, [ForgettingCallback(TEXTS, accuracy=bias)], **EVALUATED)
    found, change = history(trainer, "upstream_accuracy"), history(trainer, "upstream_accuracy_change")
    assert found[0][1] == float(tiny_llama().lm_head.weight.sum())
    assert change == [(step, value - found[0][1]) for step, value in found]
    assert change[2][1] != 0


def test_a_resumed_training_keeps_its_baseline(tmp_path: Path) -> None:
    options = EVALUATED | {"save_strategy": "steps", "save_steps": 2}
    resume = str(tmp_path / "checkpoint-2")
    straight, _ = trained(tiny_llama(), tmp_path, [ForgettingCallback(TEXTS)], **options)
    resumed, _ = trained(tiny_llama(), tmp_path, [ForgettingCallback(TEXTS)], resume, **options)
    assert history(resumed, "forgetting") == history(straight, "forgetting")
    with pytest.raises(ValueError, match="cannot resume without texts: the dense model that wrote the prompts"):
        trained(tiny_llama(), tmp_path, [ForgettingCallback()], resume, **options)
    with pytest.raises(ValueError, match="has no upstream_loss and upstream_accuracy of step 0"):
        trained(tiny_llama(), tmp_path, [ForgettingCallback(TEXTS, accuracy=lambda model: 1)], resume, **options)


def test_an_evaluation_outside_a_training(tmp_path: Path) -> None:
    trainer = Trainer(
        tiny_llama(),
        TrainingArguments(output_dir=str(tmp_path), **QUIET),
        eval_dataset=rows(2),
        callbacks=[ForgettingCallback(TEXTS, max_forgetting=0)],
    )
    assert "eval_forgetting" not in trainer.evaluate()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_LLAVA)


def test_sft_with_texts(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = ["rev ab?", "ba cd ef"]
    data = Dataset.from_list([{"prompt": f"rev {a}{b}?", "completion": f"{b}{a}"} for a in "abcd" for b in "efgh"])
    model = tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    expected = loss_of(model, ids)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(tmp_path), max_steps=4, **QUIET, **EVALUATED),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM"),
    )
    trainer.add_callback(ForgettingCallback(texts, kl=True, trainer=trainer))
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    found = history(trainer, "upstream_loss")
    assert [step for step, _ in found] == [0, 2, 4]
    assert found[0][1] == pytest.approx(expected, rel=1e-5)
    assert history(trainer, "forgetting")[2][1] != 0
    # TRL's own averages stay in the rows of the loss.
    of_the_loss = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in of_the_loss] == [1, 2, 3, 4]
    assert all("mean_token_accuracy" in entry and "forgetting" not in entry for entry in of_the_loss)
    assert not any("mean_token_accuracy" in entry for entry in trainer.state.log_history if "forgetting" in entry)
    assert history(trainer, "upstream_kl")[2][1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "texts is empty: pass at least one text"),
        ({"texts": "a text"}, r"got a single string; pass \[text\]"),
        ({"texts": TEXTS, "config": config()}, "config is for the texts that the base writes"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_length": 1}, "max_length must be at least 2, .* got 1"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, or None, got 0"),
        ({"max_forgetting": math.nan}, "max_forgetting must be a finite number of at least 0, got nan"),
        ({"max_forgetting": -1}, "got -1"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ForgettingCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a text"]}, "they are strings, and the trainer has no processing_class"),
        ({"texts": [[1, 2], [3]]}, r"texts\[1\] must be .* two tokens or more .* shape \(1, 1\)"),
        ({"texts": [{"pixel_values": torch.zeros(1)}]}, r"texts\[0\] must be a text, a row of token ids or a mapping"),
        ({"texts": TEXTS, "kl": True}, "but LlamaForCausalLM is not a PeftModel: its base is gone"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_train_begin(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(tiny_llama(), tmp_path, [ForgettingCallback(**arguments)])


def test_a_model_that_cannot_write_or_predict_is_refused(tmp_path: Path) -> None:
    headless = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )
    with pytest.raises(ValueError, match=r"LlamaModel cannot write its own: it is not a causal .* Pass texts="):
        trained(headless, tmp_path, [ForgettingCallback()])
    with pytest.raises(ValueError, match=r"LlamaModel gives logits of shape none for \(7, 9\) tokens"):
        trained(headless, tmp_path, [ForgettingCallback(TEXTS)])
    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration cannot write its own"):
        trained(seq2seq, tmp_path, [ForgettingCallback()])


def test_the_model_card_tells_what_was_measured_last(tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(score="random"))
    trainer, _ = trained(model, tmp_path, [ForgettingCallback(TEXTS)], **EVALUATED)
    model.save_pretrained(tmp_path / "adapter")
    loss, rise = history(trainer, "upstream_loss")[-1][1], history(trainer, "forgetting")[-1][1]
    line = f"- measured in training: upstream_loss {loss:.4g}, forgetting {rise:.4g}\n"
    assert line in (tmp_path / "adapter" / "README.md").read_text()
    get_peft_model(tiny_llama(), model.peft_config["default"]).save_pretrained(tmp_path / "untrained")
    assert "measured in training" not in (tmp_path / "untrained" / "README.md").read_text()
