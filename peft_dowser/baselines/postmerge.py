"""Sparse deltas made after training: what to keep of the difference D between a base and a fine-tuned matrix.

Plain functions of tensors: `base` is W*, `tuned` the fine-tuned weight W of the same shape and float dtype, both read
only; D = W - W*, and `update_ratio` is rho, the fraction to keep, in (0, 1]. Each function returns what an adapter
holds: positions in the stored weight, and the values that are added to the base there. A ValueError tells that an
argument is out of range, or that the matrices do not fit each other or are not finite.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..delta.apply import Delta
from ..delta.codec import position_dtype
from ..delta.masks import select, select_at_random, select_jointly, trained_count

COMPENSATIONS = ("obs", "official", None)


def top_delta(base: Tensor, tuned: Tensor, update_ratio: float) -> Delta:
    """Keep the largest |D|: exactly k = round(rho n) entries, ties to the lowest position."""
    _check_ratio(update_ratio)
    delta = _difference(base, tuned)
    positions = select(delta.abs(), trained_count(update_ratio, delta.numel()), largest=True)
    return _kept(delta, positions)


def dare(base: Tensor, tuned: Tensor, update_ratio: float, seed: int) -> Delta:
    """Keep every entry of D with probability rho, and divide it by rho (DARE, Yu et al. 2024; drop rate p = 1 - rho).

    The expected delta is D. One seed, which is the seed of this matrix, gives one delta on every device.
    """
    _check_ratio(update_ratio)
    delta = _difference(base, tuned)
    chosen = select_at_random(delta.numel(), update_ratio, seed)
    positions, values = _kept(delta, chosen.to(delta.device))
    return Delta(positions, values.div_(update_ratio))


def wise_ft(base: Tensor, tuned: Tensor, alpha: float) -> Delta:
    """A fraction of the way from W* to W: alpha D, at every entry that changed (WiSE-FT, Wortsman et al. 2022).

    `alpha` 0 is W*, 1 is W; other finite numbers extrapolate.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be a finite number, got {alpha!r}.")
    delta = _difference(base, tuned)
    positions, values = _kept(delta, _positions(delta != 0))
    return Delta(positions, values.mul_(alpha))


def graft(pairs: Sequence[Callable[[], tuple[Tensor, Tensor]]], update_ratio: float) -> list[Delta]:
    """Keep the largest |D| over all matrices together: the base patch of Model Grafting (Panigrahi et al. 2023).

    Args:
        pairs: one function per matrix that returns its W* and W. Each is called five times, so that only one pair
            exists at a time.
        update_ratio: rho, the fraction of all entries to keep.

    Returns:
        One delta per matrix, exactly round(rho n) entries in all; some may be empty. Ties go to the earlier matrix,
        then the lower position.
    """
    _check_ratio(update_ratio)
    count = trained_count(update_ratio, sum(_movement(pair).numel() for pair in pairs))
    masks = select_jointly([partial(_movement, pair) for pair in pairs], count, largest=True)
    return [_kept(_difference(*pair()), positions) for pair, positions in zip(pairs, masks, strict=True)]


def tailor(
    base: Tensor,
    tuned: Tensor,
    hessian: Tensor,
    update_ratio: float,
    alpha: float = 0.8,
    damping: float = 0.01,
    block: int = 128,
    compensation: Literal["obs", "official"] | None = "obs",
) -> Delta:
    """Keep a patch of D, and let it make up for the entries that go back to W* (ModelTailor, Zhu et al. 2024).

    With U the upper Cholesky factor of the inverse of the damped Hessian, H^-1 = U^T U, and z the z-score inside a row
    of a block of columns, the highest scores alpha z(|D|) + (1 - alpha) z(W_ij^2 / U_jj^2) of each block are kept. The
    others are reset, column by column; the residual e = (W - W*) / U_jj of a reset entry changes every later column l
    of its row by -e U_jl.

    Args:
        base: W*, shape `(out, in)`.
        tuned: W.
        hessian: H = (2 / n) X^T X of the inputs X `(n, in)`, shape `(in, in)`, float32; read only.
        update_ratio: rho; round(rho n) entries are kept in all, and as near to it in every block.
        alpha: share of the salience |D| in the score, in [0, 1]; the rest is sensitivity.
        damping: what is added to the diagonal of H, as a fraction of its mean. If the damped H is not positive
            definite, a ValueError says so.
        block: columns that are ranked together.
        compensation: "obs" subtracts the residual's effect, as the optimal brain surgeon does; "official" adds it, as
            the published code does; None leaves the kept entries as trained.

    Returns:
        The kept entries only, with their compensation: W - W* after all columns are done.

    Note: like the published code, the sensitivity squares W, already compensated by earlier blocks, and not W - W*.
    Computes in float32; allocates about four matrices of the size of the weight and four of the Hessian.
    """
    _check_ratio(update_ratio)
    _check_tailor(base, hessian, alpha, damping, block, compensation)
    salience = _difference(base, tuned).abs_()
    origin, current = base.detach().float(), tuned.detach().to(torch.float32, copy=True)
    factor = _inverse_factor(hessian.detach().to(current.device), damping)
    sign = {"obs": -1.0, "official": 1.0, None: 0.0}[compensation]
    height, width = current.shape
    kept = torch.zeros(height, width, dtype=torch.bool, device=current.device)
    for start in range(0, width, block):
        stop = min(start + block, width)
        count = trained_count(update_ratio, height * stop) - trained_count(update_ratio, height * start)
        here = slice(start, stop)
        sensitivity = (current[:, here] / factor.diagonal()[here]).square()
        score = alpha * _standardized(salience[:, here]) + (1 - alpha) * _standardized(sensitivity)
        kept[:, here] = _highest(score, count)
        residuals = _reset_columns(current[:, here], origin[:, here], kept[:, here], factor[here, here], sign)
        current[:, stop:].addmm_(residuals, factor[here, stop:], alpha=sign)
    delta = _kept(current.sub_(origin), _positions(kept))
    if not bool(torch.isfinite(delta.values).all()):
        raise ValueError(
            f"The compensation '{compensation}' diverged: some kept entries are no longer finite. Use "
            "compensation='obs', or a larger damping."
        )
    return delta


def _reset_columns(current: Tensor, origin: Tensor, kept: Tensor, factor: Tensor, sign: float) -> Tensor:
    """Reset the entries of one block `(out, block)` that are not kept, and compensate its later columns, in place.

    `factor` is the block of U on the diagonal. Returns the residuals (W - W*) / U_jj of the reset entries, zero for the
    kept ones, shape `(out, block)`.
    """
    # Transposed, a column is contiguous: 18 s become 1 s for all of a 2048 x 2048 weight.
    columns = current.T.contiguous()
    residuals = torch.empty_like(columns)
    for column, (before, keep) in enumerate(zip(origin.T, kept.T, strict=True)):
        error = (columns[column] - before) / factor[column, column]
        residuals[column] = error.masked_fill(keep, 0)
        columns[column + 1 :].addr_(factor[column, column + 1 :], residuals[column], alpha=sign)
    current.copy_(columns.T)
    return residuals.T


def _standardized(terms: Tensor) -> Tensor:
    """z-scores inside each row; 0 in a row of equal terms."""
    centred = terms - terms.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return centred / spread.masked_fill(spread == 0, 1)


def _highest(score: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest scores, ties to the lowest position."""
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[select(score - score.min(), count, largest=True).long()] = True
    return mask.view(score.shape)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with H^-1 = U^T U, for the damped H.

    With P the reversal of the columns and P H P = L L^T, the upper triangular R = P L P has H = R R^T, so U = R^-1: no
    inverse of H is formed.
    """
    reversed_ = hessian.float().flip(0, 1)
    reversed_.diagonal().add_(damping * reversed_.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(reversed_)
    if bool(failed):
        raise ValueError(
            f"The Hessian is not positive definite with damping={damping}. Use a larger damping, or more calibration "
            "samples."
        )
    identity = torch.eye(len(lower), device=lower.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)


def _difference(base: Tensor, tuned: Tensor) -> Tensor:
    """D = W - W*, float32, rounded once; a new tensor."""
    if base.shape != tuned.shape:
        raise ValueError(f"base and tuned must have one shape, got {tuple(base.shape)} and {tuple(tuned.shape)}.")
    if base.dtype != tuned.dtype or not base.is_floating_point() or base.element_size() < 2:
        raise ValueError(
            "base and tuned must have one dtype of float16, bfloat16, float32 or float64, got "
            f"{base.dtype} and {tuned.dtype}."
        )
    wide = torch.promote_types(base.dtype, torch.float32)
    delta = tuned.detach().to(wide, copy=True).sub_(base.detach()).float()
    if bad := int((~torch.isfinite(delta)).sum()):
        raise ValueError(f"tuned - base has {bad} entries that are not finite; one of the two is damaged.")
    return delta


def _movement(pair: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    return _difference(*pair()).abs_()


def _kept(delta: Tensor, positions: Tensor) -> Delta:
    return Delta(positions, delta.reshape(-1).index_select(0, positions))


def _positions(kept: Tensor) -> Tensor:
    return kept.reshape(-1).nonzero().view(-1).to(position_dtype(kept.numel()))


def _check_ratio(update_ratio: float) -> None:
    if not 0 < update_ratio <= 1:
        raise ValueError(f"update_ratio must be a number in (0, 1], got {update_ratio!r}.")


def _check_tailor(
    base: Tensor, hessian: Tensor, alpha: float, damping: float, block: int, compensation: str | None
) -> None:
    if base.dim() != 2 or tuple(hessian.shape) != (base.shape[1], base.shape[1]):
        raise ValueError(
            "tailor takes a weight (out, in) and a Hessian (in, in), got shapes "
            f"{tuple(base.shape)} and {tuple(hessian.shape)}."
        )
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("The Hessian has entries that are not finite.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be a number in [0, 1], got {alpha!r}.")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a finite number of at least 0, got {damping!r}.")
    if block < 1:
        raise ValueError(f"block must be an integer of at least 1, got {block!r}.")
    if compensation not in COMPENSATIONS:
        raise ValueError(f"compensation must be one of 'obs', 'official' and None, got {compensation!r}.")
