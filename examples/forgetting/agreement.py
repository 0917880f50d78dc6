"""Table 8 and Figure 8: how far data-free scores agree with the score on real data, and what agrees without probing.

Spearman within every matrix and Hamming distance of the masks, averaged with the number of weights; the reference is
the Dowser score on 512 upstream prompts with their images. |W| is a factor of every score, so the controls matter: |W|
alone, Wanda, the probe's factors shuffled over the neurons, and the factors without |W|.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from methods import PROBE, decoder_linears
from sources import TINY_LLAVA, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

from peft_dowser import DowserConfig, ProbeStatistics, probe
from peft_dowser.delta.masks import select, trained_count
from peft_dowser.delta.seeds import derived_seed
from peft_dowser.evaluation.metrics import hamming, random_hamming, spearman
from peft_dowser.probing import scores
from peft_dowser.probing.statistics import ModuleStatistics

RATIO = 0.1
REAL_PROMPTS = 512
PROBES, RADEMACHERS = (4, 16, 64), (2, 4, 8)

Scores = dict[str, Tensor]


def agreement(path: Path, quick: bool) -> dict[str, Any]:
    """Measure, or read what was measured before.

    Args:
        path: JSON file with the result.
        quick: one seed and fewer probes.

    Returns:
        `rows`: Spearman and Hamming distances by kind of score, mean and standard deviation over seeds; `random`: the
        Hamming distance of two independent masks; `spread`: how far the logarithms of a score's factors are spread.
    """
    if path.exists():
        return json.loads(path.read_text())
    source = tiny(str(TINY_LLAVA), "style", -(-REAL_PROMPTS // 8))
    model, processor = source.load()
    config = DowserConfig(**PROBE | {"num_rademacher": 4 if quick else 16}, target_modules=list(decoder_linears(model)))
    prompts = [prompt for examples in source.upstream.values() for prompt in _prompts(examples, source, processor)]
    real = probe(model, config, prompts=prompts[:: 8 if quick else 1])
    rows = [_row(model, real, kind, seeds=range(1 if quick else 3), **size) for kind, size in _kinds(quick)]
    used = len(next(iter(real.modules.values())).sensitivity)
    found = {"ratio": RATIO, "prompts": used, "random": random_hamming(RATIO, RATIO), "rows": rows}
    found["spread"] = _spread(decoder_linears(model), real)
    path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def _spread(linears: Mapping[str, nn.Linear], real: ProbeStatistics) -> dict[str, float]:
    """Standard deviations inside a matrix, averaged with the number of weights: of ln |W| and of ln of the factor that
    the probe adds, ||J_i|| |h_j| averaged over the prompts. A factor that is spread little ranks little.
    """
    sizes = {name: linear.weight.numel() for name, linear in linears.items()}
    strength = {name: _log_deviation(scores.magnitude(linear.weight.detach())) for name, linear in linears.items()}
    gain = {
        name: _log_deviation(scores.dowser(torch.ones_like(linear.weight), real.modules[name]))
        for name, linear in linears.items()
    }
    total = sum(sizes.values())
    return {
        kind: sum(found[name] * size for name, size in sizes.items()) / total
        for kind, found in (("strength", strength), ("gain", gain))
    }


def _log_deviation(values: Tensor) -> float:
    return float(values[values > 0].log().std())


def _kinds(quick: bool) -> list[tuple[str, dict[str, int]]]:
    probes, rademachers = (PROBES[:2], RADEMACHERS[:1]) if quick else (PROBES, RADEMACHERS)
    grid = [{"probes": n, "rademacher": r} for r in rademachers for n in probes]
    sizes = [("dowser", size) for size in grid] + [("dowser+images", size) for size in grid]
    largest = grid[-1]
    controls = ("magnitude", "wanda", "shuffled factors", "random", "factors without |W|", "image factors without |W|")
    return sizes + [(control, largest) for control in controls]


def _prompts(examples: list, source: Any, processor: ProcessorMixin) -> list[Mapping[str, Tensor]]:
    # Up to where the answer begins, so that the last token is one that the model answers to.
    asked = [one if one.open_ended else replace(one, answer="", open_ended=True) for one in examples]
    batches = [source.collate([example], processor) for example in asked]
    return [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]


def _row(
    model: PreTrainedModel, real: ProbeStatistics, kind: str, seeds: range, probes: int, rademacher: int
) -> dict[str, Any]:
    found = [_compare(model, real, kind, seed, probes, rademacher) for seed in seeds]
    row: dict[str, Any] = {"kind": kind, "probes": probes, "rademacher": rademacher}
    for key in found[0]:
        values = [one[key] for one in found]
        row[key] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
    return row


def _compare(
    model: PreTrainedModel, real: ProbeStatistics, kind: str, seed: int, probes: int, rademacher: int
) -> dict[str, float]:
    """Agreement of one score with the real one; a score without |W| is compared with the real one without |W|."""
    config = DowserConfig(
        num_probes=probes,
        num_rademacher=rademacher,
        probe_length=PROBE["probe_length"],
        probe_images=0.5 if "image" in kind else 0.0,
        seed=seed,
        target_modules=list(decoder_linears(model)),
    )
    probed = probe(model, config).modules
    weighted: dict[str, list[tuple[float, int]]] = {"spearman": [], "hamming_low": [], "hamming_high": []}
    for name, linear in decoder_linears(model).items():
        weight = linear.weight.detach()
        score = _score(kind, weight, probed[name], derived_seed(seed, "agreement", name))
        truth = scores.dowser(torch.ones_like(weight) if "without" in kind else weight, real.modules[name])
        size = weight.numel()
        count = trained_count(RATIO, size)
        weighted["spearman"].append((spearman(score, truth), size))
        for end, largest in (("low", False), ("high", True)):
            masks = select(score, count, largest), select(truth, count, largest)
            weighted[f"hamming_{end}"].append((hamming(*masks, size), size))
    total = sum(size for _, size in weighted["spearman"])
    return {key: sum(value * size for value, size in pairs) / total for key, pairs in weighted.items()}


def _score(kind: str, weight: Tensor, module: ModuleStatistics, seed: int) -> Tensor:
    if kind == "magnitude":
        return scores.magnitude(weight)
    if kind == "random":
        return scores.random(weight, seed)
    if kind == "wanda":
        return scores.wanda(weight, module)
    if kind == "shuffled factors":
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(weight.shape[0], generator=generator)
        columns = torch.randperm(weight.shape[1], generator=generator)
        shuffled = ModuleStatistics(module.sensitivity[:, rows], module.activity[:, columns], module.energy)
        return scores.dowser(weight, shuffled)
    return scores.dowser(torch.ones_like(weight) if "without" in kind else weight, module)
