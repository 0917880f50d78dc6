"""The study of rehearsal: its runs continue, and its table says what the curves say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("benchmarks", "forgetting", "tiny_llava")]

import rehearsal  # noqa: E402
import rehearsing  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def record(seed: int, curve: list, **changes) -> dict:
    fields = {"method": "lora", "texts": "text", "weight": 1.0, "every": 1, "seed": seed, "curve": curve}
    return fields | changes


def test_methods_are_compared_where_they_have_learned_equally() -> None:
    assert rehearsal.kept_at([[90, 0], [80, 40], [70, 80]], 60) == 75
    assert rehearsal.kept_at([[90, 0], [80, 70], [85, 50], [70, 80]], 60) == pytest.approx(90 - 10 * 6 / 7)
    assert rehearsal.kept_at([[90, 0], [80, 40]], 60) is None


def test_the_table_has_means_and_deviations_over_the_seeds() -> None:
    curves = [[[90, 0], [80, 100]], [[90, 0], [70, 100]]]
    header, _, plain, held = rehearsal.table(
        [record(seed, curve) for seed, curve in enumerate(curves)]
        + [record(0, [[90, 0], [60, 70]], texts="none", weight=0.0)]
    ).splitlines()
    assert header.split(" | ")[5:8] == [f"kept at {level} % learned" for level in (60, 80, 90)]
    assert plain == "| lora | none | 0 | 1 | 1 | 64.3 | - | - | 60.0 | 70.0 |"
    assert held == "| lora | text | 1 | 1 | 2 | 81.0 ± 4.2 | 78.0 ± 5.7 | 76.5 ± 6.4 | 75.0 ± 7.1 | 100.0 ± 0.0 |"


@pytest.mark.slow
def test_a_study_continues_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "REHEARSALS", rehearsal.REHEARSALS[1:])
    monkeypatch.setattr(rehearsal, "RARER", ())
    monkeypatch.setattr(rehearsal, "POINTS", (50, 100))
    arguments = ["--output", str(tmp_path), "--seeds", "0", "--steps", "2", "--examples", "4", "--methods"]
    rehearsal.main([*arguments, "lora"])
    before = (tmp_path / "rehearsal.jsonl").read_text()
    rehearsal.main([*arguments, "lora", "full"])
    lines = (tmp_path / "rehearsal.jsonl").read_text()
    assert lines.startswith(before)
    found = [json.loads(line) for line in lines.splitlines()]
    assert [(one["method"], one["texts"]) for one in found] == [
        ("lora", "text"),
        ("lora", "images"),
        ("full", "text"),
        ("full", "images"),
    ]
    assert all(len(one["curve"]) == 2 for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("method", rehearsing.METHODS)
def test_the_time_of_rehearsals_can_be_measured(method: str) -> None:
    rows = rehearsing.measure_method(method, 0.1, 64, 1)
    assert [row["every"] for row in rows] == [1, 2, 4, 8]
    assert all(row["step"] > 0 and row["arithmetic"] > 1 for row in rows)
