"""FSDP1, FSDP2 (plain and by accelerate) and DDP on two ranks: probes, trains, generates, saves as one process does."""

import copy
import logging
import os
import traceback
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import GRANULARITIES, every_granularity
from groups import PROBES, STEPS, batch_of, close, on_ranks, steps_of
from models import config, set_values, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from trainings import HOOK
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_dowser import DowserLayer, ForgettingCallback, ProbeStatistics, RehearsalCallback, probe
from peft_dowser.baselines import SpiderCallback
from peft_dowser.delta.layout import Granularity
from peft_dowser.probing.statistics import ModuleStatistics

pytestmark = pytest.mark.slow  # starts processes

TEXTS = [[1, 5, 9, 30, 7, 11], [1, 40, 41, 42], [1, 8, 8, 20, 21], [1, 33, 12, 6, 60, 50, 44]]
RAM_EFFICIENT = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}


def with_ddp(model: PeftModel) -> tuple[nn.Module, Callable[[], dict]]:
    return DistributedDataParallel(model), model.state_dict


def full_state(model: nn.Module) -> dict:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def with_fsdp2(model: PeftModel, base_layers_too: bool = False) -> tuple[nn.Module, Callable[[], dict]]:
    mesh = init_device_mesh("cpu", (2,))
    for module in list(model.modules()):
        if base_layers_too and isinstance(module, DowserLayer):
            fully_shard(module.base_layer, mesh=mesh)
    for module in list(model.modules()):
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, partial(full_state, model)


def with_accelerate(model: PeftModel) -> tuple[nn.Module, Callable[[], dict]]:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    # accelerate itself offers FSDP on accelerators only; this is the function that it calls there.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true",
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
        torch_device_mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("fsdp",)),
    )
    prepared = fsdp2_prepare_model(accelerator, model)
    return prepared, partial(full_state, prepared)


def with_fsdp1(model: PeftModel) -> tuple[nn.Module, Callable[[], dict]]:
    wrapped = FullyShardedDataParallel(
        model,
        auto_wrap_policy=partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )

    def state() -> dict:
        whole = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(wrapped, StateDictType.FULL_STATE_DICT, whole):
            return wrapped.state_dict()

    return wrapped, state


ENGINES = {
    "ddp": with_ddp,
    "fsdp2": with_fsdp2,
    "fsdp2, base layers as units": partial(with_fsdp2, base_layers_too=True),
    "fsdp2 by accelerate": with_accelerate,
    "fsdp2 by accelerate, loaded on rank 0": with_accelerate,
    "fsdp1": with_fsdp1,
}


def in_one_unit(model: nn.Module) -> tuple[nn.Module, Callable[[], dict]]:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,))), partial(full_state, model)


PROBED_ENGINES = {
    "fsdp2": with_fsdp2,
    "fsdp2 in one unit": in_one_unit,
    "fsdp2 by accelerate, loaded on rank 0": with_accelerate,
}


def base_on(rank: int, engine: str) -> nn.Module:
    """As transformers loads it: with cpu_ram_efficient_loading the other ranks' parameters stay on the meta device."""
    base = tiny_llama()
    if engine.endswith("loaded on rank 0") and rank:
        for module in base.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.to("meta")))
    return base


def generated(model: PeftModel, parallel: nn.Module) -> torch.Tensor:
    """What a model generates, in the way of trainers that generate with an engine."""
    gathered: AbstractContextManager = nullcontext()
    if isinstance(parallel, FSDPModule):
        register_fsdp_forward_method(parallel, "generate")
    elif isinstance(parallel, FullyShardedDataParallel):
        gathered = FullyShardedDataParallel.summon_full_params(parallel, recurse=False)
    with gathered:
        return model.generate(input_ids=batch_of(0), max_new_tokens=5, do_sample=False)


def one_engine(rank: int, engine: str, granularity: Granularity, folder: Path) -> dict:
    model = get_peft_model(base_on(rank, engine), config(seed=rank, granularity=granularity))
    parallel, state = ENGINES[engine](model)
    losses = steps_of(parallel, range(STEPS), rank, 2)
    tokens = generated(model, parallel)
    refusal = ""
    if engine.startswith("fsdp2"):
        assert any(isinstance(p, DTensor) for p in model.parameters() if p.requires_grad)
        try:
            model.save_pretrained(folder / "sharded")
        except ValueError as error:
            refusal = str(error)
    whole = state()
    if rank == 0:
        model.save_pretrained(folder / engine, state_dict=whole)
    dist.barrier()
    again = PeftModel.from_pretrained(tiny_llama(), folder / engine, is_trainable=True)
    resumed = steps_of(ENGINES[engine](again)[0], range(STEPS, STEPS + 2), rank, 2)
    return {"losses": losses, "tokens": tokens, "refusal": refusal, "resumed": resumed}


def codes(model: nn.Module) -> list[torch.Tensor]:
    return [layer.index("default").code for layer in model.modules() if isinstance(layer, DowserLayer)]


def resumed_from_a_checkpoint(rank: int, granularity: Granularity) -> bool:
    """As accelerate saves and loads adapters under FSDP2: into a model whose own mask is another one."""
    choices = (config(seed=seed, granularity=granularity) for seed in (0, 1))
    model, other = (with_fsdp2(get_peft_model(tiny_llama(), choice))[0] for choice in choices)
    assert not all(map(torch.equal, codes(model), codes(other)))
    steps_of(model, range(STEPS), rank, 2)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    checkpoint = get_model_state_dict(model, options=whole)
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(other, checkpoint, options=from_rank_0)
    return torch.equal(model(input_ids=batch_of(0)).logits, other(input_ids=batch_of(0)).logits)


# The ranks' shares of the prompts are not equal, once one of them has none.


def gathered_at_once(model: nn.Module, work: Callable[[], ProbeStatistics]) -> tuple[ProbeStatistics, int]:
    """What some work returns, and the decoder layers of which it had whole weights at one time, at most."""
    layers = [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]
    most, full_tensor, given = 0, DTensor.full_tensor, []

    def count(*_) -> None:
        nonlocal most
        most = max(most, sum(not isinstance(layer.mlp.up_proj.weight, DTensor) for layer in layers))

    def only_one(self: DTensor) -> torch.Tensor:
        assert all(tensor() is None for tensor in given)
        whole = full_tensor(self)
        given.append(weakref.ref(whole))
        return whole

    hooks = [layer.mlp.register_forward_hook(count) for layer in layers]
    DTensor.full_tensor = only_one
    try:
        return work(), most
    finally:
        DTensor.full_tensor = full_tensor
        for hook in hooks:
            hook.remove()


def probe_sharded(rank: int, engine: str, folder: Path) -> dict:
    model, _ = PROBED_ENGINES[engine](base_on(rank, engine))
    model(input_ids=batch_of(0))  # FSDP2 keeps the weights of the root from forward to backward
    results: dict = {}
    for name, probed in PROBES.items():
        results[name], layers = gathered_at_once(model, partial(probed, model))
        assert layers == (2 if engine.endswith("in one unit") else 1)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    if rank == 0:
        results["probed"].save(folder / f"{engine}.safetensors")
    return results | {"losses": steps_of(model, range(STEPS), rank, 2)}


def refused(rank: int) -> list[str]:
    """What `probe` says to bases that it cannot follow."""
    split = tiny_llama()
    head = split.lm_head.weight
    split.lm_head.weight = nn.Parameter(distribute_tensor(head.detach(), init_device_mesh("cpu", (2,)), [Shard(0)]))
    flat = with_fsdp1(tiny_llama())[0].module
    messages = []
    for model in (split, flat):
        with pytest.raises(ValueError) as raised:
            probe(model, config())
        messages.append(str(raised.value))
    return messages


def forgetting(rank: int) -> tuple[str, list[dict]]:
    """What ForgettingCallback says without texts, and what it logs with them."""
    model = with_fsdp2(get_peft_model(tiny_llama(), config(score="random")))[0]
    with pytest.raises(ValueError) as raised:
        ForgettingCallback().on_train_begin(TrainingArguments(report_to=[], use_cpu=True), *HOOK[1:], model=model)
    return str(raised.value), measured(model)


def measured(model: nn.Module) -> list[dict]:
    """The log of a measurement on a text."""
    state = TrainerState()
    args = TrainingArguments(report_to=[], use_cpu=True)
    ForgettingCallback([[1, 5, 9, 7]]).on_train_begin(args, state, TrainerControl(), model=model)
    return state.log_history


REHEARSED = ("ddp", "fsdp2", "fsdp2, base layers as units", "fsdp2 in one unit", "fsdp2 by accelerate")
KINDS = {
    "dowser": config(score="random", update_ratio=0.3),
    "lora": LoraConfig(target_modules=["q_proj", "up_proj"], lora_alpha=64, init_lora_weights=False),
}


def rehearsed(model: nn.Module, parallel: nn.Module, rank: int = 0, ranks: int = 1) -> list[float]:
    """The losses of a training of accumulated batches with a rehearsal in every second step, and its mean KL."""
    arguments = TrainingArguments(report_to=[], use_cpu=True)
    assert (arguments.process_index, arguments.world_size) == (rank, ranks)
    callback = RehearsalCallback(TEXTS, weight=3.0, every_n_steps=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    # The trainer hands out the model inside DDP, and the sharded one itself.
    hook: Any = (arguments, TrainerState(), TrainerControl())
    inner = model if isinstance(parallel, DistributedDataParallel) else parallel
    callback.on_train_begin(*hook, model=inner)
    losses = []
    for step in range(4):
        hook[1].global_step = step
        optimizer.zero_grad()
        callback.on_step_begin(*hook, model=inner)
        for number in range(2):
            part = batch_of(2 * step + number).chunk(ranks)[rank]
            whole = number == 1 or ranks == 1 or not isinstance(parallel, DistributedDataParallel)
            with nullcontext() if whole else parallel.no_sync():
                loss = parallel(input_ids=part, labels=part).loss / 2
                loss.backward()
            total = loss.detach().clone()
            if ranks > 1:
                dist.all_reduce(total)
            losses.append(total.item() / ranks)
        optimizer.step()
    logs = {"loss": 0.0}
    callback.on_log(*hook, logs=logs)
    return [*losses, logs["rehearsal_kl"]]


def rehearsals(rank: int) -> dict[str, Any]:
    """What is found with each engine and adapter, and what is said where the weights cannot be followed."""
    found: dict[str, Any] = {}
    for engine in REHEARSED:
        for kind, adapter in KINDS.items():
            torch.manual_seed(0)
            model = get_peft_model(tiny_llama(), copy.deepcopy(adapter))
            parallel, _ = (ENGINES | PROBED_ENGINES)[engine](model)
            found[f"{engine}, {kind}"] = rehearsed(model, parallel, rank, 2)
    arguments = TrainingArguments(report_to=[], use_cpu=True)
    hook: Any = (arguments, TrainerState(), TrainerControl())
    for engine, texts in (("fsdp1", TEXTS), ("fsdp2", None)):
        model = ENGINES[engine](get_peft_model(tiny_llama(), config(score="random")))[0]
        with pytest.raises(ValueError) as raised:
            RehearsalCallback(texts).on_train_begin(*hook, model=model)
        found[f"refused, {engine}"] = str(raised.value)
    own = RehearsalCallback(config=config(num_probes=3, seed=rank))
    own.on_train_begin(*hook, model=get_peft_model(tiny_llama(), config(score="random")))
    found["own"] = [prompt["input_ids"].tolist() for prompt in own.prompts]
    return found


def spider_refuses(rank: int) -> dict[str, bool]:
    """Whether SPIDER refuses dense weights, with the forward of a measurement before."""
    found = {}
    for engine in ("ddp", "fsdp1", "fsdp2", "fsdp2 in one unit"):
        model, _ = (ENGINES | PROBED_ENGINES)[engine](tiny_llama())
        with torch.no_grad():
            model(input_ids=batch_of(0))  # FSDP2 keeps the weights of the root
        try:
            SpiderCallback().on_train_begin(*HOOK, model=model)
            found[engine] = False
        except ValueError as error:
            found[engine] = "sharded (FSDP, ZeRO-3 or tensor parallelism)" in str(error)
    return found


def all_engines(rank: int, folder: str) -> dict:
    work: dict[str, Callable[[], object]] = {
        "refused": partial(refused, rank),
        "spider": partial(spider_refuses, rank),
        "forgetting": partial(forgetting, rank),
        "rehearsals": partial(rehearsals, rank),
    }
    for granularity in GRANULARITIES:
        place = Path(folder) / granularity
        work[f"checkpoint, {granularity}"] = partial(resumed_from_a_checkpoint, rank, granularity)
        for engine in ENGINES:
            work[f"{granularity}, {engine}"] = partial(one_engine, rank, engine, granularity, place)
    for engine in PROBED_ENGINES:
        work[f"probe, {engine}"] = partial(probe_sharded, rank, engine, Path(folder))
    results: dict = {}
    for name, one in work.items():
        ram_efficient = RAM_EFFICIENT if name.endswith("loaded on rank 0") else {}
        os.environ.update(ram_efficient)
        try:
            results[name] = one()
        except Exception:
            results[name] = traceback.format_exc()
        for variable in ram_efficient:
            del os.environ[variable]
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict]:
    """What each engine gave on each of two ranks."""
    return on_ranks(partial(all_engines, folder=str(folder)), folder)


@cache
def alone(granularity: Granularity) -> tuple[PeftModel, list[float]]:
    """One process: the model after the same steps, and its losses, two further steps included."""
    model = get_peft_model(tiny_llama(), config(seed=0, granularity=granularity))
    losses = steps_of(model, range(STEPS))
    after = {key: value.clone() for key, value in model.state_dict().items()}
    losses += steps_of(model, range(STEPS, STEPS + 2))
    model.load_state_dict(after)
    return model, losses


@pytest.mark.parametrize("engine", ENGINES)
@every_granularity
def test_trains_generates_saves_and_resumes_as_one_process_does(
    granularity: Granularity, engine: str, results: list[dict], folder: Path
) -> None:
    model, losses = alone(granularity)
    for found in (ranks[f"{granularity}, {engine}"] for ranks in results):
        assert isinstance(found, dict), found
        close(found["losses"], losses[:STEPS])
        close(found["resumed"], losses[STEPS:])
        assert torch.equal(found["tokens"], generated(model, model))
    loaded = PeftModel.from_pretrained(tiny_llama(), folder / granularity / engine)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        if key.endswith(".code"):
            assert torch.equal(tensor, found[key]), key
        else:
            torch.testing.assert_close(tensor, found[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("engine", PROBED_ENGINES)
def test_a_sharded_base_is_probed_as_in_one_process(engine: str, results: list[dict], folder: Path) -> None:
    for name, probed in PROBES.items():
        expected = probed(tiny_llama())
        for found in (ranks[f"probe, {engine}"] for ranks in results):
            assert isinstance(found, dict), found
            assert found[name].info == expected.info
            assert found[name].samples == expected.samples
            assert found[name].modules.keys() == expected.modules.keys()
            for module, statistics in expected.modules.items():
                same_statistics(found[name].modules[module], statistics)
    losses = steps_of(tiny_llama(), range(STEPS))
    for ranks in results:
        close(ranks[f"probe, {engine}"]["losses"], losses)  # the probe has left the base as it was
    by_file = get_peft_model(tiny_llama(), config(statistics=str(folder / f"{engine}.safetensors")))
    by_probe = get_peft_model(tiny_llama(), config(num_probes=5, probe_batch_size=1))
    assert all(map(torch.equal, codes(by_file), codes(by_probe)))


def test_bases_that_are_sharded_in_other_ways_are_not_probed(results: list[dict]) -> None:
    for found in results:
        for message in found["refused"]:
            assert "which the probe cannot follow. Shard the base with FSDP2 (fully_shard)" in message


def test_spider_wants_whole_weights(results: list[dict]) -> None:
    refused = {"ddp": False, "fsdp1": True, "fsdp2": True, "fsdp2 in one unit": True}
    assert [found["spider"] for found in results] == [refused, refused]


def test_forgetting_of_a_sharded_model_is_measured_on_texts(results: list[dict]) -> None:
    expected = measured(get_peft_model(tiny_llama(), config(score="random")))
    for found in results:
        message, log = found["forgetting"]
        assert "sharded PeftModel write prompts" in message
        close([entry["upstream_loss"] for entry in log], [entry["upstream_loss"] for entry in expected])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", REHEARSED)
def test_two_ranks_rehearse_as_one_does(engine: str, kind: str, results: list[dict]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), copy.deepcopy(KINDS[kind]))
    expected = rehearsed(model, model)
    assert expected[-1] > 1e-3  # it is held to something
    for found in results:
        assert isinstance(found["rehearsals"], dict), found["rehearsals"]
        close(found["rehearsals"][f"{engine}, {kind}"], expected)


def test_ranks_rehearse_on_the_texts_that_the_first_has_written(results: list[dict]) -> None:
    own = [found["rehearsals"]["own"] for found in results]
    assert own[0] == own[1]


def test_rehearsal_says_which_sharding_it_cannot_follow(results: list[dict]) -> None:
    for found in results:
        said = found["rehearsals"]
        assert "whose weights are sharded by FSDP1 or tensor parallelism. Train with DDP" in said["refused, fsdp1"]
        assert "RehearsalCallback cannot let the base inside a sharded" in said["refused, fsdp2"]


@every_granularity
def test_a_sharded_state_is_not_saved(granularity: Granularity, results: list[dict]) -> None:
    for found in results:
        assert "so the file would be incomplete" in found[f"{granularity}, fsdp2"]["refusal"]


@every_granularity
def test_a_checkpoint_brings_its_mask_along(granularity: Granularity, results: list[dict]) -> None:
    assert [found[f"checkpoint, {granularity}"] for found in results] == [True, True]


def same_statistics(found: ModuleStatistics, expected: ModuleStatistics) -> None:
    """Up to the rounding of other batches and, in one process, more threads."""
    torch.testing.assert_close(found.sensitivity, expected.sensitivity, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.activity, expected.activity, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.energy, expected.energy)
    torch.testing.assert_close(found.gradient, expected.gradient)


def rounds(rank: int, granularity: Granularity) -> dict[str, Any]:
    """Whether the logits are those of one process, and what is said, with and without mixed precision."""
    found = {}
    choice = config(score="magnitude", granularity=granularity)
    expected = get_peft_model(tiny_llama(torch.bfloat16), choice)
    set_values(expected)
    for name, policy in (
        ("bf16", MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        ("no", MixedPrecisionPolicy()),
    ):
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("peft_dowser").addHandler(handler)
        model = get_peft_model(tiny_llama(torch.bfloat16), choice)
        set_values(model)
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
        same = torch.equal(model(input_ids=batch_of(0)).logits, expected(input_ids=batch_of(0)).logits)
        logging.getLogger("peft_dowser").removeHandler(handler)
        found[name] = same, said
    return found


@every_granularity
def test_mixed_precision_of_fsdp2_rounds_the_values_and_says_so(granularity: Granularity, tmp_path: Path) -> None:
    """With a base in bfloat16 and no mixed precision, values stay in float32, and the bits are those of one process.

    A product with input channels rounds their values to the dtype of the input without mixed precision too.
    """
    for found in on_ranks(partial(rounds, granularity=granularity), tmp_path):
        same, said = found["bf16"]
        assert same == (granularity == "input_channel")
        assert ["computes with values in bfloat16" in message for message in said] == [True] * (not same)
        assert found["no"] == (True, [])
