"""Process groups of a few ranks on this machine."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


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
