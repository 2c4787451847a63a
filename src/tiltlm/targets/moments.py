"""Coefficients from desired moments: the convex dual, solved by Newton's method on cached feature values.

No model is called here. With weights w_i on samples of the base (a filter's zeros, a reward's tilt) the dual is

    F(λ) = log Σ_i w_i exp(λ·φ_i) − λ·μ̄,    ∇F = E_λ[φ] − μ̄,    ∇²F = Cov_λ(φ)

and its minimum gives the distribution with these moments that is closest to the base in KL (2012.11635, §2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import FeatureError, UnreachableTargetError

# In units of each feature's spread.
TOLERANCE = 1e-10
MAX_ITERATIONS = 200
# Nats by which one step may raise a sample's log-weight.
MAX_GROWTH = 4.0
# On the edge of what is possible λ is infinite. Newton's method stops on the way there, where the gradient is below the
# tolerance; but then hardly any of the samples' spread is left in some direction, while inside much more of it is.
EDGE = 1e-7
# Below this ratio of eigenvalues of the correlation matrix, features move together as far as float64 can tell.
COLLINEAR = 1e-10


@dataclass(frozen=True)
class MomentFit:
    """Fitted coefficients λ [K], their covariance [K, K] (sandwich estimate) and the worst residual |E_λ[φ] − μ̄|."""

    coefficients: Tensor
    covariance: Tensor
    residual: float


def fit_moments(features: Tensor, log_weights: Tensor, goals: Sequence[float], names: Sequence[str]) -> MomentFit:
    """Find λ [K] with E_λ[φ] = ``goals`` on samples with values ``features`` [N, K] and ``log_weights`` [N].

    Raises FeatureError for non-finite values, UnreachableTargetError for what the samples cannot express: a feature
    without variation, a goal outside its range, goals that exclude each other, linearly dependent features.
    """
    if not bool(torch.isfinite(features).all()):
        column = int((~torch.isfinite(features)).any(0).nonzero()[0])
        raise FeatureError(f"feature '{names[column]}': a value is not finite, so its moment cannot be fitted")
    supported = torch.isfinite(log_weights)
    features, log_weights = features[supported].double(), log_weights[supported].double()
    goal = torch.tensor(list(goals), dtype=torch.float64)
    _check_ranges(features, goal, names)
    _check_collinear(features, names)
    return _newton(features, log_weights - log_weights.logsumexp(0), goal, names)


def _newton(features: Tensor, log_weights: Tensor, goal: Tensor, names: Sequence[str]) -> MomentFit:
    # Centred on the goal, the dual's gradient is E_λ[φ] itself.
    scale = features.std(0, correction=0)
    z = (features - goal) / scale
    coefficients = torch.zeros(len(goal), dtype=torch.float64)

    def dual(c: Tensor) -> tuple[float, Tensor, Tensor]:
        logits = log_weights + z @ c
        weights = logits.softmax(0)
        gradient = weights @ z
        hessian = (z * weights[:, None]).T @ z - gradient[:, None] * gradient[None, :]
        return float(logits.logsumexp(0)), gradient, hessian

    value, gradient, hessian = dual(coefficients)
    for _ in range(MAX_ITERATIONS):
        if float(gradient.abs().max()) < TOLERANCE:
            break
        ridge = 1e-14 * torch.eye(len(goal), dtype=torch.float64)
        step = torch.linalg.solve(hessian + ridge, -gradient)
        slope = float(gradient @ step)
        # A step that moved all weight onto few samples would leave no curvature to come back by.
        change = (z - gradient) @ step
        rate = MAX_GROWTH / max(MAX_GROWTH, float(change.max()))
        trial = dual(coefficients + rate * step)
        # Near the optimum the decrease is below rounding; then the full step is right.
        while trial[0] > value + 1e-4 * rate * slope + 1e-13 and rate > 1e-10:
            rate /= 2
            trial = dual(coefficients + rate * step)
        coefficients = coefficients + rate * step
        value, gradient, hessian = trial
        if rate <= 1e-10:
            break
    if not float(gradient.abs().max()) < TOLERANCE or _spread_left(z, hessian) < EDGE:
        raise _out_of_reach(features, goal, names)
    weights = (log_weights + z @ coefficients).softmax(0)
    spread = (z * weights[:, None]).T @ (z * weights[:, None])
    inverse = torch.linalg.pinv(hessian)
    covariance = inverse @ spread @ inverse / scale[:, None] / scale[None, :]
    residual = float((gradient * scale).abs().max())
    return MomentFit(coefficients / scale, covariance, residual)


def _check_ranges(features: Tensor, goal: Tensor, names: Sequence[str]) -> None:
    n = features.shape[0]
    for name, values, wanted in zip(names, features.unbind(-1), goal.tolist(), strict=True):
        low, high = float(values.min()), float(values.max())
        if low == high:
            raise UnreachableTargetError(
                f"feature '{name}': it was {low:g} in all {n} samples of the base, so no weighting of them can change "
                f"its moment to {wanted:g}. {rarity_advice(n) if low == 0 < wanted else ''}Or else leave it out."
            )
        if not low < wanted < high:
            raise UnreachableTargetError(
                f"feature '{name}': moment {wanted:g} is outside of what {n} samples of the base show, "
                f"{low:g} to {high:g}. Choose a moment strictly between them"
                + (", or make it a filter (moment 1.0)." if (low, high) == (0.0, 1.0) else ", or draw more samples.")
            )


def rarity_advice(n: int) -> str:
    """What n samples without a hit say of a rate, and how many samples would do."""
    return (
        f"Its rate is below {3 / n:.1g} (95% confidence); at that rate about {10 * n:,} samples would be needed to "
        f"see thirty: raise target.samples, or start from a looser feature or a prompt that brings it about. "
    )


def _check_collinear(features: Tensor, names: Sequence[str]) -> None:
    if features.shape[1] == 1:
        return
    centred = features - features.mean(0)
    correlation = (centred / centred.norm(dim=0)).T @ (centred / centred.norm(dim=0))
    values, vectors = torch.linalg.eigh(correlation)
    if float(values[0]) < COLLINEAR * float(values[-1]):
        involved = [name for name, part in zip(names, vectors[:, 0].tolist(), strict=True) if abs(part) > 1e-4]
        raise UnreachableTargetError(
            f"features {', '.join(repr(name) for name in involved)}: one is a linear combination of the others, so "
            f"their moments cannot be set apart. Remove one of them."
        )


def _spread_left(z: Tensor, hessian: Tensor) -> float:
    """The smallest ratio, over all directions, of the variance under λ to that of the samples."""
    centred = z - z.mean(0)
    factor = torch.linalg.cholesky(centred.T @ centred / len(z))
    half = torch.linalg.solve_triangular(factor, hessian, upper=False)
    ratio = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return float(torch.linalg.eigvalsh(ratio)[0])


def _out_of_reach(features: Tensor, goal: Tensor, names: Sequence[str]) -> UnreachableTargetError:
    """Each goal may be in range and still exclude another, or be so far out that hardly a sample is left."""
    n = len(features)
    if len(names) == 1:
        return UnreachableTargetError(
            f"feature '{names[0]}': moment {goal[0]:g} is at the edge of what {n} samples of the base show. Choose a "
            f"moment closer to theirs, {features.mean():g}, or draw more samples (target.samples)."
        )
    listed = ", ".join(f"{name} = {value:g}" for name, value in zip(names, goal.tolist(), strict=True))
    return UnreachableTargetError(
        f"moments {listed}: each is possible alone, but no weighting of {n} samples of the base has them together "
        f"(they exclude each other, or lie on the edge of it). Relax one of them."
    )


def log_mean_exp(log_weights: Tensor) -> float:
    """log of the mean of exp(log_weights) [N]; -inf where all are."""
    return float(log_weights.logsumexp(0)) - math.log(len(log_weights))
