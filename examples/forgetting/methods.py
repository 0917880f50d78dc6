"""The compared methods: what each makes of a base model before training, or of a full fine-tuning after it.

Every method adapts the same matrices, the linears of the language decoder. `update_ratio` is rho, the share of their
weights that trains or is kept; LoRA, OSF and SHiRA get the rank that comes nearest to it.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, ShiraConfig, SupertuningConfig, get_peft_model
from sources import Batch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from peft_dowser import DowserConfig, probe
from peft_dowser.baselines import SpiderCallback
from peft_dowser.baselines.grafting import learn_graft
from peft_dowser.baselines.postmerge import dare, graft, tailor, top_delta, wise_ft
from peft_dowser.delta.apply import Delta
from peft_dowser.delta.seeds import derived_seed

PROBE = {"num_probes": 64, "num_rademacher": 8, "probe_length": 24}
ALPHA = 0.5  # of WiSE-FT, halfway to the fine-tuned model

# Trained with a mask or with other parameters, from the base.
SPARSE = ("dowser", "dowser+images", "random", "magnitude", "wanda", "gradient")
PEERS = ("lora", "osf", "shira", "super-tuning-low", "super-tuning-high")
DENSE = ("full", "spider")
# Made of a full fine-tuning, once it is there.
AFTERWARDS = ("top-delta", "dare", "graft", "graft-learned", "tailor", "wise-ft")


def decoder_linears(model: PreTrainedModel, last_layers: int | None = None) -> dict[str, nn.Linear]:
    """The linears of the language decoder by name, all of them or those of its last layers."""
    layers = model.get_decoder().layers
    chosen = layers if last_layers is None else layers[-last_layers:]
    inside = set(chosen.modules())
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m in inside}


def adapt(
    model: PreTrainedModel,
    method: str,
    update_ratio: float,
    seed: int,
    calibration: Callable[[], Sequence[Batch]],
    last_layers: int | None = None,
) -> tuple[nn.Module, list[TrainerCallback]]:
    """Make a base model ready to train.

    Args:
        model: the base; it is changed.
        method: one of `SPARSE`, `PEERS` or `DENSE`.
        update_ratio: rho.
        seed: of probes and random masks.
        calibration: examples of the task, one per batch, for the method that asks for data ("gradient").
        last_layers: adapt the last layers of the decoder only.

    Returns:
        The model to train, and what the trainer has to call.
    """
    linears = decoder_linears(model, last_layers)
    model.requires_grad_(False)
    if method in DENSE:
        for linear in linears.values():
            linear.requires_grad_(True)
        return model, [SpiderCallback()] if method == "spider" else []
    if method == "gradient":
        return _with_task_gradients(model, update_ratio, seed, list(linears), calibration()), []
    return get_peft_model(model, _config(method, update_ratio, seed, linears)), []


def _config(method: str, update_ratio: float, seed: int, linears: Mapping[str, nn.Linear]) -> PeftConfig:
    names = list(linears)
    count = sum(linear.weight.numel() for linear in linears.values())
    per_rank = sum(linear.in_features + linear.out_features for linear in linears.values())
    rank = max(1, round(update_ratio * count / per_rank))
    common = {"target_modules": names, "task_type": "CAUSAL_LM"}
    if method in SPARSE:
        score = method.removesuffix("+images")
        images = 0.5 if method.endswith("+images") else 0.0
        sparse = {"update_ratio": update_ratio, "score": score, "probe_images": images, "seed": seed}
        return DowserConfig(**PROBE, **sparse, **common)
    channels = {"granularity": "input_channel", "score": "activity"}
    return {
        "channels": lambda: DowserConfig(**PROBE, **channels, update_ratio=update_ratio, seed=seed, **common),
        "lora": lambda: LoraConfig(r=rank, lora_alpha=2 * rank, **common),
        "osf": lambda: OSFConfig(effective_rank=1 - update_ratio, **common),
        "shira": lambda: ShiraConfig(r=rank, random_seed=seed, **common),
        "super-tuning-low": lambda: SupertuningConfig(sparsity=1 - update_ratio, select_top=False, **common),
        "super-tuning-high": lambda: SupertuningConfig(sparsity=1 - update_ratio, select_top=True, **common),
    }[method]()


def _with_task_gradients(
    model: PreTrainedModel, update_ratio: float, seed: int, names: list[str], batches: Sequence[Batch]
) -> nn.Module:
    """SIFT: train the weights with the largest gradient of the task's own loss."""
    prompts = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    config = DowserConfig(
        update_ratio=update_ratio,
        score="gradient",
        select="high",
        seed=seed,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        config.statistics = str(Path(folder) / "statistics.safetensors")
        probe(model, config, prompts=prompts).save(config.statistics)
        return get_peft_model(model, config)


def after_training(
    method: str,
    base: PreTrainedModel,
    tuned: Mapping[str, Tensor],
    update_ratio: float,
    seed: int,
    batches: Sequence[Batch],
    last_layers: int | None = None,
) -> dict[str, Delta]:
    """What a post-merge method keeps of a full fine-tuning.

    Args:
        method: one of `AFTERWARDS`.
        base: the base model; left as it is.
        tuned: fine-tuned weights by module name.
        update_ratio: rho.
        seed: of random masks.
        batches: batches of the task, for the methods that calibrate on data ("tailor", "graft-learned").
        last_layers: as in `adapt`.

    Returns:
        The delta of every matrix by module name.
    """
    linears = decoder_linears(base, last_layers)
    pairs = {name: (linear.weight.detach(), tuned[name]) for name, linear in linears.items()}
    if method == "graft":
        kept = graft([lambda pair=pair: pair for pair in pairs.values()], update_ratio)
        return dict(zip(pairs, kept, strict=True))
    if method == "graft-learned":
        weights = {f"{name}.weight": weight for name, (_, weight) in pairs.items()}
        learned = learn_graft(base, weights, batches, update_ratio, seed=seed)
        return {name.removesuffix(".weight"): delta for name, delta in learned.items()}
    if method == "tailor":
        hessians = _hessians(base, linears, tuned, batches)
        return {name: tailor(*pair, hessians[name], update_ratio) for name, pair in pairs.items()}
    return {
        name: {
            "top-delta": lambda pair: top_delta(*pair, update_ratio),
            "dare": lambda pair, name=name: dare(*pair, update_ratio, derived_seed(seed, "dare", name)),
            "wise-ft": lambda pair: wise_ft(*pair, ALPHA),
        }[method](pair)
        for name, pair in pairs.items()
    }


@torch.no_grad()
def _hessians(
    base: PreTrainedModel, linears: Mapping[str, nn.Linear], tuned: Mapping[str, Tensor], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """H = (2 / n) X^T X of every linear's inputs in the fine-tuned model, over the real tokens of the batches."""
    originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    grams = {name: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for name, m in linears.items()}
    real: Tensor
    with ExitStack() as hooks:
        for name, linear in linears.items():

            def add(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                inputs = args[0][real].float()
                grams[name] += inputs.T @ inputs

            handle = linear.register_forward_pre_hook(add)
            hooks.callback(handle.remove)
            linear.weight.data.copy_(tuned[name])
        tokens = 0
        for batch in batches:
            real = batch["attention_mask"].bool()
            tokens += int(real.sum())
            base(**batch)
    for name, linear in linears.items():
        linear.weight.data.copy_(originals[name])
    return {name: gram.mul_(2 / tokens) for name, gram in grams.items()}
