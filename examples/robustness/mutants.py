"""What happens with damaged adapter files: SHiRA, Super-Tuning and Dowser, the same kinds of seeded damage to each.

    python examples/robustness/mutants.py                     prints the table, and JSON with machine and versions
    python examples/robustness/mutants.py --readme            also writes the table into the README, between its markers
    python examples/robustness/mutants.py --output FILE       also keeps the JSON, which counts every kind of damage

Each method saves an adapter of one small model, whose weights lie in the middle of larger memory. A copy is damaged,
loaded with `PeftModel.from_pretrained` on a fresh model, used for a forward, and merged, as by default without
`safe_merge`. Every mutant comes to one of these:

- refused: an error that says what is wrong, and nothing has changed: a ValueError, KeyError, RuntimeError or
  SafetensorError that names the file, its header, a module or a tensor; modules, flags and all bits are as before.
- half-way: an error while loading that leaves modules of the base replaced; the weights are as before.
- late: an error only in the forward or the merge; the weights are as before.
- unclear: any other error while loading.
- accepted: loads, computes and merges, although the method could not have written the file; in brackets, how many of
  these warned while they were loaded.
- harmed: memory around the weights was written, or a weight that no adapter is on; or any weight, by loading alone or
  in spite of an error.
- crashed: the process died, was silent for 10 seconds, or wanted another gigabyte.
- well-formed: loads, and is as well-formed as the original, with other values, or with other positions where nothing
  in the file gives that away. Indices in another order are such, where the method has no order.

Mutants are tried in forked processes, eight in each. Where one dies or comes to harm, each of its eight is tried again
in a process of its own, and only that counts. Dowser's adapter is tried twice: its manifest has a digest of the
positions, which gives much of the damage away; without it, as in files of before manifests, the other checks have to
hold. What a write outside a weight hits is chance, so where there are such writes, "accepted", "harmed" and "crashed"
differ by a few from run to run. Needs Linux.
"""

import argparse
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from formats import CONFIG, FILE, FORMATS, TARGETS, Before, Format, Small
from mutations import MUTATIONS
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from measure import into_readme, report

BEGIN, END = "<!-- mutants -->\n", "<!-- /mutants -->"
OUTCOMES = ("refused", "half-way", "late", "unclear", "accepted", "harmed", "crashed", "well-formed")
WARNED = "accepted with a warning"
CLEAR = (ValueError, KeyError, RuntimeError, SafetensorError)
WHERE = re.compile(rf"{re.escape(FILE)}|header|base_model\.model\.|module '")
SECONDS, BYTES, TOGETHER = 10, 1 << 30, 8
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))


def outcome(folder: Path, well_formed: bool) -> str:
    """Load, compute and merge; what came of it."""
    base = Small()
    before = Before(base)
    loaded = warned = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, folder)
            loaded, warned = True, bool(caught)
            if not before.weights_hold():
                return "harmed"
            with torch.no_grad():
                model(X)
            model.merge_and_unload()
    except MemoryError:
        return "crashed"
    except Exception as error:
        return _of_error(error, before, loaded)
    if not before.margins_hold() or not before.weights_hold(besides=[f"{name}.weight" for name in TARGETS]):
        return "harmed"
    if well_formed:
        return "well-formed"
    return WARNED if warned else "accepted"


def _of_error(error: Exception, before: Before, loaded: bool) -> str:
    if "can't allocate memory" in str(error):
        return "crashed"
    if not before.margins_hold() or not before.weights_hold():
        return "harmed"
    if loaded or not before.holds():
        return "late" if loaded else "half-way"
    return "refused" if isinstance(error, CLEAR) and WHERE.search(str(error)) else "unclear"


def outcomes(folders: Sequence[Path], well_formed: Sequence[bool]) -> list[str]:
    """What comes of some mutants, tried in processes that may die."""
    found = _in_process(folders, well_formed)
    if len(folders) > 1 and not {"crashed", "harmed"}.isdisjoint(found):
        return [_in_process([one], [well])[0] for one, well in zip(folders, well_formed, strict=True)]
    return found


def _in_process(folders: Sequence[Path], well_formed: Sequence[bool]) -> list[str]:
    """The outcomes of a process that tries one mutant after the other; all "crashed" from where it dies or hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit_memory()
            for folder, well in zip(folders, well_formed, strict=True):
                os.write(writing, (outcome(folder, well) + "\n").encode())
        finally:  # whatever corrupted memory makes of this process, it must not go on in the parent's place
            os._exit(0)
    os.close(writing)
    text = b""
    while select.select([reading], [], [], SECONDS)[0]:
        if not (piece := os.read(reading, 4096)):
            break
        text += piece
    os.close(reading)
    os.kill(child, signal.SIGKILL)  # nothing happens to one that is done
    os.waitpid(child, 0)
    found = text.decode().splitlines()
    return found + ["crashed"] * (len(folders) - len(found))


def _limit_memory() -> None:
    """Bound what this process may take from now on; keep its last words off the terminal."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def mutants(form: Format, number: int, work: Path) -> Iterator[tuple[str, Path, bool]]:
    """Damaged copies of a saved adapter: the kind of damage, the folder, and whether the file is well-formed still."""
    form.save(work / "original")
    original, content = load_file(work / "original" / FILE), (work / "original" / FILE).read_bytes()
    for one in range(number):
        kind, mutate = list(MUTATIONS.items())[one % len(MUTATIONS)]
        folder = work / str(one % TOGETHER)
        folder.mkdir(exist_ok=True)
        shutil.copyfile(work / "original" / CONFIG, folder / CONFIG)
        generator = random.Random(f"{kind} {one}")
        while True:
            (folder / FILE).write_bytes(content)
            mutate(folder, form, generator)
            if (folder / FILE).read_bytes() != content:
                break
        yield kind, folder, form.is_well_formed(folder / FILE, original)


def tried(name: str, number: int) -> dict[str, Counter[str]]:
    """How often each kind of damage to a method's adapter came to which outcome."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in MUTATIONS}
    with tempfile.TemporaryDirectory() as folder:
        waiting: list[tuple[str, Path, bool]] = []
        for mutant in mutants(FORMATS[name], number, Path(folder)):
            waiting.append(mutant)
            if len(waiting) == TOGETHER:
                _count(waiting, counts)
        _count(waiting, counts)
    return counts


def _count(waiting: list[tuple[str, Path, bool]], counts: dict[str, Counter[str]]) -> None:
    if waiting:
        kinds, folders, well_formed = zip(*waiting, strict=True)
        for kind, found in zip(kinds, outcomes(folders, well_formed), strict=True):
            counts[kind][found] += 1
        waiting.clear()


def table(results: dict[str, dict[str, Counter[str]]]) -> str:
    lines = ["| | mutants | " + " | ".join(OUTCOMES) + " |", "|---" * (2 + len(OUTCOMES)) + "|"]
    for name, counts in results.items():
        total = sum(counts.values(), Counter())
        cells = [str(total[found]) for found in OUTCOMES]
        at = OUTCOMES.index("accepted")
        cells[at] = f"{total['accepted'] + total[WARNED]}" + (f" ({total[WARNED]})" if total[WARNED] else "")
        lines.append(f"| {name} | {total.total()} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What becomes of damaged adapter files.")
    parser.add_argument("--mutants", type=int, default=2400, help="number of mutants per method")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    parser.add_argument("--output", type=Path, help="file for the counts as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    results = {name: tried(name, options.mutants) for name in FORMATS}
    report("mutants", results, options.output)
    found = table(results)
    print(found)
    if options.readme:
        into_readme(found, BEGIN, END)


if __name__ == "__main__":
    main()
