"""Probing: one forward and R backwards per prompt, of which only two thin statistics per matrix remain.

Every parameter is frozen while the probe runs, and the graph begins at the outputs of the first probed modules, so
autograd computes gradients of activations only, through the probed layers only. Samples of a batch do not interact:
one backward serves all of them.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ..base.compiled import uncompiled
from ..base.distributed import by_all_ranks, check_gathers, from_rank, gather, is_spread, on_every_rank, rank
from ..base.search import check_is_base, resolve_targets
from ..base.storage import _on_meta, check_materialized
from ..base.target import Target
from ..base.untouched import left_as_it_was
from ..config import DowserConfig
from .passes import Passes, Share
from .prompts import Prompt, Text, given_prompts, prompt_length, synthetic_prompts
from .statistics import ModuleStatistics, ProbeInfo, ProbeStatistics, check_continues, combined

logger = logging.getLogger(__name__)


def probe(
    model: nn.Module,
    config: DowserConfig,
    prompts: Sequence[Text] | None = None,
    statistics: ProbeStatistics | None = None,
) -> ProbeStatistics:
    """Measure how much the output depends on every neuron, without data (Eq. 4 to 6).

    For prompt n, output f and R Rademacher vectors xi, each target module with input h and output z gets
    A[n] = mean over xi and tokens of |d(xi^T f)/dz| and B[n] = mean over tokens of |h|. f is the logits at the last
    real token of a decoder, and the last hidden state at all real tokens of an encoder. The model is left exactly as
    it was: parameters, `requires_grad`, train mode, hooks, configs and random generators, also after an exception.

    Args:
        model: the base model, with its weights loaded; quantities are measured in its own dtype, and under autocast
            only where it is half and has parts that were made wider, such as norms.
        config: gives the targets, N, R, T, the seed and the batch size.
        prompts: inputs to probe with instead of synthetic ones, one per probe: texts, for the tokenizer in the folder
            or Hub id that the model was loaded from; token ids, shape `(tokens,)`; or the keyword arguments of the
            model's forward with a batch dimension of 1, such as a processor returns.
        statistics: an earlier probe to continue: only the prompts that it lacks are probed (those beyond its
            `num_probes`, or all that are passed), and the result covers both.

    Returns:
        Statistics of every target module that a prompt reached, float32, on the CPU.

    Raises:
        TypeError: the model is not a module, but its name for example.
        ValueError: there is nothing to probe with, the model is a `PeftModel`, on the meta device or sharded by other
            means than FSDP2 or DeepSpeed ZeRO-3, or `statistics` were made with other settings.
        RuntimeError: called under `torch.inference_mode`, or one prompt alone does not fit into memory.

    Note: time is one forward and R backwards over N T tokens, plus the generation of the prompts; memory is that of
    one batch plus N (out + in) numbers per module. In a distributed run every rank must call it: each probes a part of
    the prompts, and all return the whole. Of a base that is sharded with FSDP2 or DeepSpeed ZeRO-3 only the weights
    are gathered that its own forward and backward gather, and one matrix at a time for `samples`; ZeRO-3 gathers for
    one backward per forward, so R forwards run there.
    """
    check_is_base(model)
    return probe_targets(model, resolve_targets(model, config), config, prompts, statistics)


def probe_targets(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: DowserConfig,
    prompts: Sequence[Text] | None = None,
    statistics: ProbeStatistics | None = None,
) -> ProbeStatistics:
    """`probe` for targets that are found already, by name; of a tied weight every use is probed by itself."""
    model = uncompiled(model)
    targets = {use.name: use for target in targets.values() for use in target.uses}
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "The probe needs gradients, but runs under torch.inference_mode(); leave that context first."
        )
    spread = is_spread(model)
    check_gathers(model)
    able, ranks = _able_ranks(model, spread)
    _report_idle(able, ranks, next(iter(targets.values())).device)
    for_all = by_all_ranks if spread else partial(from_rank, able[0])
    config = copy.copy(config)
    config.seed = from_rank(0, lambda: config.seed)
    first = 0 if statistics is None else statistics.info.num_probes
    inputs = for_all(lambda: _inputs(model, config, prompts, first))
    info = ProbeInfo(
        base_model=getattr(getattr(model, "config", None), "name_or_path", "") or "",
        num_probes=first + len(inputs),
        num_rademacher=config.num_rademacher,
        probe_length=prompt_length(model, config) if prompts is None else 0,
        probe_images=config.probe_images if prompts is None else 0.0,
        seed=config.seed,
    )
    samples = for_all(lambda: {name: target.sample() for name, target in targets.items()})
    if statistics is not None:
        check_continues(statistics, info, samples, gradient=config.score == "gradient")
    share = Share(able.index(rank()), len(able), spread) if rank() in able else None
    probed = partial(_probed, model, targets, config, inputs, first, share)
    mine, found = probed() if spread else on_every_rank(probed)
    names = [matrix.name for target in targets.values() for matrix in target.matrices()]
    return ProbeStatistics(_gathered(names, [first + number for number in mine], found, statistics), info, samples)


def _report_idle(able: list[int], ranks: int, device: torch.device) -> None:
    """Say which GPUs or ranks do nothing while the probe runs."""
    if rank() != able[0]:
        return
    if device.type == "cpu" and torch.accelerator.is_available():
        logger.warning(
            "The probe runs on the CPU, where the base is, while a GPU is idle. Move the base there before, or load it "
            "with device_map: the probe then takes seconds instead of minutes."
        )
    if len(able) < ranks:
        logger.warning(
            "%d of %d ranks have the weights and probe, while the others wait, no longer than the time-out of the "
            "process group. For a large base probe first: probe(model, config).save(path), then "
            "DowserConfig(statistics=path).",
            len(able),
            ranks,
        )


def _able_ranks(model: nn.Module, spread: bool) -> tuple[list[int], int]:
    """The ranks that can probe, and how many there are: rank 0 alone can where it alone loads the base."""
    missing = gather(bool(_on_meta(model)))
    able = [number for number, lacks in enumerate(missing) if not lacks]
    on_every_rank(lambda: check_materialized(model) if not able or spread or rank() in able else None)
    return able, len(missing)


def _inputs(
    model: nn.Module,
    config: DowserConfig,
    prompts: Sequence[Text] | None,
    first: int,
) -> list[Prompt]:
    """The prompts to probe: those of the caller, or synthetic ones beginning with number `first`; on the CPU.

    From a GPU they would be sent with its name, for which every rank would take memory there.
    """
    if prompts is not None:
        return _on_cpu(given_prompts(model, prompts))
    if config.num_probes <= first:
        raise ValueError(
            f"The statistics cover {first} prompts already, and num_probes is {config.num_probes}: choose a larger "
            "num_probes to continue them."
        )
    with left_as_it_was(model):
        return _on_cpu(synthetic_prompts(model, config, first))


def _on_cpu(prompts: list[Prompt]) -> list[Prompt]:
    return [{key: value.cpu() for key, value in prompt.items()} for prompt in prompts]


def _probed(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: DowserConfig,
    inputs: list[Prompt],
    first: int,
    share: Share | None,
) -> tuple[list[int], dict[str, ModuleStatistics]]:
    """The prompts that this rank probes, and their statistics."""
    if share is None:
        return [], {}
    with left_as_it_was(model):
        passes = Passes(model, targets, config, inputs, first, share)
        return passes.mine, passes.statistics()


def _gathered(
    names: list[str], mine: Sequence[int], found: dict[str, ModuleStatistics], earlier: ProbeStatistics | None
) -> dict[str, ModuleStatistics]:
    """Statistics of all prompts: those of an earlier probe, and what each rank has found.

    Args:
        names: the matrices, in the same order on every rank.
        mine: numbers of the prompts that this rank has probed.
        found: their statistics by matrix; emptied on the way, so that no two copies of all exist.
        earlier: the probe that is continued.
    """
    numbers = gather(mine)
    if earlier is not None:
        numbers.insert(0, range(earlier.info.num_probes))
    modules = {}
    for name in names:
        parts = gather(found.pop(name, None))
        if earlier is not None:
            parts.insert(0, earlier.modules.get(name))
        if (whole := combined(list(zip(numbers, parts, strict=True)))) is not None:
            modules[name] = whole
    return modules
