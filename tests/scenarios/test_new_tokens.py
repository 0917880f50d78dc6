"""Adapters of models with new tokens: whatever PEFT writes for them loads, and gives the outputs of the training."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import pairwise
from models import logits, set_values, tiny_llama
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from peft_dowser import DowserConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*tied"),
    pytest.mark.filterwarnings("ignore:ensure_weight_tying=True has no effect"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type"),
]
PREFIX = "base_model.model."
NEW = [96, 97, 98, 99]
BATCH = torch.tensor([[1, 5, 9, *NEW]])
TRAINED = {
    "modules_to_save, both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "modules_to_save, tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "modules_to_save, embeddings": {"modules_to_save": ["embed_tokens"]},
    "modules_to_save, head": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": NEW},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": NEW}},
    "tokens of both": {"trainable_token_indices": {"embed_tokens": NEW, "lm_head": NEW}},
    "tokens and head, as TRL": {"trainable_token_indices": {"embed_tokens": NEW}, "modules_to_save": ["lm_head"]},
    "targets, none of them": {},
    "modules_to_save with channels": {"modules_to_save": ["embed_tokens", "lm_head"], "granularity": "input_channel"},
    "tokens with channels": {"trainable_token_indices": NEW, "granularity": "input_channel"},
    "targets, none of them, with channels": {"granularity": "input_channel"},
    "targets, both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "targets, embeddings": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "targets, head": {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
}
# PEFT makes, saves and loads it, with any method, but has no forward for it.
MUTE = (True, "tokens and head, as TRL")
COMBINATIONS = list(product((False, True), ("auto", True, False), TRAINED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases without the new tokens: the vocabulary of theirs is what PEFT compares with."""
    folder = tmp_path_factory.mktemp("bases")
    for tied in (False, True):
        tiny_llama(layers=1, vocab=96, tied=tied).save_pretrained(folder / str(tied))
    return folder


def resized(folder: Path, tied: bool, seed: int = 1) -> PreTrainedModel:
    base = LlamaForCausalLM.from_pretrained(folder / str(tied))
    torch.manual_seed(seed)  # of the new rows
    base.resize_token_embeddings(100)
    return base


def adapted(base: nn.Module, **settings: Any) -> PeftModel:
    return get_peft_model(
        base,
        DowserConfig(**({"target_modules": ["q_proj"], "score": "magnitude", "task_type": "CAUSAL_LM"} | settings)),
    )


def trained(base: nn.Module, **settings: Any) -> PeftModel:
    model = adapted(base, **settings)
    set_values(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.25)
    return model.eval()


def by_peft(base: PreTrainedModel, folder: Path, settings: dict) -> nn.Module:
    return PeftModel.from_pretrained(base, folder)


def by_resuming(base: PreTrainedModel, folder: Path, settings: dict) -> nn.Module:
    model = adapted(base, **settings)
    model.load_adapter(folder, "default", is_trainable=True)
    return model


def by_transformers(base: PreTrainedModel, folder: Path, settings: dict) -> nn.Module:
    base.load_adapter(str(folder))
    return base


@pytest.mark.parametrize(("tied", "save_embeddings", "name"), pairwise(COMBINATIONS))
def test_what_peft_writes_loads(
    tied: bool, save_embeddings: bool | str, name: str, folder: Path, tmp_path: Path
) -> None:
    model = trained(resized(folder, tied), **TRAINED[name])
    model.save_pretrained(tmp_path, save_embedding_layers=save_embeddings)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = None if (tied, name) == MUTE else logits(model, BATCH)
    loaders: list[Callable] = [by_peft, by_resuming, by_transformers]
    for load in loaders:
        loaded = load(resized(folder, tied), tmp_path, TRAINED[name])
        found = get_peft_model_state_dict(loaded, save_embedding_layers=False)
        assert found.keys() == {key.removeprefix("" if isinstance(loaded, PeftModel) else PREFIX) for key in tensors}
        assert all(torch.equal(found.get(key, found.get(key.removeprefix(PREFIX))), tensors[key]) for key in tensors)
        assert expected is None or torch.equal(logits(loaded, BATCH), expected), load.__name__


# Every choice with one of the two bases always runs.
RESUMED = [
    pytest.param(tied, name, marks=pytest.mark.slow if (number + tied) % 2 else ())
    for tied in (False, True)
    for number, name in enumerate(TRAINED)
    if (tied, name) != MUTE
]


@pytest.mark.parametrize(("tied", "name"), RESUMED)
def test_a_checkpoint_of_the_trainer_is_resumed_from(tied: bool, name: str, folder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 5, 96, 99], "labels": [1, 5, 96, 99]}] * 4
    options = {"report_to": [], "per_device_train_batch_size": 1, "use_cpu": True, "disable_tqdm": True, "seed": 0}

    def run(folder_of_run: Path, steps: int, **settings: Any) -> Trainer:
        arguments = TrainingArguments(str(folder_of_run), max_steps=steps, save_steps=1, logging_steps=10, **options)
        return Trainer(adapted(resized(folder, tied), **TRAINED[name]), arguments, train_dataset=rows)

    whole = run(tmp_path, 2)
    whole.train()
    resumed = run(tmp_path / "resumed", 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert torch.equal(logits(resumed.model, BATCH), logits(whole.model, BATCH))
