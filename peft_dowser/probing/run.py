"""The probe: one forward and R backwards per prompt, reduced to two thin statistics per matrix.

Every parameter is frozen while the probe runs, and the graph begins at the outputs of the first probed modules, so
autograd computes gradients of activations only, through the probed layers only. Samples of a batch do not interact:
one backward serves all of them. For a score that reads no sensitivity there is no graph and no backward.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from ..base.compiled import uncompiled
from ..base.distributed import is_sharded_model
from ..base.restoring import left_as_it_was
from ..base.search import check_is_base, resolve_targets
from ..base.target import Target
from ..config import DowserConfig
from . import cache
from .passes import Passes
from .prompts import Prompt, Text, given_prompts, prompt_length, synthetic_prompts
from .ranks import Ranks
from .settings import ProbeSettings
from .statistics import ModuleStatistics, ProbeInfo, ProbeStatistics

logger = logging.getLogger(__name__)


def probe(
    model: nn.Module,
    config: DowserConfig | None = None,
    prompts: Sequence[Text] | None = None,
) -> ProbeStatistics:
    """Measure how much the output depends on every neuron, without data (Eq. 4 to 6).

    For prompt n, output f and R Rademacher vectors xi, each target module with input h and output z gets
    A[n] = mean over xi and tokens of |d(xi^T f)/dz| and B[n] = mean over tokens of |h|. f is the logits at the last
    real token of a decoder, and the last hidden state at all real tokens of an encoder. The model is left exactly as
    it was: parameters, `requires_grad`, train mode, hooks, configs and random generators, also after an exception.

    Args:
        model: the base model, with its weights loaded; quantities are measured in its own dtype, and under autocast
            only where it is half and has parts that were made wider, such as norms.
        config: gives the targets, N, R, T, the seed and the batch size; None takes the defaults. Its score says what is
            measured: for "activity" and "wanda" no A, and so without a backward; for "gradient" also the gradient of
            the prompts' loss.
        prompts: inputs to probe with instead of synthetic ones: texts, for the tokenizer in the folder
            or Hub id that the model was loaded from; token ids, shape `(tokens,)`; or the keyword arguments of the
            model's forward with a batch dimension of 1, such as a processor returns.

    Returns:
        Statistics of every target module that a prompt reached, float32, on the CPU.

    Raises:
        TypeError: the model is not a module, but its name for example.
        ValueError: there is nothing to probe with, the model is a `PeftModel`, on the meta device, or sharded by
            other means than FSDP2 or DeepSpeed ZeRO-3.
        RuntimeError: called under `torch.inference_mode`, or one prompt alone does not fit into memory.

    Note: the time is one forward and R backwards over N T tokens, for "activity" and "wanda" the forward alone, plus
    the generation of the prompts and a forward of two of them, which tells whether prompts can share a batch. The
    memory is one batch plus N (out + in) numbers per module; without A, N in. A probe with synthetic prompts is kept in
    a cache, `DOWSER_CACHE` or the folder `dowser` in the cache of Hugging Face, and read from there the next time;
    `DOWSER_CACHE=off` turns it off. In a distributed run every rank must call this: each probes a part of the prompts,
    and all return the whole. A base that is sharded with FSDP2 or DeepSpeed ZeRO-3 gathers the weights that its own
    forward and backward gather, and one matrix at a time for `samples`; ZeRO-3 gathers for one backward per forward, so
    R forwards run there.
    """
    config = config or DowserConfig()
    check_is_base(model)
    return probe_targets(model, resolve_targets(model, config), ProbeSettings.of(config), prompts)


def probe_targets(
    model: nn.Module, targets: Mapping[str, Target], settings: ProbeSettings, prompts: Sequence[Text] | None = None
) -> ProbeStatistics:
    """`probe` for targets that are found already, by name; of a tied weight every use is probed by itself."""
    model = uncompiled(model)
    targets = {use.name: use for target in targets.values() for use in target.uses}
    if torch.is_inference_mode_enabled():
        raise RuntimeError("The probe does not run under torch.inference_mode(); leave that context first.")
    ranks = Ranks.of(model)
    settings = ranks.one_result(lambda: settings)
    samples = ranks.one_result(lambda: {name: target.base_sample() for name, target in targets.items()})
    names = [matrix.name for target in targets.values() for matrix in target.matrices()]
    paths: list[Path] = []
    if prompts is None and not ranks.in_step:
        paths = ranks.one_result(lambda: cache.statistics_paths(model, samples, settings))
    if paths and (known := ranks.one_result(lambda: cache.read(paths, names, samples))) is not None:
        return known if settings.backward else known.of_forwards()
    _report_idle(ranks, next(iter(targets.values())).device)
    inputs = ranks.one_result(lambda: _inputs(model, settings, prompts))
    mine, found = ranks.on_every_rank(lambda: _probed(model, targets, settings, inputs, ranks))
    info = ProbeInfo(
        base_model=getattr(getattr(model, "config", None), "name_or_path", "") or "",
        num_probes=len(inputs),
        num_rademacher=settings.num_rademacher,
        probe_length=prompt_length(model, settings) if prompts is None else 0,
        probe_images=settings.probe_images if prompts is None else 0.0,
        seed=settings.seed,
    )
    statistics = ProbeStatistics(ranks.all_statistics(names, mine, found), info, samples)
    if paths:
        ranks.one_result(lambda: cache.write(statistics, paths[0]))
    return statistics


def own_prompts(model: nn.Module, settings: ProbeSettings) -> list[Prompt]:
    """The prompts that a probe of a base would write, on the CPU; the base is left as it was.

    They are kept in the cache of probes, and read from there the next time. The adapters of the base, if it has any,
    are disabled. A ValueError tells that it cannot write prompts.
    """
    at = None if is_sharded_model(model) else cache.prompts_path(model, settings)
    if at is not None and (known := cache.read_prompts(at)) is not None:
        return known
    with left_as_it_was(model):
        prompts = _on_cpu(synthetic_prompts(model, settings))
    if at is not None:
        cache.write_prompts(prompts, at)
    return prompts


def _report_idle(ranks: Ranks, device: torch.device) -> None:
    """Say which GPUs or ranks do nothing while the probe runs."""
    if not ranks.is_first:
        return
    if device.type == "cpu" and torch.accelerator.is_available():
        logger.warning(
            "The probe runs on the CPU, where the base is, while a GPU is idle. Move the base there before, or load it "
            "with device_map: the probe then takes seconds instead of minutes."
        )
    if len(ranks.probing_ranks) < ranks.count:
        logger.warning(
            "%d of %d ranks have the weights and probe, while the others wait, no longer than the time-out of the "
            "process group. For a large base probe first: probe(model, config).save(path), then "
            "DowserConfig(statistics=path).",
            len(ranks.probing_ranks),
            ranks.count,
        )


def _inputs(model: nn.Module, settings: ProbeSettings, prompts: Sequence[Text] | None) -> list[Prompt]:
    """The prompts to probe, on the CPU: the prompts of the caller, or synthetic ones.

    Sent as tensors of a GPU, they would make every rank allocate memory on that GPU.
    """
    if prompts is not None:
        return _on_cpu(given_prompts(model, prompts))
    with left_as_it_was(model):
        return _on_cpu(synthetic_prompts(model, settings))


def _on_cpu(prompts: list[Prompt]) -> list[Prompt]:
    return [{key: value.cpu() for key, value in prompt.items()} for prompt in prompts]


def _probed(
    model: nn.Module, targets: Mapping[str, Target], settings: ProbeSettings, inputs: list[Prompt], ranks: Ranks
) -> tuple[list[int], dict[str, ModuleStatistics]]:
    """The prompts that this rank probes, and their statistics."""
    if not ranks.probes:
        return [], {}
    with left_as_it_was(model):
        passes = Passes(model, targets, settings, inputs, ranks)
        return passes.mine, passes.statistics()
