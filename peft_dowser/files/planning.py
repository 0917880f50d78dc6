"""What a fine-tuning will take, computed from the config of a model: no weight is loaded, and none allocated.

State is counted tensor by tensor, and activations are what autograd keeps when the model's forward runs on fake
tensors, so both are exact; what a step needs beyond them is bounded by one layer, or by the loss.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, Conv1D, PreTrainedConfig, PreTrainedModel

from .._transformers import uninitialized
from ..base.module_names import layer_of
from ..base.search import fused_parameters, resolve_targets
from ..base.target import Target, layouts_of
from ..config import FORWARD_SCORES, PROBED_SCORES, DowserConfig, Score, unrounded_count
from ..delta.codec import code_length, position_dtype
from ..delta.layout import Layout
from ..delta.masks import trained_count
from .checkpoint import fetched, model_class

OPTIMIZERS = ("adamw", "adamw_8bit", "adafactor", "sgd")

QUANTIZATIONS = ("none", "8bit", "4bit")

# What a training keeps from step to step.
STATE = ("weights", "values", "gradients", "optimizer", "buckets", "positions")

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# Bytes per weight of bitsandbytes' linears: int8 with a float32 scale per row (the row's length hides it), and NF4 with
# a float32 scale for every 64 weights.
_QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}


@dataclass(frozen=True)
class ProbeCost:
    """What a probe takes for one score, its prompts included; nothing for a score that needs no probe.

    Attributes:
        forwards: how many prompts of T tokens run forward: N, and as many again where the model writes them itself.
        backwards: how many prompts run backward, R times each: to the outputs of the adapted matrices only.
        flops: arithmetic in the adapted matrices.
        training_tokens: tokens of the planned training that take the same arithmetic there.
        statistics: bytes of the result, in memory and on disk.
    """

    forwards: int
    backwards: int
    flops: float
    training_tokens: int
    statistics: int


@dataclass
class Plan:
    """Bytes, counts and arithmetic of one fine-tuning.

    Attributes:
        parameters: parameters of the model.
        adapted: weights of the adapted matrices.
        trained: nnz, the weights among them that train.
        weights: bytes of the base model.
        values: bytes of the trained values.
        gradients: bytes of their gradients.
        optimizer: bytes of the optimizer's state.
        buckets: bytes of the gradients' copies from which DDP sends them; 0 without, or with `gradient_as_bucket_view`.
        update: bytes that the optimizer's step takes beyond its state: torch's AdamW a copy of the values, unless it is
            `fused`, as in the Trainer.
        positions: bytes of the decoded positions and of the index codes.
        activations: bytes that autograd keeps from forward to backward; with grouped-query attention counted for a
            batch with padding; without padding less is kept.
        temporary: bytes of the loss, or of a layer where that is more: its largest W + D, or D of input channels, the
            product that the gradient of this is taken from and, with gradient checkpointing, its activations.
        probes: what a probe takes, by score.
        step_flops: arithmetic of a training step in the adapted matrices.
        file: bytes of a saved adapter with bfloat16 values, without its config.
    """

    parameters: int
    adapted: int
    trained: int
    weights: int
    values: int
    gradients: int
    optimizer: int
    buckets: int
    update: int
    positions: int
    activations: int
    temporary: int
    probes: dict[str, ProbeCost]
    step_flops: float
    file: int

    @property
    def total(self) -> int:
        """Bytes of a training step at its peak."""
        state = sum(getattr(self, part) for part in STATE)
        return state + max(self.activations + self.temporary, self.update)


def plan(
    model: str | Path | PreTrainedConfig,
    config: DowserConfig,
    optimizer: str = "adamw",
    dtype: str = "bfloat16",
    values_dtype: str = "float32",
    quantization: str = "none",
    batch: int = 1,
    tokens: int = 512,
    gradient_checkpointing: bool = False,
    ddp: bool = False,
) -> Plan:
    """Compute what a fine-tuning will take.

    Args:
        model: folder or Hub id of a model, of which only the config is read; or the config.
        config: the adapter's config; masks are counted with `scope="matrix"`, and what it trains as a whole is not.
        optimizer: one of `OPTIMIZERS`: torch's AdamW, bitsandbytes' AdamW8bit, Adafactor or plain SGD.
        dtype: of the base model and its activations: "float32", "bfloat16" or "float16".
        values_dtype: of the trained values, their gradients and the optimizer's state.
        quantization: of the base's linears, except the output head: one of `QUANTIZATIONS` (bitsandbytes).
        batch: examples in a step.
        tokens: tokens of an example.
        gradient_checkpointing: keep only the inputs of each layer, and run its forward again in the backward.
        ddp: train with DDP on several GPUs.

    Raises:
        ValueError: a name or number cannot be planned, or the config does not fit the model.
        TypeError: a target module is not a linear layer.
    """
    _check(optimizer, dtype, values_dtype, quantization, batch, tokens)
    if isinstance(model, PreTrainedConfig):
        known, name = copy.deepcopy(model), model.name_or_path or type(model).__name__
    else:
        known, name = AutoConfig.from_pretrained(fetched(str(model), ["config.json"])), str(model)
    known.use_cache = False
    with FakeTensorMode():
        skeleton = _skeleton(known, name, getattr(torch, dtype))
        if dtype != "bfloat16" and fused_parameters(skeleton):  # grouped products of fake tensors are in bfloat16 only
            skeleton = _skeleton(known, name, torch.bfloat16)
        targets = resolve_targets(skeleton, config)
        matrices = [matrix for target in targets.values() for matrix in target.matrices()]
        features = [matrix.features for matrix in matrices]
        used = sum(target.numel * target.uses_per_token / len(target.matrices()) for target in targets.values())
        layouts = layouts_of(targets, config.granularity)
        numbers = dict.fromkeys(targets, 0)  # positions by target
        for matrix in matrices:
            layout = matrix.layout(config.granularity)
            numbers[matrix.name_without_expert] += round(unrounded_count(matrix.name_without_expert, layout, config))
        counts = {key: number * layouts[key].group for key, number in numbers.items()}
        writes = skeleton.can_generate()
        parameters, weights = skeleton.num_parameters(), _weight_bytes(skeleton, dtype, quantization)
        width = _DTYPE_BYTES[dtype]
        if config.granularity == "input_channel":
            trained = _with_channels(targets, layouts, numbers, getattr(torch, values_dtype))
        else:
            trained = [target.tensor_name for target in targets.values()]
        kept = kept_bytes(skeleton, trained, batch, tokens, width, checkpointing=False)
        activations, recomputed = kept, 0
        if gradient_checkpointing:
            activations = kept_bytes(skeleton, trained, batch, tokens, width, checkpointing=True)
            recomputed = math.ceil((kept - activations) / len({layer_of(key) for key in targets}))
    numels = {key: target.numel for key, target in targets.items()}
    nnz, adapted, size = sum(counts.values()), sum(numels.values()), _DTYPE_BYTES[values_dtype]
    codes = sum(code_length(layouts[key].size, number) for key, number in numbers.items())
    positions = sum(number * position_dtype(layouts[key].size).itemsize for key, number in numbers.items())
    # The temporaries of a layer are of the size of its weight, or of its trained channels.
    largest = max((numels if config.granularity == "weight" else counts).values())
    if config.granularity == "weight":
        products = used * _products(quantization, gradient_checkpointing)
    else:  # one of full size in each forward and for the gradient of the input; likewise, and for D, of the channels
        forwards = 2 if gradient_checkpointing else 1
        products = used * (forwards + 1) + nnz * (forwards + 2)
    return Plan(
        parameters=parameters,
        adapted=adapted,
        trained=nnz,
        weights=weights,
        values=nnz * size,
        gradients=nnz * size,
        optimizer=sum(_optimizer_bytes(optimizer, count, size) for count in counts.values()),
        buckets=nnz * size if ddp else 0,
        update=nnz * size if optimizer == "adamw" else 0,
        positions=positions + codes,
        activations=activations,
        temporary=max(2 * largest * width + recomputed, _loss_bytes(skeleton, batch, tokens, width)),
        probes={
            score: _probe_cost(score, config, features, used, products, writes=writes) for score in get_args(Score)
        },
        step_flops=2.0 * batch * tokens * products,
        file=codes + 2 * nnz,
    )


def _with_channels(
    targets: Mapping[str, Target], layouts: Mapping[str, Layout], numbers: Mapping[str, int], dtype: torch.dtype
) -> list[str]:
    """Let modules compute with so many trained input channels each; the names of their values."""

    def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        chosen = args[0].index_select(-1, module.dowser_positions)
        return output + nn.functional.linear(chosen, module.dowser_values.to(chosen.dtype))

    trained = [name for name in targets if numbers[name]]
    for name in trained:
        module, layout, number = targets[name].module, layouts[name], numbers[name]
        module.register_buffer("dowser_positions", torch.zeros(number, dtype=position_dtype(layout.size)))
        values = torch.zeros(layout.values_shape(number), dtype=dtype)
        module.register_parameter("dowser_values", nn.Parameter(values))
        module.register_forward_hook(hook)
    return [f"{name}.dowser_values" for name in trained]


def bytes_per_weight(update_ratio: float, optimizer: str, values_dtype: str) -> float:
    """State per base weight of values, gradients, optimizer and positions, for large matrices."""
    numel, size = 1 << 24, _DTYPE_BYTES[values_dtype]
    count = trained_count(update_ratio, numel)
    state = 2 * count * size + _optimizer_bytes(optimizer, count, size)
    return (state + count * position_dtype(numel).itemsize + code_length(numel, count)) / numel


def _probe_cost(
    score: str, config: DowserConfig, features: Iterable[tuple[int, int]], used: float, products: float, writes: bool
) -> ProbeCost:
    """What a probe for a score takes, with N, R and T of the config and the outputs and inputs of every adapted matrix.

    A token is multiplied with `used` of their weights, and one of the training with `products` in all its products. A
    model that `writes` the prompts runs forward for them too.
    """
    if score not in PROBED_SCORES:
        return ProbeCost(0, 0, 0.0, 0, 0)
    count, gradient = config.num_probes, score == "gradient"
    projections = 0 if score in FORWARD_SCORES else config.num_rademacher
    forwards, backwards = count * (1 + writes), count * (projections + gradient)
    # A backward computes gradients of activations, and the backward of the loss also gradients of the weights.
    probed = config.probe_length * (forwards + backwards + count * gradient)
    entries = [
        count * width + width + (count * out if projections else 0) + (out * width if gradient else 0)
        for out, width in features
    ]
    return ProbeCost(forwards, backwards, 2.0 * used * probed, round(probed * used / products), 4 * sum(entries))


def _skeleton(config: PreTrainedConfig, name: str, dtype: torch.dtype) -> PreTrainedModel:
    model = uninitialized(model_class(config, name), config, dtype)
    model.tie_weights()  # a part of the initialization
    return model


def kept_bytes(
    model: PreTrainedModel, trained: Iterable[str], batch: int, tokens: int, size: int, checkpointing: bool
) -> int:
    """Bytes that autograd keeps from the forward to the backward of a step, less the weights themselves.

    Under `FakeTensorMode` nothing is computed. Of each of the weights that are `trained` the inputs are kept for its
    gradient. An entry that the model keeps in its own dtype takes `size` bytes.
    """
    model.train().requires_grad_(False)
    for name in trained:
        model.get_parameter(name).requires_grad_(True)
    if checkpointing:
        # transformers 5.24 renames the method.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        model.enable_input_require_grads()
    owned = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Fake tensors always bring a causal mask along, where fused attention is just told to be causal.
        if storage._cdata not in owned and tensor.shape != (batch, 1, tokens, tokens):
            count = storage.nbytes() // tensor.element_size()
            kept[storage._cdata] = storage, count * (size if tensor.dtype == model.dtype else tensor.element_size())
        return tensor

    ids = torch.zeros(batch, tokens, dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "labels": ids} if model.can_generate() else {"input_ids": ids}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            model(**inputs)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The forward of {type(model).__name__} does not run with {tokens} token ids alone ({error}), so what "
                "it keeps cannot be planned."
            ) from error
    return sum(count for _, count in kept.values())


def _products(quantization: str, checkpointing: bool) -> int:
    """Products of full size of an adapted matrix in a step.

    One in each forward, one for the gradient of the input and one for the gradient of the values. The base of 8 bits
    runs itself, so that D is multiplied on its own, in each forward and for the gradient of the input.
    """
    forwards = 2 if checkpointing else 1
    own = forwards + 1 if quantization == "8bit" else 0
    return forwards + 2 + own


def _loss_bytes(model: PreTrainedModel, batch: int, tokens: int, size: int) -> int:
    """Bytes where the backward begins, beyond what autograd keeps: the logits, and two gradients of them in float32."""
    head = model.get_output_embeddings() if model.can_generate() else None
    return 0 if head is None else batch * tokens * len(head.weight) * (size + 2 * 4)


def _weight_bytes(model: nn.Module, dtype: str, quantization: str) -> int:
    size = _DTYPE_BYTES[dtype]
    total = sum(parameter.numel() for parameter in model.parameters()) * size
    if quantization == "none":
        return total
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    numel = sum(linear.weight.numel() for linear in linears)
    return total + round(numel * (_QUANTIZED_BYTES[quantization] - size))


# State of an optimizer per trained weight, by the size of a value; bitsandbytes keeps two bytes and, for every 256
# values, two float32 scales (tensors below 4096 values stay in float32).
def _optimizer_bytes(optimizer: str, count: int, size: int) -> int:
    if optimizer == "adamw_8bit" and count >= 4096:
        return 2 * count + 2 * 4 * math.ceil(count / 256)
    if optimizer == "adamw_8bit":
        return 2 * 4 * count
    if optimizer == "adafactor":  # rows and columns are factored, and values have none
        return 4 * count
    return 2 * count * size + 4 if optimizer == "adamw" else 0  # 4: the step


def _check(optimizer: str, dtype: str, values_dtype: str, quantization: str, batch: int, tokens: int) -> None:
    for name, value, known in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("dtype", dtype, tuple(_DTYPE_BYTES)),
        ("values_dtype", values_dtype, tuple(_DTYPE_BYTES)),
        ("quantization", quantization, QUANTIZATIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    if batch < 1 or tokens < 1:
        raise ValueError(f"batch and tokens must be at least 1, got {batch} and {tokens}.")
