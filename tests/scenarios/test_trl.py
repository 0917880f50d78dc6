"""Trainers: those of TRL (SFT, DPO, KTO, GRPO, Reward) and the plain one, on a tiny Llama and the tiny LLaVA."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from cases import GRANULARITIES, every_granularity
from datasets import Dataset
from models import config
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from peft_dowser import DeltaFormatError, DowserLayer, probe
from peft_dowser.delta.layout import Granularity

TINY_LLAVA = Path(__file__).parents[2] / "examples" / "tiny_llava"
QUIET = {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1, "seed": 0}
TEXTS = Dataset.from_list([{"prompt": f"rev {a}{b}?", "completion": f"{b}{a}"} for a in "abcdef" for b in "ghij"])

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY_LLAVA)


def small_llama(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(tokenizer),
            max_position_embeddings=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".dowser_values." not in name}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".dowser_values.default." in name}


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [m.dowser_index["default"].code.clone() for m in model.modules() if isinstance(m, DowserLayer)]


def sft(tokenizer: PreTrainedTokenizerBase, folder: Path, peft_config, **options) -> SFTTrainer:
    arguments = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | QUIET | options
    return SFTTrainer(
        model=small_llama(tokenizer),
        args=SFTConfig(output_dir=str(folder), **arguments),
        train_dataset=TEXTS,
        eval_dataset=TEXTS.select(range(4)),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@every_granularity
def test_sft_trains_the_values_only(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, tmp_path: Path
) -> None:
    choice = config(update_ratio=0.2, granularity=granularity)
    trainer = sft(tokenizer, tmp_path, choice, eval_strategy="steps", eval_steps=3)
    base, start = frozen(trainer.model), values(trainer.model)
    trainer.train()
    after = values(trainer.model)
    assert all(not torch.equal(after[name], start[name]) for name in start)
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(trainer.model).items())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


class StopAt(TrainerCallback):
    """Ends the training early without changing its schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


@every_granularity
def test_resuming_gives_the_trajectory_of_an_uninterrupted_run(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, tmp_path: Path
) -> None:
    options = {"save_steps": 3, "max_steps": 6}
    straight = sft(tokenizer, tmp_path / "straight", config(granularity=granularity), **options)
    straight.train()
    broken = sft(tokenizer, tmp_path / "broken", config(granularity=granularity), **options)
    broken.add_callback(StopAt(3))
    broken.train()
    # Another seed chooses another mask: the one in the checkpoint must win.
    resumed = sft(tokenizer, tmp_path / "broken", config(seed=99, granularity=granularity), **options)
    assert any(not torch.equal(a, b) for a, b in zip(codes(resumed.model), codes(straight.model), strict=True))
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(codes(resumed.model), codes(straight.model), strict=True))
    expected = values(straight.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in values(resumed.model).items())
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (straight, resumed)]
    assert losses[0] == losses[1]


OTHERS = [
    ("weight", {"update_ratio": 0.2}),
    ("weight", {"granularity": "input_channel"}),
    ("input_channel", {"granularity": "input_channel", "update_ratio": 0.2}),
    ("input_channel", {"granularity": "weight"}),
]


@pytest.mark.parametrize(("granularity", "other_choice"), OTHERS)
def test_resuming_with_another_ratio_or_granularity_is_refused(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, other_choice: dict, tmp_path: Path
) -> None:
    sft(tokenizer, tmp_path, config(granularity=granularity), save_steps=1, max_steps=1).train()
    other = sft(tokenizer, tmp_path, config(**other_choice))
    with pytest.raises(
        DeltaFormatError, match=r"was made with another update_ratio, granularity or base|index code of"
    ):
        other.train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_sft_trains_input_channels_and_resumes(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    given = {"granularity": "input_channel", "channels": 6}
    options = {"save_steps": 3, "max_steps": 6, "gradient_checkpointing": True}
    straight = sft(tokenizer, tmp_path / "straight", config(**given), **options)
    base, start = frozen(straight.model), values(straight.model)
    straight.train()
    after = values(straight.model)
    assert all(not torch.equal(after[name], start[name]) for name in start)
    assert all(tensor.shape[1] == 6 for tensor in after.values())
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(straight.model).items())
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    broken = sft(tokenizer, tmp_path / "broken", config(**given), **options)
    broken.add_callback(StopAt(3))
    broken.train()
    resumed = sft(tokenizer, tmp_path / "broken", config(**given, seed=99), **options)
    assert any(not torch.equal(a, b) for a, b in zip(codes(resumed.model), codes(straight.model), strict=True))
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(tensor, after[name]) for name, tensor in values(resumed.model).items())
    assert [e["loss"] for e in resumed.state.log_history if "loss" in e] == losses
    for other in ({}, {"granularity": "input_channel", "channels": 7}):
        wrong = sft(tokenizer, tmp_path / "broken", config(**other), **options)
        with pytest.raises(DeltaFormatError, match="another update_ratio, granularity or base model"):
            wrong.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_loaded_at_the_end(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    trainer = sft(
        tokenizer,
        tmp_path,
        config(),
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first evaluation counts as the best
    )
    trainer.train()
    best = PeftModel.from_pretrained(small_llama(tokenizer), trainer.state.best_model_checkpoint)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    expected = values(best)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in values(trainer.model).items())


@every_granularity
def test_a_checkpoint_is_an_adapter(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, tmp_path: Path
) -> None:
    trainer = sft(tokenizer, tmp_path, config(granularity=granularity), save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert (folder / "adapter_model.safetensors").exists()
    assert not (folder / "model.safetensors").exists()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(small_llama(tokenizer).eval(), folder)(input_ids=ids).logits
    assert torch.equal(found, expected)


@every_granularity
@pytest.mark.parametrize("reentrant", [True, False])
def test_sft_with_checkpointing_and_bfloat16(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, tmp_path: Path, reentrant: bool
) -> None:
    trainer = SFTTrainer(
        model=small_llama(tokenizer).bfloat16(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            **QUIET,
        ),
        train_dataset=TEXTS,
        processing_class=tokenizer,
        peft_config=config(granularity=granularity),
    )
    start = values(trainer.model)
    trainer.train()
    assert all(tensor.dtype == torch.float32 for tensor in start.values())
    assert all(not torch.equal(tensor, start[name]) for name, tensor in values(trainer.model).items())


def test_plain_trainer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = get_peft_model(small_llama(tokenizer), config())
    ids = tokenizer("rev ab?ba")["input_ids"]
    rows = [{"input_ids": ids, "labels": ids}] * 8
    start = values(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, **QUIET)
    Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows)).train()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in values(model).items())


# What a trainer is given, and what trains; the first case always runs.
STARTS = [
    pytest.param(given, granularity, marks=() if (given, granularity) == ("config", "weight") else pytest.mark.slow)
    for given in ("config", "loaded")
    for granularity in GRANULARITIES
]
PREFERENCES = Dataset.from_list([{"prompt": f"rev {a}b?", "chosen": f"b{a}", "rejected": f"{a}b"} for a in "cdefghij"])


def loaded_adapter(tokenizer: PreTrainedTokenizerBase, granularity: Granularity, folder: Path) -> PeftModel:
    """A trained adapter, loaded as a user continues with it."""
    trainer = sft(tokenizer, folder, config(update_ratio=0.3, granularity=granularity))
    trainer.train()
    trainer.save_model(folder / "adapter")
    return PeftModel.from_pretrained(small_llama(tokenizer), folder / "adapter", is_trainable=True)


@every_granularity
@pytest.mark.parametrize("given", ["config", "loaded"])
def test_dpo_starts_at_a_margin_of_zero(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, tmp_path: Path, given: str
) -> None:
    """The reference is the base (config) or a true copy of the loaded adapter."""
    model = loaded_adapter(tokenizer, granularity, tmp_path) if given == "loaded" else small_llama(tokenizer)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, **QUIET),
        train_dataset=PREFERENCES,
        processing_class=tokenizer,
        peft_config=config(granularity=granularity) if given == "config" else None,
    )
    start = values(trainer.model)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert history[0]["rewards/margins"] == 0
    assert history[-1]["rewards/margins"] != 0
    assert any(not torch.equal(tensor, start[name]) for name, tensor in values(trainer.model).items())


@pytest.mark.parametrize(("given", "granularity"), STARTS)
def test_grpo_starts_at_a_divergence_of_zero(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, given: str, granularity: Granularity
) -> None:
    model = loaded_adapter(tokenizer, granularity, tmp_path) if given == "loaded" else small_llama(tokenizer)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(text.count("b")) for text in completions],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            learning_rate=1e-2,
            beta=0.1,
            num_generations=4,
            per_device_train_batch_size=4,
            max_completion_length=8,
            **QUIET,
        ),
        train_dataset=Dataset.from_list([{"prompt": f"rev {a}b?"} for a in "cdefghij"]),
        processing_class=tokenizer,
        peft_config=config(granularity=granularity) if given == "config" else None,
    )
    base = frozen(trainer.model)
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(trainer.model).items())


@pytest.mark.parametrize(("given", "granularity"), STARTS)
def test_kto_starts_at_a_reward_of_zero(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, given: str, granularity: Granularity
) -> None:
    """The reference is the base (config) or a true copy of the loaded adapter."""
    rows = [{"prompt": f"rev {a}b?", "completion": f"b{a}", "label": True} for a in "cdefghij"]
    rows += [{"prompt": f"rev {a}b?", "completion": f"{a}b", "label": False} for a in "cdefghij"]
    trainer = KTOTrainer(
        model=loaded_adapter(tokenizer, granularity, tmp_path) if given == "loaded" else small_llama(tokenizer),
        args=KTOConfig(
            output_dir=str(tmp_path), max_steps=3, learning_rate=1e-2, per_device_train_batch_size=4, **QUIET
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=config(granularity=granularity) if given == "config" else None,
    )
    base, start = frozen(trainer.model), values(trainer.model)
    trainer.train()
    rewards = [
        entry[key]
        for entry in trainer.state.log_history
        for key in entry
        if key in ("rewards/chosen", "rewards/rejected")
    ]
    assert rewards[0] == pytest.approx(0, abs=1e-6) and any(abs(reward) > 1e-4 for reward in rewards)
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(trainer.model).items())
    assert any(not torch.equal(tensor, start[name]) for name, tensor in values(trainer.model).items())


@every_granularity
def test_a_reward_model_trains_its_values_and_its_head(
    tokenizer: PreTrainedTokenizerBase, granularity: Granularity, tmp_path: Path
) -> None:
    def classifier() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        settings = small_llama(tokenizer).config
        settings.num_labels = 1
        return LlamaForSequenceClassification(settings)

    # A classifier writes no prompts: the language model is probed, whose layers have the same names.
    statistics = str(tmp_path / "statistics.safetensors")
    probe(small_llama(tokenizer), config()).save(statistics)

    trainer = RewardTrainer(
        model=classifier(),
        args=RewardConfig(output_dir=str(tmp_path), max_steps=4, learning_rate=1e-2, **QUIET),
        train_dataset=PREFERENCES,
        processing_class=tokenizer,
        peft_config=config(task_type="SEQ_CLS", statistics=statistics, granularity=granularity),
    )
    base, start = frozen(trainer.model), values(trainer.model)
    trainer.train()
    changed = {name for name, tensor in frozen(trainer.model).items() if not torch.equal(tensor, base[name])}
    assert changed == {name for name in base if ".score.modules_to_save." in name}
    assert any(not torch.equal(tensor, start[name]) for name, tensor in values(trainer.model).items())
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(classifier(), tmp_path / "adapter").eval()
    ids = torch.tensor([[5, 9, 13, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


@every_granularity
def test_vision_sft_trains_the_language_model_of_a_vlm(granularity: Granularity, tmp_path: Path) -> None:
    sys.path.insert(0, str(TINY_LLAVA))
    try:
        from tasks import DOWNSTREAM, trl_records
    finally:
        sys.path.remove(str(TINY_LLAVA))
    processor = AutoProcessor.from_pretrained(TINY_LLAVA)
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(TINY_LLAVA),
        args=SFTConfig(output_dir=str(tmp_path), max_length=None, max_steps=3, learning_rate=1e-3, **QUIET),
        train_dataset=Dataset.from_list(trl_records(DOWNSTREAM["style"].sample(24, 0, "train"))),
        processing_class=processor,
        peft_config=config(update_ratio=0.5, probe_images=0.5, granularity=granularity),
    )
    start, base = values(trainer.model), frozen(trainer.model)
    trainer.train()
    assert len(start) == 28
    assert all("language_model" in name for name in start)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in values(trainer.model).items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in frozen(trainer.model).items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.model.merge_and_unload()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_sft_example_trains_from_its_yaml(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The very command of the README, on a model and texts in folders."""
    small_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    described = tmp_path / "model" / "tokenizer_config.json"
    described.write_text(described.read_text().replace('"processor_class": "LlavaProcessor",', ""))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text('{"text": "12+30?42"}\n' * 8)
    output = tmp_path / "adapter"
    changes = {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "texts", "output_dir": output}
    changes |= {"max_steps": 2, "warmup_steps": 0, "num_probes": 2, "probe_length": 8, "max_length": 16}
    changes |= {"dtype": "float32", "bf16": False, "use_cpu": True, "update_ratio": 0.25}
    arguments = [str(part) for key, value in changes.items() for part in (f"--{key}", value)]
    examples = Path(__file__).parents[2] / "examples"
    command = [sys.executable, str(examples / "sft.py"), "--config", str(examples / "sft.yaml"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = r"^measured: loss on held-out data \d.* -> \d.* nats per token, forgot "
    assert re.search(measured, done.stdout, re.MULTILINE)
    assert "None" not in (output / "README.md").read_text()
    loaded = PeftModel.from_pretrained(small_llama(tokenizer), output)
    assert loaded.peft_config["default"].update_ratio == 0.25
    assert any(p.any() for name, p in loaded.named_parameters() if "dowser_values" in name)
    more = [*command, "--resume", "--no_measure", "--max_steps", "3"]
    done = subprocess.run(more, capture_output=True, text=True)
    assert f"The training goes on from {output}/checkpoint-2." in done.stdout
    assert (output / "checkpoint-3").is_dir() and "measured:" not in done.stdout.partition("goes on from")[2]
