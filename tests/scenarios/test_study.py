"""The forgetting study: its methods, its choice of rates, its report, and its path for a user's own model and data."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import ttest_rel

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("forgetting", "tiny_llava")]

import agreement  # noqa: E402
import grids  # noqa: E402
import methods  # noqa: E402
import report  # noqa: E402
import sources  # noqa: E402
import study  # noqa: E402
import tasks  # noqa: E402
from datasets import Dataset, DatasetDict  # noqa: E402
from fine_tune import Run, run_all  # noqa: E402

from peft_dowser.evaluation import metrics  # noqa: E402
from peft_dowser.probing.scores import dowser as dowser_score  # noqa: E402
from peft_dowser.probing.statistics import ModuleStatistics, ProbeInfo, ProbeStatistics  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = str(sources.TINY_LLAVA)


def run(method: str, **changes) -> Run:
    return Run(**({"model": TINY, "task": "style", "method": method, "update_ratio": 0.5} | SMALL | changes))


SMALL = {"learning_rate": 1e-3, "seed": 0, "steps": 2}


def record(method: str, up: float, down: float, **changes) -> dict:
    fields = vars(run(method, **changes)) | {"model": "tiny_llava"}
    return fields | {"upstream_mean": up, "downstream": down, "scores": [[down]], "trained": 7, "seconds": 1.0}


@pytest.fixture(scope="module")
def source() -> sources.Source:
    return sources.tiny(TINY, "style", examples=8)


# The runs


@pytest.mark.slow
@pytest.mark.parametrize("method", [*methods.SPARSE, *methods.PEERS, "spider"])
def test_every_method_trains_its_share(source: sources.Source, method: str) -> None:
    (found,) = run_all(run(method), [source])
    share = found["trained"] / 479_232
    assert share == {"osf": pytest.approx(0.77, abs=0.01), "spider": 1.0}.get(method, pytest.approx(0.5, abs=0.01))
    assert set(found["upstream"]) == set(tasks.UPSTREAM)


@pytest.mark.slow
def test_a_full_fine_tuning_is_merged_by_every_post_merge_method(source: sources.Source) -> None:
    found = run_all(run("full", update_ratio=1.0), [source], {name: [0.5] for name in methods.AFTERWARDS})
    kept = {one["method"]: one["trained"] for one in found}
    assert kept["top-delta"] == kept["graft"] == kept["tailor"] == kept["full"] / 2
    assert kept["dare"] == pytest.approx(kept["full"] / 2, rel=0.02)
    assert set(kept) == {"full", *methods.AFTERWARDS}


@pytest.mark.slow
def test_a_sequence_scores_every_task_so_far(source: sources.Source) -> None:
    tasks_in_row = [sources.tiny(TINY, name, examples=4) for name in ("style", "desc")]
    (found,) = run_all(run("random", task="style+desc", last_layers=1), tasks_in_row)
    assert [len(row) for row in found["scores"]] == [1, 2]
    assert found["trained"] == pytest.approx(479_232 / 8, rel=0.01)


def test_methods_with_one_seed_see_the_same_batches(source: sources.Source) -> None:
    first, again, other = source.train(3, 64), source.train(3, 64), source.train(4, 64)
    assert [one.answer for one in first] == [one.answer for one in again]
    assert [one.answer for one in first] != [one.answer for one in other]


# The choice of rates


def test_the_rate_that_keeps_most_of_those_that_learn_is_chosen() -> None:
    swept = {"seed": grids.SWEEP_SEED}
    records = [
        record("dowser", 90, 80.0, learning_rate=1e-3, **swept),
        record("dowser", 70, 97.0, learning_rate=2e-3, **swept),
        record("dowser", 60, 98.0, learning_rate=4e-3, **swept),
        record("osf", 95, 10.0, learning_rate=1e-3, **swept),
        record("osf", 92, 50.0, learning_rate=2e-3, **swept),
        record("random", 99, 99.0, learning_rate=9e-3, seed=0),
    ]
    assert grids.choose_rates(records, 0.5) == {"dowser": 2e-3, "osf": 2e-3}


def test_no_run_of_the_study_is_listed_twice() -> None:
    scope = grids.Scope([TINY], ["style", "desc"], [0, 1], 150)
    for runs in (grids.common(scope), grids.sweep(scope, 0.1), grids.curve(scope), grids.depth(scope)):
        assert len(set(runs)) == len(runs)


# The report


def test_differences_are_paired_by_model_task_and_seed(tmp_path: Path) -> None:
    ups = {"dowser": [60.0, 70.0, 65.0], "random": [50.0, 66.0, 60.0], "full": [20.0, 30.0, 10.0]}
    records = [
        record(method, up, 95.0, seed=seed, update_ratio=1.0 if method == "full" else 0.5)
        for method, values in ups.items()
        for seed, up in enumerate(values)
    ]
    text = report.write_report(records, tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    first, second = ([metrics.h_score(up, 95.0) for up in ups[method]] for method in ("dowser", "random"))
    p = ttest_rel(first, second).pvalue
    assert f"| +{sum(first) / 3 - sum(second) / 3:.1f} | 3/3 | {p:.2g} |" in text
    assert "Better than Dowser: none." in text


def test_a_better_rival_is_named(tmp_path: Path) -> None:
    records = [record("dowser", 50.0 + seed, 95.0, seed=seed) for seed in range(4)]
    records += [record("magnitude", 60.0 + 1.1 * seed, 95.0, seed=seed) for seed in range(4)]
    assert "Better than Dowser: magnitude (-" in report.write_report(records, tmp_path)


# Agreement


def test_the_score_without_weights_is_the_product_of_the_factors() -> None:
    module = ModuleStatistics(torch.rand(4, 3), torch.rand(4, 5), torch.rand(5))
    weight = torch.randn(3, 5)
    found = agreement._score("factors without |W|", weight, module, seed=0)
    torch.testing.assert_close(found, module.sensitivity.T @ module.activity / 4)
    shuffled = agreement._score("shuffled factors", weight, module, seed=0)
    assert not torch.equal(shuffled, dowser_score(weight, module))
    torch.testing.assert_close((shuffled / weight.abs()).sum(), found.sum())


def test_the_spread_is_that_of_the_logarithms() -> None:
    linear = torch.nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[1.0, -math.e], [1.0, math.e]])
    module = ModuleStatistics(torch.tensor([[1.0, math.e**3]]), torch.ones(1, 2), torch.ones(2))
    statistics = ProbeStatistics({"one": module}, ProbeInfo("", 1, 1, 0, 0.0, 0))
    found = agreement._spread({"one": linear}, statistics)
    # Logarithms 0, 1, 0, 1 and 0, 0, 3, 3: deviations of 1/2 and 3/2, by Bessel's sqrt(4/3).
    assert found == pytest.approx({"strength": 0.5 * (4 / 3) ** 0.5, "gain": 1.5 * (4 / 3) ** 0.5})


@pytest.mark.slow
def test_real_prompts_agree_with_themselves_more_than_controls(tmp_path: Path) -> None:
    found = agreement.agreement(tmp_path / "agreement.json", quick=True)
    spearman = {row["kind"]: row["spearman"][0] for row in found["rows"]}
    assert spearman["dowser+images"] > spearman["magnitude"] > spearman["random"] + 0.5
    assert abs(spearman["random"]) < 0.02
    assert found["random"] == pytest.approx(0.18)
    assert agreement.agreement(tmp_path / "agreement.json", quick=True) == found


# A model and data sets of the user's


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """Data sets as a user of the Hub has them."""
    made = {}
    for name, task in (("known", tasks.UPSTREAM["read"]), ("new", tasks.DOWNSTREAM["style"])):
        splits = {}
        for split in ("train", "test"):
            examples = task.sample(8, seed=0, split=split)
            columns = {
                "image": [one.image for one in examples],
                "question": [one.prompt for one in examples],
                "answer": [[one.answer, "or else"] for one in examples],
            }
            splits[split] = Dataset.from_dict(columns)
        (tmp_path / name / "data").mkdir(parents=True)
        for split, data in DatasetDict(splits).items():
            data.to_parquet(tmp_path / name / "data" / f"{split}-00000.parquet")
        made[name] = str(tmp_path / name)
    return made


def test_the_chat_template_gives_the_batch_of_the_tiny_model() -> None:
    _, processor = sources.tiny(TINY, "style", 1).load()
    examples = tasks.DOWNSTREAM["desc"].sample(6, 0, "test") + tasks.UPSTREAM["rev"].sample(3, 0, "test")
    found, expected = sources.collate_chat(examples, processor), tasks.collate(examples, processor)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_a_users_model_and_data_sets_are_compared(folders: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "study"
    arguments = ["--output", str(output), "--model", TINY, "--upstream", folders["known"], "--downstream"]
    arguments += [folders["new"], "--methods", "dowser", "full", "dare", "--rates", "1e-3", "--seeds", "0", "1"]
    arguments += ["--steps", "1", "--examples", "4", "--workers", "1"]
    study.main(arguments)
    lines = (output / "runs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {one["method"] for one in records} == {"base", "dowser", "full", "dare"}
    assert all(list(one["upstream"]) == [folders["known"]] for one in records)
    assert "All methods at rho = 0.5 and learning rate 0.001" in (output / "report.md").read_text()
    study.main(arguments)  # nothing is left to do
    assert (output / "runs.jsonl").read_text().splitlines() == lines


def test_a_data_set_without_the_columns_is_refused(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"no column 'prompt' among \['image', 'question', 'answer'\]"):
        sources.hub(TINY, [folders["known"]], folders["new"], 4, ["image", "prompt", "answer"])


def test_a_model_without_data_sets_is_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        study.main(["--output", str(tmp_path), "--model", TINY])
    assert "--model needs --upstream and --downstream" in capsys.readouterr().err
