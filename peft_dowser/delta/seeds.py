"""One seed, many independent generators; the global ones belong to the caller."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def derived_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose, such as `("rademacher", 17)`: the same on every machine, unrelated between purposes."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed torch's global generators: of the CPU, and of all accelerators that are in use.

    `torch.manual_seed` would also seed a GPU that nothing uses yet, which nobody could undo.
    """
    torch.default_generator.manual_seed(seed)
    if (accelerator := _accelerator()) is not None:
        (getattr(accelerator, "manual_seed_all", None) or accelerator.manual_seed)(seed)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restore torch's global generators: of the CPU, and of all accelerators that are in use."""
    accelerator = _accelerator()
    suffix = "_all" if hasattr(accelerator, "get_rng_state_all") else ""  # MPS has only one
    states = None if accelerator is None else getattr(accelerator, f"get_rng_state{suffix}")()
    of_cpu = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(of_cpu)
        if states is not None:
            getattr(accelerator, f"set_rng_state{suffix}")(states)


def _accelerator() -> Any:
    """The module of torch for the accelerators of this machine, such as `torch.cuda`; None where it is not in use."""
    if not torch.accelerator.is_available():
        return None
    module = torch.get_device_module(torch.accelerator.current_accelerator())
    return module if getattr(module, "is_initialized", lambda: True)() else None
