"""Modules whose weights are read without a call: no default targets, refused by name, and reported where unknown."""

import ast
import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
import transformers
from groups import on_ranks
from models import config, tiny_llama
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from trainings import trained as trained_by_trainer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from peft_dowser import DowserConfig
from peft_dowser.base.search import resolve_targets
from peft_dowser.base.weight_readers import READERS
from peft_dowser.layers.layer import dowser_layers

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")

# By type of the model: its options, and the linears of its default structure that its kernels read.
KERNELS = {
    "bamba": ({"num_hidden_layers": 2, "attn_layer_indices": [1]}, ["out_proj"]),
    "falcon_h1": ({"num_hidden_layers": 2}, ["out_proj"]),
    "falcon_mamba": ({"num_hidden_layers": 2}, ["x_proj", "dt_proj", "out_proj"]),
    "granitemoehybrid": ({"num_hidden_layers": 2, "layer_types": ["mamba", "attention"]}, ["out_proj"]),
    "jamba": ({"num_hidden_layers": 5}, ["dt_proj"]),
    "mamba": ({"num_hidden_layers": 2}, ["x_proj", "dt_proj", "out_proj"]),
    "mamba2": ({"num_hidden_layers": 2}, ["out_proj"]),
    "nemotron_h": ({}, ["out_proj"]),
    "zamba2": ({}, ["out_proj"]),
    "wavlm": ({"num_hidden_layers": 2}, ["q_proj", "k_proj", "v_proj", "out_proj"]),
}


def built(kind: str) -> nn.Module:
    """A model without memory: its structure is all that is asked for."""
    known = AutoConfig.for_model(kind, **KERNELS[kind][0])
    with torch.device("meta"):
        return (AutoModel if kind == "wavlm" else AutoModelForCausalLM).from_config(known)


@pytest.mark.parametrize("kind", KERNELS)
def test_what_a_kernel_reads_is_no_default_target_and_refused_by_name(kind: str) -> None:
    model, read = built(kind), KERNELS[kind][1]
    given = config()
    leaves = {name.rpartition(".")[2] for name in resolve_targets(model, given)}
    assert leaves and not leaves & set(read)
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for name in read:
        assert name in there
        for asked in ([name, *leaves], rf".*\.({'|'.join([name, *leaves])})"):
            given.target_modules = asked
            message = rf"\.{name}'.*\] cannot be trained: \w+ may read their weights.*Take \['{name}'\] out of target"
            with pytest.raises(ValueError, match=message):
                resolve_targets(model, given)
    given.target_modules, given.ensure_weight_tying = "all-linear", True  # for the shared layers of Zamba 2
    with pytest.warns(UserWarning, match=rf"\.{read[-1]}'.*\] are left out: \w+ may read their weights"):
        assert not {name.rpartition(".")[2] for name in resolve_targets(model, given)} & set(read)


def test_a_subclass_reads_the_same() -> None:
    kernel = type("Kernel", (), {})
    mine = type("Mine", (nn.Module,), {})
    reader = type("Reader", (type("MambaMixer", (nn.Module,), {}), kernel), {})()
    reader.out_proj, model = nn.Linear(4, 4), mine()
    model.mixer = reader
    with pytest.raises(ValueError, match=r"'mixer.out_proj'\] cannot be trained: MambaMixer"):
        resolve_targets(model, config(target_modules=["out_proj"]))


def test_a_saved_adapter_that_has_values_there_is_loaded_for_a_merge(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.mixer, model.head = type("Mixer", (nn.Module,), {})(), nn.Linear(4, 4)
    model.mixer.out_proj = nn.Linear(8, 4)
    base = copy.deepcopy(model)
    base.mixer.__class__ = type("Mamba2Mixer", (nn.Module,), {})
    given = DowserConfig(target_modules=["out_proj"], score="random", init_weights=False)
    adapted = get_peft_model(model, given)
    adapted.save_pretrained(tmp_path)
    expected = adapted.merge_and_unload().mixer.out_proj.weight
    with pytest.warns(UserWarning, match=r"changes modules \['mixer.out_proj'\], but Mamba2Mixer may read.*: merge"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded.merge_and_unload().mixer.out_proj.weight, expected)


class ReadingMLP(LlamaMLP):
    """Reads the weight of `down_proj` in training, as fused kernels do."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        return F.linear(hidden, self.down_proj.weight) if self.training else self.down_proj(hidden)


class AlwaysReadingMLP(LlamaMLP):
    """Reads it everywhere, so that a probe does not reach it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


READ = "model.layers.1.mlp.down_proj"
NAMED = f"Adapter 'default': 1 of 14 modules got no gradient in the first optimizer step: ['{READ}']. "


def reading_llama(kind: type[LlamaMLP] = ReadingMLP) -> nn.Module:
    model = tiny_llama()
    model.model.layers[1].mlp.__class__ = kind
    return model


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(3, 64, (2, 8), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def trained(model: nn.Module, steps: int = 3, accumulation: int = 1) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = batches()
    for _ in range(steps):
        for _ in range(accumulation):
            loss_of(model, next(data)).backward()
        optimizer.step()
        optimizer.zero_grad()


def checkpointed(model: nn.Module, reentrant: bool) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    trained(model)


def with_closure(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=1)
    data = batches()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, next(data))
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def by_trainer(model: nn.Module) -> None:
    with TemporaryDirectory() as folder:
        trained_by_trainer(model, Path(folder), [], gradient_accumulation_steps=2)


WAYS: dict[str, Callable[[nn.Module], None]] = {
    "plain": trained,
    "accumulation": lambda model: trained(model, accumulation=3),
    "checkpointing": lambda model: checkpointed(model, reentrant=False),
    "reentrant": lambda model: checkpointed(model, reentrant=True),
    "closure": with_closure,
    "trainer": by_trainer,
    "compiled": lambda model: trained(torch.compile(model, backend="eager")),
}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "got no gradient" in record.message]


@pytest.fixture(autouse=True)
def _no_hook_is_left_behind() -> Iterator[None]:
    _global_optimizer_post_hooks.clear()  # of models that other tests have left untrained
    gc.freeze()  # what is there already, the modules of torch among it, need not be looked through
    yield
    gc.collect()
    gc.unfreeze()
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("score", ["random", "dowser"])
def test_values_without_a_gradient_are_named_once(way: str, score: str, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(reading_llama(), config(score=score)).train()
    WAYS[way](model)
    (message,) = said(caplog)
    assert message.startswith(NAMED)
    assert not _global_optimizer_post_hooks
    assert not model.base_model.model.model.layers[1].mlp.down_proj.values("default").any()


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_said_where_all_values_train(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(tiny_llama(), config(score="random")).train()
    WAYS[way](model)
    assert not said(caplog)
    assert not _global_optimizer_post_hooks


def test_what_the_probe_has_not_reached_has_no_values_that_could_be_reported(caplog: pytest.LogCaptureFixture) -> None:
    base = reading_llama(AlwaysReadingMLP)
    with pytest.warns(UserWarning, match=rf"1 of the target modules stay frozen: {READ} \("):
        model = get_peft_model(base, config())
    trained(model.train())
    assert not said(caplog)


def test_an_adapter_in_a_plain_model_is_watched_too(caplog: pytest.LogCaptureFixture) -> None:
    model = inject_adapter_in_model(config(score="random"), reading_llama())
    trained(model.train())
    assert [message.startswith(NAMED) for message in said(caplog)] == [True]


def test_of_several_adapters_each_is_reported_at_its_own_first_step(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(reading_llama(), config(score="random")).train()
    model.add_adapter("other", config(score="random", seed=1))
    trained(model)
    (message,) = said(caplog)
    assert message.startswith(NAMED)
    model.set_adapter("other")
    trained(model)
    assert said(caplog)[1:] == [message.replace("'default'", "'other'")]
    assert not _global_optimizer_post_hooks


def test_adapters_that_train_together_are_reported_together(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(reading_llama(), config(score="random")).train()
    model.add_adapter("other", config(score="random", seed=1))
    model.base_model.set_adapter(["default", "other"])
    trained(model)
    assert [message.split("'")[1] for message in said(caplog)] == ["default", "other"]
    assert not _global_optimizer_post_hooks


def test_a_hook_of_somebody_else_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(reading_llama(), config(score="random")).train()
    steps: list[int] = []
    other = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    trained(model)
    other.remove()
    assert len(steps) == 3 and len(said(caplog)) == 1
    trained(model, steps=1)
    assert not _global_optimizer_post_hooks


def test_the_step_of_another_model_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = get_peft_model(reading_llama(), config(score="random")).train()
    for parameter in (other := tiny_llama()).model.layers[0].parameters():
        parameter.requires_grad = False
    trained(other)
    assert not said(caplog)
    trained(model)
    assert len(said(caplog)) == 1


def test_a_model_that_is_never_trained_is_not_kept() -> None:
    model = get_peft_model(tiny_llama(), config(score="random"))
    layers = [weakref.ref(layer) for layer in dowser_layers(model)]
    del model
    gc.collect()
    assert not any(reference() for reference in layers)
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("end", ["unload", "merge_and_unload", "delete"])
def test_nothing_waits_for_an_adapter_that_is_gone(end: str) -> None:
    model = get_peft_model(tiny_llama(), config(score="random"))
    if end == "delete":
        model.add_adapter("other", config(score="random", inference_mode=True))
        with pytest.warns(UserWarning, match="Adapter default was active"):
            model.delete_adapter("default")
        trained(tiny_llama(), steps=1)
    else:
        model = getattr(model, end)()
    gc.collect()
    assert not _global_optimizer_post_hooks


class Experts(nn.Module):
    """Two experts, of which this text needs the first one only."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])
        self.chosen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[self.chosen](x)


def test_an_expert_that_a_batch_does_not_reach_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama()
    base.model.layers[1].mlp = experts = Experts(base.model.layers[1].mlp)
    model = get_peft_model(base, config(score="random")).train()
    trained(model)
    (message,) = said(caplog)
    idle = [f"model.layers.1.mlp.experts.1.{name}_proj" for name in ("gate", "up", "down")]
    assert f"3 of 17 modules got no gradient in the first optimizer step: {idle}. They may train later" in message
    experts.chosen = 1
    trained(model)
    assert len(said(caplog)) == 1
    assert experts.experts[1].down_proj.values("default").any()


def said_on_a_rank(rank: int) -> list[str]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("peft_dowser").addHandler(handler)
    model = get_peft_model(reading_llama(), config(score="random")).train()
    trained(DistributedDataParallel(model, find_unused_parameters=True))
    assert not _global_optimizer_post_hooks
    return [message for message in heard if "got no gradient" in message]


@pytest.mark.slow
def test_one_of_the_ranks_reports(tmp_path: Path) -> None:
    first, second = on_ranks(said_on_a_rank, tmp_path)
    assert [message.startswith(NAMED) for message in first] == [True]
    assert not second


# Reads that `readers.READERS` need not list, and why.
NOT_TRAINED_BY_READING = {
    ("BloomAttention", "dense"): "only with slow_but_exact, which no model of the Hub sets",
    ("BloomMLP", "dense_4h_to_h"): "only with slow_but_exact, which no model of the Hub sets",
    ("DisentangledSelfAttention", "in_proj"): "only for query_states, which no model passes",
    ("Gemma3nTextAltUp", "correction_coefs"): "clipped in place, and called",
    ("Gemma3nTextAltUp", "prediction_coefs"): "clipped in place, and called",
    ("LSHSelfAttention", "query_key"): "only with a cache",
    ("LSHSelfAttention", "value"): "only with a cache",
    ("Gemma4AssistantForCausalLM", "lm_head"): "an output head, tied to the embeddings",
    ("Gemma4UnifiedAssistantForCausalLM", "lm_head"): "an output head, tied to the embeddings",
}
# What is read of a weight without its values.
FACTS = {"dtype", "device", "shape", "size", "numel", "ndim", "is_meta"}
# Methods that do not run in training.
ASIDE = {"__init__", "_init_weights", "init_mamba_weights", "init_falcon_mamba_weights"}


def reads_in(source: str) -> Iterator[tuple[str, str]]:
    """Class and name of each linear whose weight is read in the source of a model, by `self.NAME.weight`."""
    for kind in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        linears = {
            ast.unparse(node.targets[0]).removeprefix("self.")
            for node in ast.walk(kind)
            if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("nn.Linear(")
        }
        for method in (node for node in kind.body if isinstance(node, ast.FunctionDef) and node.name not in ASIDE):
            facts = {
                id(node.value) for node in ast.walk(method) if isinstance(node, ast.Attribute) and node.attr in FACTS
            } | {
                id(node.args[0])
                for node in ast.walk(method)
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
            }
            for node in ast.walk(method):
                if isinstance(node, ast.Attribute) and node.attr == "weight" and id(node) not in facts:
                    owner, _, name = ast.unparse(node.value).partition(".")
                    if owner == "self" and name in linears:
                        yield kind.name, name


@pytest.mark.slow
def test_all_that_transformers_reads_is_listed() -> None:
    folder = Path(transformers.__file__).parent / "models"
    found = {pair for path in folder.glob("*/modeling_*.py") for pair in reads_in(path.read_text())}
    listed = {(kind, name) for kind, names in READERS.items() for name in names}
    assert ("Mamba2Mixer", "out_proj") in found
    assert found - listed == set(NOT_TRAINED_BY_READING)
