"""DeepSpeed ZeRO-2 and ZeRO-3 on two ranks: trains as one process does, and saves the whole."""

import logging
import os
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from groups import on_ranks
from helpers import config, tiny_llama
from peft import PeftModel, get_peft_model
from test_sharded import STEPS, batch_of, close
from test_sharded import train as train_plainly

# `DS_BUILD_OPS=0 pip install deepspeed` gives one that runs on CPUs.
pytest.importorskip("deepspeed")


def train(rank: int, stage: int, folder: str) -> dict:
    os.environ["DS_ACCELERATOR"] = "cpu"
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = get_peft_model(tiny_llama(), config(seed=rank))
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
    losses = []
    for step in range(STEPS):
        part = batch_of(step).chunk(2)[rank]
        loss = engine(input_ids=part, labels=part).loss
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / 2)
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


@pytest.mark.parametrize("stage", [2, 3])
def test_trains_and_saves_as_one_process_does(stage: int, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(seed=0))
    losses = train_plainly(model, range(STEPS))
    for found in on_ranks(partial(train, stage=stage, folder=str(tmp_path)), tmp_path):
        close(found["losses"], losses)
        assert ("so the file would be incomplete" in found["refusal"]) == (stage == 3)
        assert ("are sharded over the ranks" in found["second"]) == (stage == 3)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, loaded[key], rtol=1e-4, atol=1e-6, msg=key)
