"""The example that damages adapter files: it counts what the README says, and Dowser comes to no harm."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "robustness"
sys.path.insert(0, str(FOLDER))

import formats  # noqa: E402
import mutants  # noqa: E402
import mutations  # noqa: E402

SAFE = {"refused", "well-formed"}


@pytest.mark.slow
def test_dowser_refuses_what_is_malformed_and_the_counts_are_kept(tmp_path: Path) -> None:
    arguments = ["--mutants", str(len(mutations.MUTATIONS)), "--output", str(tmp_path / "mutants.json")]
    done = subprocess.run(
        [sys.executable, FOLDER / "mutants.py", *arguments], capture_output=True, text=True, check=True
    )
    written = json.loads((tmp_path / "mutants.json").read_text())
    assert written["machine"]["versions"].keys() >= {"torch", "peft", "peft-dowser"}
    for name, kinds in written["results"].items():
        assert kinds.keys() == mutations.MUTATIONS.keys()
        assert [sum(counts.values()) for counts in kinds.values()] == [1] * len(kinds)
        found = {outcome for counts in kinds.values() for outcome in counts}
        assert found <= {*mutants.OUTCOMES, mutants.WARNED}
        assert not name.startswith("Dowser") or found <= SAFE
        assert f"| {name} | {len(kinds)} |" in done.stdout


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
    never = mutations.MUTATIONS.keys() - {"unsorted indices", "flipped bits"}
    for kind in sorted(kind for kind in never if "header" not in kind):
        (tmp_path / formats.FILE).write_bytes(content)
        mutations.MUTATIONS[kind](tmp_path, form, random.Random(0))
        assert not form.is_well_formed(tmp_path / formats.FILE, original), kind


def test_the_readme_shows_the_kept_counts() -> None:
    kept = json.loads((FOLDER / "results" / "mutants.json").read_text())["results"]
    results = {name: {kind: mutants.Counter(found) for kind, found in kinds.items()} for name, kinds in kept.items()}
    shown = (ROOT / "README.md").read_text().partition(mutants.BEGIN)[2].partition(mutants.END)[0]
    assert shown == mutants.table(results)
    assert all(set(sum(kinds.values(), mutants.Counter())) <= SAFE for name, kinds in results.items() if "Dow" in name)
