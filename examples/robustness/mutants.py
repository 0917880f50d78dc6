"""What happens with damaged adapter files: SHiRA, Super-Tuning and Dowser, the same kinds of seeded damage to each.

    python examples/robustness/mutants.py                     prints the table, and JSON with machine and versions
    python examples/robustness/mutants.py --readme            also writes the table into README.md next to it
    python examples/robustness/mutants.py --output FILE       also keeps the JSON, which counts every kind of damage

Each method saves an adapter of one small model, whose weights lie in the middle of larger memory. A copy is damaged,
loaded with `PeftModel.from_pretrained` on a fresh model, used for a forward, and merged, as by default without
`safe_merge`. Every mutant comes to one of these:

- refused: an error that says what is wrong, and nothing has changed: a ValueError, KeyError, RuntimeError or
  SafetensorError that names the file, its header, a module, a tensor or a field of the config; modules, flags and all
  bits are as before.
- half-way: an error while loading that leaves modules of the base replaced; the weights are as before.
- late: an error only in the forward or the merge; the weights are as before.
- unclear: any other error while loading.
- accepted: loads, computes and merges, although the method could not have written the file; in brackets, how many of
  these warned while they were loaded.
- harmed: memory around the weights was written, or a weight that no adapter is on; or any weight, by loading alone or
  in spite of an error.
- crashed: the process died, was silent for 10 seconds, or wanted another gigabyte.
- well-formed: loads, and is as well-formed as the original, with other values, or with other positions where nothing
  in the file gives that away. Indices in another order are such, where the method has no order. An edited config is
  such where it merges to the bits of the original.

Mutants are tried in forked processes, eight in each. Where one dies or comes to harm, each of its eight is tried again
in a process of its own, and only that counts. Dowser's adapter is tried twice: its manifest has a digest of the
positions, which gives much of the damage away; without it, as in files of before manifests, the other checks have to
hold. So is one that trains input channels, whose positions are a mask of bits and have no order. The last two rows are
of an adapter that also has a module, tokens, biases and embeddings as whole tensors; what is changed there is sealed:
digests, counts and manifest are those of the changed file. What a write outside a weight hits is chance, so where
there are such writes, "accepted", "harmed" and "crashed" differ by a few from run to run.
Needs Linux.
"""

import argparse
import json
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
from formats import CONFIG, FILE, FORMATS, TARGETS, Before, Format
from mutations import mutations_of
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from measure import between_markers, report

BEGIN, END = "<!-- mutants -->\n", "<!-- /mutants -->"
OUTCOMES = ("refused", "half-way", "late", "unclear", "accepted", "harmed", "crashed", "well-formed")
MERGED = "merged.safetensors"
WARNED = "accepted with a warning"
CLEAR = (ValueError, KeyError, RuntimeError, SafetensorError)
# What an error names: a file, a tensor, a module, or a field of the config.
PLACES = (FILE, CONFIG, "header", "base_model.model.", "module '", "modules that", "manifest", "config", "DowserConfig")
PLACES += ("target_modules", "target_parameters", "modules_to_save", "last_layers", "task type")
WHERE = re.compile("|".join(map(re.escape, PLACES)))
SECONDS, BYTES, TOGETHER = 10, 1 << 30, 8
X = torch.randn(3, 12, generator=torch.Generator().manual_seed(2))


def outcome(form: Format, folder: Path, well_formed: bool | None) -> str:
    """Load, compute and merge; what came of it. Where it is not known whether it is well-formed, its bits decide."""
    base = form.base()
    before = Before(base)
    besides = [name for name in before.bits if form.whole and not name.startswith("fixed")]
    loaded = warned = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = form.load(base, folder)
            loaded, warned = True, bool(caught)
            if not before.weights_hold(besides):
                return "harmed"
            with torch.no_grad():
                model(X)
            merged = model.merge_and_unload().state_dict()
    except MemoryError:
        return "crashed"
    except Exception as error:
        return _of_error(error, before, loaded)
    if not before.margins_hold() or not before.weights_hold([*besides, *(f"{name}.weight" for name in TARGETS)]):
        return "harmed"
    if well_formed is None:
        expected = load_file(folder.parent / "original" / MERGED)
        well_formed = merged.keys() == expected.keys() and all(
            torch.equal(merged[key], expected[key]) for key in merged
        )
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


def outcomes(form: Format, folders: Sequence[Path], well_formed: Sequence[bool | None]) -> list[str]:
    """What comes of some mutants, tried in processes that may die."""
    found = _in_process(form, folders, well_formed)
    if len(folders) > 1 and not {"crashed", "harmed"}.isdisjoint(found):
        return [_in_process(form, [one], [well])[0] for one, well in zip(folders, well_formed, strict=True)]
    return found


def _in_process(form: Format, folders: Sequence[Path], well_formed: Sequence[bool | None]) -> list[str]:
    """The outcomes of a process that tries one mutant after the other; all "crashed" from where it dies or hangs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _limit_memory()
            for folder, well in zip(folders, well_formed, strict=True):
                os.write(writing, (outcome(form, folder, well) + "\n").encode())
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


def mutants(form: Format, number: int, work: Path) -> Iterator[tuple[str, Path, bool | None]]:
    """Damaged copies of a saved adapter: the kind of damage, the folder, and whether the file is well-formed still.

    Whether an edited config is, only the bits of the merged model can tell: None.
    """
    form.save(work / "original")
    original = load_file(work / "original" / FILE)
    settings = json.loads((work / "original" / CONFIG).read_text())
    save_file(form.load(form.base(), work / "original").merge_and_unload().state_dict(), work / "original" / MERGED)
    mutations = list(mutations_of(form).items())
    for one in range(number):
        kind, mutate = mutations[one % len(mutations)]
        folder = work / str(one % TOGETHER)
        folder.mkdir(exist_ok=True)
        generator = random.Random(f"{kind} {one}")
        while True:
            for name in (FILE, CONFIG):
                shutil.copyfile(work / "original" / name, folder / name)
            mutate(folder, form, generator)
            is_other_file = (folder / FILE).read_bytes() != (work / "original" / FILE).read_bytes()
            if is_other_file or json.loads((folder / CONFIG).read_text()) != settings:
                break
        yield kind, folder, form.is_well_formed(folder / FILE, original) if is_other_file else None


def tried(name: str, number: int) -> dict[str, Counter[str]]:
    """How often each kind of damage to a method's adapter came to which outcome."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in mutations_of(FORMATS[name])}
    with tempfile.TemporaryDirectory() as folder:
        waiting: list[tuple[str, Path, bool | None]] = []
        for mutant in mutants(FORMATS[name], number, Path(folder)):
            waiting.append(mutant)
            if len(waiting) == TOGETHER:
                _count(FORMATS[name], waiting, counts)
        _count(FORMATS[name], waiting, counts)
    return counts


def _count(form: Format, waiting: list[tuple[str, Path, bool | None]], counts: dict[str, Counter[str]]) -> None:
    if waiting:
        kinds, folders, well_formed = zip(*waiting, strict=True)
        for kind, found in zip(kinds, outcomes(form, folders, well_formed), strict=True):
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
    parser.add_argument("--readme", action="store_true", help="write the table into README.md next to this file")
    parser.add_argument("--output", type=Path, help="file for the counts as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    results = {name: tried(name, options.mutants) for name in FORMATS}
    report("mutants", results, options.output)
    found = table(results)
    print(found)
    if options.readme:
        between_markers(Path(__file__).parent / "README.md", found, BEGIN, END)


if __name__ == "__main__":
    main()
