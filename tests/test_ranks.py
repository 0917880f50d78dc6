"""Two processes: one mask, equal losses, and an error of one rank raised on both."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import config, tiny_llama
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from peft_dowser import DowserLayer


def in_group(rank: int, port: int, work, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.save(work(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def on_two_ranks(work, folder: Path) -> list:
    """What `work(rank)` returns on each of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(in_group, args=(port, work, str(folder)), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def train(rank: int) -> dict:
    # A seed of its own on each rank would choose different masks.
    model = get_peft_model(tiny_llama(), config(seed=rank))
    codes = [m.dowser_index["default"].code for m in model.modules() if isinstance(m, DowserLayer)]
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        both = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        batch = both[2 * rank : 2 * rank + 2]
        optimizer.zero_grad()
        loss = parallel(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item() / 2)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {"codes": codes, "losses": losses, "values": values}


def train_alone() -> list[float]:
    model = get_peft_model(tiny_llama(), config(seed=0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        batch = torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_two_ranks_have_one_mask_and_the_losses_of_one_process(tmp_path: Path) -> None:
    first, second = on_two_ranks(train, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first["codes"], second["codes"], strict=True))
    assert first["losses"] == second["losses"]
    assert all(torch.equal(value, second["values"][name]) for name, value in first["values"].items())
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(train_alone()), rtol=1e-4, atol=1e-5)


def fail_on_rank_0(rank: int) -> str:
    ratio = 1e-9 if rank == 0 else 0.1
    try:
        get_peft_model(tiny_llama(), config(update_ratio=ratio))
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_error_on_rank_0_reaches_both(tmp_path: Path) -> None:
    for message in on_two_ranks(fail_on_rank_0, tmp_path):
        assert "No weight would train" in message
