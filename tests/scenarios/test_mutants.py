"""The example that damages adapter files: it counts what its README.md says, and Dowser comes to no harm."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "robustness"
sys.path.insert(0, str(FOLDER))

import formats  # noqa: E402
import mutants  # noqa: E402
import mutations  # noqa: E402

SAFE = {"refused", "well-formed"}


@pytest.mark.slow
def test_dowser_refuses_what_is_malformed_and_the_counts_are_kept(tmp_path: Path) -> None:
    number = max(len(mutations.MUTATIONS), len(mutations.WHOLE_MUTATIONS))
    arguments = ["--mutants", str(number), "--output", str(tmp_path / "mutants.json")]
    done = subprocess.run(
        [sys.executable, FOLDER / "mutants.py", *arguments], capture_output=True, text=True, check=True
    )
    written = json.loads((tmp_path / "mutants.json").read_text())
    assert written["machine"]["versions"].keys() >= {"torch", "peft", "peft-dowser"}
    for name, kinds in written["results"].items():
        assert kinds.keys() == mutations.mutations_of(formats.FORMATS[name]).keys()
        assert sum(sum(counts.values()) for counts in kinds.values()) == number
        assert all(kinds.values())
        found = {outcome for counts in kinds.values() for outcome in counts}
        assert found <= {*mutants.OUTCOMES, mutants.WARNED}
        assert not name.startswith("Dowser") or found <= SAFE
        assert f"| {name} | {number} |" in done.stdout


@pytest.mark.parametrize("name", formats.FORMATS)
def test_only_files_that_the_method_could_have_written_count_as_well_formed(name: str, tmp_path: Path) -> None:
    form = formats.FORMATS[name]
    form.save(tmp_path)
    original = formats.load_file(tmp_path / formats.FILE)
    content = (tmp_path / formats.FILE).read_bytes()
    assert form.is_well_formed(tmp_path / formats.FILE, original)
    for module in formats.TARGETS:
        index, width = original[formats.keys_of(form, module)[1]], formats.WIDTHS[module]
        positions = form.read(index, width)
        assert positions is not None
        assert (form.write(positions, width) == index).all()
    settings = (tmp_path / formats.CONFIG).read_bytes()
    known = mutations.mutations_of(form)
    never = [kind for kind in known if "header" not in kind and "config" not in kind]
    for kind in sorted({*never} - {"unsorted indices", "flipped bits"}):
        (tmp_path / formats.FILE).write_bytes(content)
        (tmp_path / formats.CONFIG).write_bytes(settings)
        known[kind](tmp_path, form, random.Random(0))
        assert not form.is_well_formed(tmp_path / formats.FILE, original), kind


@pytest.mark.parametrize("kind", mutations.WHOLE_MUTATIONS)
def test_no_sealed_mutant_of_whole_tensors_or_config_is_accepted(kind: str, tmp_path: Path) -> None:
    form = formats.FORMATS["Dowser, whole tensors and config"]
    form.save(tmp_path / "original")
    original = formats.load_file(tmp_path / "original" / formats.FILE)
    merged = form.load(form.base(), tmp_path / "original").merge_and_unload().state_dict()
    mutants.save_file(merged, tmp_path / "original" / mutants.MERGED)
    for number in range(12):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "original", folder)
        mutations.WHOLE_MUTATIONS[kind](folder, form, random.Random(number))
        well_formed = None if "config" in kind else form.is_well_formed(folder / formats.FILE, original)
        assert mutants.outcome(form, folder, well_formed) in SAFE, number


def test_the_readme_shows_the_kept_counts() -> None:
    kept = json.loads((FOLDER / "results" / "mutants.json").read_text())["results"]
    results = {name: {kind: mutants.Counter(found) for kind, found in kinds.items()} for name, kinds in kept.items()}
    shown = (
        (ROOT / "examples" / "robustness" / "README.md")
        .read_text()
        .partition(mutants.BEGIN)[2]
        .partition(mutants.END)[0]
    )
    assert shown == mutants.table(results)
    assert all(set(sum(kinds.values(), mutants.Counter())) <= SAFE for name, kinds in results.items() if "Dow" in name)
