"""Scores: how much each weight matters. Larger means more protected.

Plain functions of the base weight, shape `(out, in)`, any float dtype, read only, and of the `ModuleStatistics` of the
same module. They return scores of the same shape, float32, non-negative, on the device of the weight. A ValueError
tells that the statistics belong to a weight of another shape, or do not hold what the score reads. `shift`, `activity`,
`gradient` and `random` need only the shape and the device of the weight.
"""

import torch
from torch import Tensor

from .statistics import ModuleStatistics

# Entries of A^T B computed at a time, which bounds its memory in float64.
_BLOCK = 1 << 20


def dowser(weight: Tensor, statistics: ModuleStatistics) -> Tensor:
    """Score weights by how much the output depends on them (Eq. 5): S = |W| o (A^T B) / N.

    A, shape `(N, out)`, is the `sensitivity`, and B, shape `(N, in)`, the `activity`.

    Note: allocates the scores and, on CPU, a float32 copy of a weight of another dtype; nothing else of their size.
        A^T B is summed in float64, so that a mask depends neither on TF32 nor on the order of a device's sums.
    """
    return _product(weight, statistics, "dowser").mul_(weight).abs_().div_(len(statistics.activity))


def shift(weight: Tensor, statistics: ModuleStatistics) -> Tensor:
    """Score weights by how far the output moves when all move by the same amount: A^T B / N, Eq. 5 without |W|.

    Theorem 3.1 of the paper bounds the shift of the output by |J| |dW| |h|, and Eq. 3 puts |W| in the place of |dW|.
    But AdamW moves every weight by about the same amount, whatever |W| is.

    Note: an option for studies, not a default. On the measured language model (SmolLM2-135M-Instruct) it is better than
        `dowser`: at equal learning the model drifts less from its base. On the small image-text model, whose tasks the
        probes do not cover, it is worse than random masks. It takes the memory of `dowser`, and sums as it does.
    """
    return _product(weight, statistics, "shift").div_(len(statistics.activity))


def activity(weight: Tensor, statistics: ModuleStatistics) -> Tensor:
    """Score weights by their input alone, mean_n |h_j|: the factor B of Eq. 5. The probe needs forwards only.

    All rows of the result are one row of memory, so they are read only.
    """
    _check_shape(weight, (weight.shape[0], statistics.activity.shape[1]))
    return mean_activity(statistics).to(weight.device).expand(weight.shape)


def mean_activity(statistics: ModuleStatistics) -> Tensor:
    """mean_n |h_j| of every input channel, shape `(in,)`, float32, on the CPU; summed in float64."""
    return statistics.activity.mean(0, dtype=torch.float64).float()


def random(weight: Tensor, seed: int) -> Tensor:
    """Score weights at random, uniform in [0, 1) (the paper's random baseline); one seed of the matrix gives one score,
    on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu").to(weight.device)


def magnitude(weight: Tensor) -> Tensor:
    """Score weights by their size, |W|."""
    return weight.to(torch.float32, copy=True).abs_()


def wanda(weight: Tensor, statistics: ModuleStatistics) -> Tensor:
    """Score weights by size times the norm of their input, |W_ij| ||h_j||_2 (Sun et al. 2024), from the `energy`.

    The original ranks inside each output row; that is `scope="row"`.
    """
    _check_shape(weight, (weight.shape[0], statistics.energy.shape[0]))
    return magnitude(weight).mul_(statistics.energy.to(weight.device).sqrt())


def gradient(weight: Tensor, statistics: ModuleStatistics) -> Tensor:
    """Score weights by the size of the loss gradient, |dL/dW| (SIFT; RoSA ranks its square, the same order).

    Those methods train the weights with the largest gradient; that is `select="high"`.
    """
    if statistics.gradient is None:
        raise ValueError(
            "The probe statistics hold no gradient; probe with DowserConfig(score='gradient') to use this score."
        )
    _check_shape(weight, tuple(statistics.gradient.shape))
    return statistics.gradient.to(weight.device, copy=True).abs_()


# The scores that read statistics of a probe, by their names in `DowserConfig`.
FROM_STATISTICS = {"dowser": dowser, "shift": shift, "activity": activity, "wanda": wanda, "gradient": gradient}


def _product(weight: Tensor, statistics: ModuleStatistics, score: str) -> Tensor:
    """A^T B for a score, summed in float64 a few rows at a time, shape `(out, in)`, float32, where `weight` is."""
    sensitivity, activity = statistics.sensitivity, statistics.activity
    if sensitivity is None:
        raise ValueError(
            "The probe statistics hold no sensitivity, because their probe ran forwards only, as for score='activity' "
            f"or 'wanda'. Choose one of these, or probe with DowserConfig(score='{score}') to use this score."
        )
    _check_shape(weight, (sensitivity.shape[1], activity.shape[1]))
    wide = torch.float32 if weight.device.type == "mps" else torch.float64  # MPS has no float64
    rows, columns = sensitivity.to(weight.device, wide).T, activity.to(weight.device, wide)
    product = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    height = max(1, _BLOCK // max(1, weight.shape[1]))
    for part, row_block in zip(product.split(height), rows.split(height), strict=True):
        part.copy_(row_block @ columns)
    return product


def _check_shape(weight: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(weight.shape) != expected:
        raise ValueError(
            f"The probe statistics belong to a weight of shape {expected}, this one has {tuple(weight.shape)}."
        )
