"""What all benchmarks share: fresh processes, peak memory, the machine, and the small Llamas that they measure."""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# A probe that is read from the cache has no costs to measure. Processes that are started here inherit this.
os.environ["DOWSER_CACHE"] = "off"

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a new process, so that nothing of an earlier measurement lives on."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@contextmanager
def no_heap() -> Iterator[None]:
    """Give every tensor of the processes that are started here pages of its own (glibc).

    Otherwise the peak of a process counts the holes in its heap too, by which it is up to a quarter higher with any
    method, as chance has it. It costs time, so times are measured without.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def llama(hidden: int, layers: int = 4, dtype: str = "float32", vocabulary: int = 1000) -> LlamaForCausalLM:
    """A random Llama with the proportions of a real one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    with torch.device(device()):
        return LlamaForCausalLM(config).to(getattr(torch, dtype))


def linears(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The weights of the adapted linears."""
    return [p for name, p in model.named_parameters() if name.endswith(tuple(f"{n}.weight" for n in LINEARS))]


def linear_weights(model: torch.nn.Module) -> int:
    """Number of weights in the adapted linears."""
    return sum(p.numel() for p in linears(model))


def synchronize() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], repetitions: int, warmups: int = 1) -> float:
    """Median time of a call."""
    for _ in range(warmups):
        function()
    return statistics.median(seconds_once(function) for _ in range(repetitions))


def seconds_in_turn(
    one: Callable[[], Any], other: Callable[[], Any], repetitions: int, warmups: int = 1
) -> list[tuple[float, float]]:
    """Times of two calls that take turns, so that a machine that slows down slows both: one pair per repetition."""
    for _ in range(warmups):
        one()
        other()
    return [(seconds_once(one), seconds_once(other)) for _ in range(repetitions)]


def seconds_once(function: Callable[[], Any]) -> float:
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


class Memory:
    """Peak of allocated memory above the moment of creation, in bytes: of the process (Linux), or of the GPU."""

    def __init__(self) -> None:
        self.before = self._now()

    def restart(self) -> None:
        """Forget the peak so far, but not the moment of creation."""
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return process_peak() - self.before

    @staticmethod
    def _now() -> int:
        return torch.cuda.memory_allocated() if device() == "cuda" else _status("VmRSS")


def process_peak() -> int:
    """Peak of allocated memory in bytes: of the whole process (Linux), or of the GPU."""
    return torch.cuda.max_memory_allocated() if device() == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"This system does not tell the {field} of a process.")


def report(name: str, results: Any, output: Path | None) -> None:
    """Print results as JSON with the machine and the versions they were measured with; keep them if asked to."""
    document = {"benchmark": name, "date": date.today().isoformat(), "machine": machine(), "results": results}
    text = json.dumps(document, indent=2)
    print(text)
    if output is not None:
        output.write_text(text + "\n")


def between_markers(path: Path, text: str, begin: str, end: str) -> None:
    """Put a text into a file in the place of what is between two markers."""
    before, _, rest = path.read_text().partition(begin)
    path.write_text(before + begin + text + end + rest.partition(end)[2])


def machine() -> dict[str, Any]:
    if device() == "cuda":
        processor = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.processor()
    packages = ("torch", "transformers", "peft", "peft-dowser")
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in packages},
    }
