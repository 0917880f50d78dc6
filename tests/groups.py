"""Process groups of a few ranks on this machine, and what each engine does on them as one process does."""

import os
import socket
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import config
from torch import nn

from peft_dowser import probe

STEPS = 3
PROBES = {
    "prompts": partial(probe, config=config(probe_batch_size=1), prompts=[[1, 9, 30], [1, 4], [1, 50, 7, 7, 8]]),
    "probed": partial(probe, config=config(num_probes=5, probe_batch_size=1)),
    "one prompt": partial(probe, config=config(num_probes=1)),
    "forwards": partial(probe, config=config(num_probes=3, probe_batch_size=1, score="activity")),
    "gradient": partial(probe, config=config(num_probes=3, probe_batch_size=1, score="gradient", last_layers=1)),
}


def in_group(rank: int, port: int, work, folder: str, size: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    dist.barrier()
    # Threads of gloo that are still alive when the interpreter is taken down now and then abort the process.
    os._exit(0)


def on_ranks(work, folder: Path, size: int = 2) -> list:
    """What `work(rank)` returns on each of some processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(in_group, args=(port, work, str(folder), size), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def batch_of(step: int) -> torch.Tensor:
    return torch.randint(3, 64, (4, 10), generator=torch.Generator().manual_seed(step))


def steps_of(model: nn.Module, steps: range, rank: int = 0, size: int = 1) -> list[float]:
    """Plain gradient descent, so that a run can be continued from the values alone."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=2.0)
    losses = []
    for step in steps:
        part = batch_of(step).chunk(size)[rank]
        optimizer.zero_grad()
        loss = model(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        total = loss.detach().clone()
        if size > 1:
            dist.all_reduce(total)
        losses.append(total.item() / size)
    return losses


def close(found: list[float], expected: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
