"""DeepSpeed ZeRO-2 and ZeRO-3 on two ranks: probes, trains and saves as one process does."""

import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import every_granularity
from groups import PROBES, STEPS, batch_of, close, on_ranks, steps_of
from models import config, tiny_llama
from peft import PeftModel, get_peft_model
from torch import nn

from peft_dowser import probe
from peft_dowser.base.distributed import is_sharded_tensor
from peft_dowser.delta.layout import Granularity

# `DS_BUILD_OPS=0 pip install deepspeed` gives one that runs on CPUs.
pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow  # starts processes


def engine_of(model: nn.Module, stage: int) -> Any:
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    # A threshold of 0 partitions even the smallest parameters.
    options = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": options,
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


def losses_of(engine: Any, rank: int) -> list[float]:
    losses = []
    for step in range(STEPS):
        part = batch_of(step).chunk(2)[rank]
        loss = engine(input_ids=part, labels=part).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
    return losses


def train(rank: int, stage: int, granularity: Granularity, folder: str) -> dict:
    model = get_peft_model(tiny_llama(), config(seed=rank, granularity=granularity))
    engine = engine_of(model, stage)
    losses = losses_of(engine, rank)
    refusal = ""
    try:
        model.save_pretrained(Path(folder) / "sharded")
    except ValueError as error:
        refusal = str(error)
    whole = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
    if rank == 0:
        model.save_pretrained(Path(folder) / "adapter", state_dict=whole)
    dist.barrier()
    second = ""
    try:
        model.add_adapter("second", config())
    except ValueError as error:
        second = str(error)
    return {"losses": losses, "refusal": refusal, "second": second}


def probe_partitioned(rank: int) -> dict:
    engine = engine_of(tiny_llama(), 3)
    assert all(is_sharded_tensor(parameter) for parameter in engine.module.parameters())
    results: dict = {name: probed(engine.module) for name, probed in PROBES.items()}
    # The probe has left the base as it was.
    assert losses_of(engine, rank) == losses_of(engine_of(tiny_llama(), 3), rank)
    import deepspeed

    bare = tiny_llama()
    deepspeed.zero.Init(module=bare)
    with pytest.raises(ValueError, match="Shard the base with FSDP2"):
        probe(bare, config())
    return results


def test_a_partitioned_base_is_probed_as_in_one_process(tmp_path: Path) -> None:
    for found in on_ranks(probe_partitioned, tmp_path):
        for name, probed in PROBES.items():
            expected = probed(tiny_llama())
            assert found[name].info == expected.info
            assert found[name].samples == expected.samples
            assert found[name].modules.keys() == expected.modules.keys()
            for module, statistics in expected.modules.items():
                # DeepSpeed's hooks change the order in which gradients are added.
                for field, value in vars(statistics).items():
                    torch.testing.assert_close(vars(found[name].modules[module])[field], value)


@every_granularity
@pytest.mark.parametrize("stage", [2, 3])
def test_trains_and_saves_as_one_process_does(stage: int, granularity: Granularity, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(seed=0, granularity=granularity))
    losses = steps_of(model, range(STEPS))
    work = partial(train, stage=stage, granularity=granularity, folder=str(tmp_path))
    for found in on_ranks(work, tmp_path):
        close(found["losses"], losses)
        assert ("so the file would be incomplete" in found["refusal"]) == (stage == 3)
        assert ("are sharded over the ranks" in found["second"]) == (stage == 3)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, loaded[key], rtol=1e-4, atol=1e-6, msg=key)
