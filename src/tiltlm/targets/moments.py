"""Coefficients from desired moments: the convex dual, solved by Newton's method on cached feature values.

No model is called here. With weights w_i on samples of the base (a filter's zeros, a reward's tilt) the dual is

    F(λ) = log Σ_i w_i exp(λ·φ_i) − λ·μ̄,    ∇F = E_λ[φ] − μ̄,    ∇²F = Cov_λ(φ)

and its minimum gives the distribution with these moments that is closest to the base in KL (2012.11635, §2). With
several prompts F is the mean over prompts of log Z_c(λ), each on its own samples, minus λ·μ̄. λ is shared, and the mean
over prompts of E_{p_c}[φ] equals μ̄.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import FeatureError, UnreachableTargetError
from tiltlm.estimation import Strata

# In units of each feature's standard deviation.
TOLERANCE = 1e-10
MAX_ITERATIONS = 200
# The largest increase of a sample's log-weight in one step, in nats.
MAX_GROWTH = 4.0
# For a goal at the edge of the feasible region λ is infinite. Newton's method stops when the gradient is below the
# tolerance; then the variance in some direction is nearly 0, while inside the region it is not.
EDGE = 1e-7
# Below this ratio of eigenvalues of the correlation matrix, features are linearly dependent in float64.
COLLINEAR = 1e-10


@dataclass(frozen=True)
class MomentFit:
    """Fitted coefficients λ [K], their covariance [K, K] (sandwich estimate) and the worst residual |E_λ[φ] − μ̄|."""

    coefficients: Tensor
    covariance: Tensor
    residual: float


def fit_moments(
    features: Tensor,
    log_weights: Tensor,
    goals: Sequence[float],
    names: Sequence[str],
    prompts: Tensor | None = None,
) -> MomentFit:
    """Find λ [K] with E_λ[φ] = ``goals`` on samples with values ``features`` [N, K] and ``log_weights`` [N].

    With ``prompts`` [N], any numbers, E_λ[φ] is the mean over prompts, with weights normalized within each; a prompt
    without a positive weight is left out. Raises FeatureError for non-finite values, UnreachableTargetError for what
    the samples cannot express: a feature without variation, a goal outside its range, goals that exclude each other,
    linearly dependent features.
    """
    if not bool(torch.isfinite(features).all()):
        column = int((~torch.isfinite(features)).any(0).nonzero()[0])
        raise FeatureError(f"feature '{names[column]}': a value is not finite, so its moment cannot be fitted")
    supported = torch.isfinite(log_weights)
    features, log_weights = features[supported].double(), log_weights[supported].double()
    strata = Strata.of(prompts[supported.to(prompts.device)] if prompts is not None else None, len(features))
    goal = torch.tensor(list(goals), dtype=torch.float64)
    _check_ranges(features, goal, names, strata)
    _check_collinear(_within(features, strata), names)
    return _newton(features, log_weights - strata.logsumexp(log_weights)[strata.index], goal, names, strata)


def _within(features: Tensor, strata: Strata) -> Tensor:
    """The features; with several prompts minus their mean over each prompt, as only the rest can be tilted."""
    return features if strata.count == 1 else features - strata.mean(features)[strata.index]


def _newton(features: Tensor, log_weights: Tensor, goal: Tensor, names: Sequence[str], strata: Strata) -> MomentFit:
    # Centred on the goal, the dual's gradient is E_λ[φ] itself.
    scale = _within(features, strata).std(0, correction=0)
    z = (features - goal) / scale
    coefficients = torch.zeros(len(goal), dtype=torch.float64)

    def dual(c: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        logits = log_weights + z @ c
        weights = strata.softmax(logits)
        gradient = weights @ z
        means = gradient[None] if strata.count == 1 else strata.sum(weights[:, None] * z) * strata.count
        hessian = (z * weights[:, None]).T @ z - means.T @ means / strata.count
        return float(strata.logsumexp(logits).mean()), gradient, hessian, means

    value, gradient, hessian, means = dual(coefficients)
    for _ in range(MAX_ITERATIONS):
        if float(gradient.abs().max()) < TOLERANCE:
            break
        ridge = 1e-14 * torch.eye(len(goal), dtype=torch.float64)
        step = torch.linalg.solve(hessian + ridge, -gradient)
        slope = float(gradient @ step)
        # A step that moves all weight onto few samples leaves no curvature for the next step.
        change = (z - means[strata.index]) @ step
        rate = MAX_GROWTH / max(MAX_GROWTH, float(change.max()))
        trial = dual(coefficients + rate * step)
        # Near the optimum the decrease is below rounding; then the full step is right.
        while trial[0] > value + 1e-4 * rate * slope + 1e-13 and rate > 1e-10:
            rate /= 2
            trial = dual(coefficients + rate * step)
        coefficients = coefficients + rate * step
        value, gradient, hessian, means = trial
        if rate <= 1e-10:
            break
    if not float(gradient.abs().max()) < TOLERANCE or _least_variance_ratio(_within(z, strata), hessian) < EDGE:
        raise _out_of_reach(features, goal, names)
    weights = strata.softmax(log_weights + z @ coefficients)
    noise = z if strata.count == 1 else z - means[strata.index]
    sandwich = (noise * weights[:, None]).T @ (noise * weights[:, None])
    inverse = torch.linalg.pinv(hessian)
    covariance = inverse @ sandwich @ inverse / scale[:, None] / scale[None, :]
    residual = float((gradient * scale).abs().max())
    return MomentFit(coefficients / scale, covariance, residual)


def _check_ranges(features: Tensor, goal: Tensor, names: Sequence[str], strata: Strata) -> None:
    n = features.shape[0]
    for name, values, wanted in zip(names, features.unbind(-1), goal.tolist(), strict=True):
        least, greatest = strata.extremes(values)
        if bool(least.min() == greatest.max()):
            level = float(least[0])
            raise UnreachableTargetError(
                f"feature '{name}': it was {level:g} in all {n} samples of the base, so no weighting of them can "
                f"change its moment to {wanted:g}. {rarity_advice(n) if level == 0 < wanted else ''}Or else leave it "
                f"out."
            )
        if bool((least == greatest).all()):
            raise UnreachableTargetError(
                f"feature '{name}': it was the same in all samples of each prompt, so no weighting of them can change "
                f"its moment to {wanted:g}. The base gave {n} samples for {strata.count} prompts: draw more for each "
                f"(target.samples, training.samples_per_prompt), or leave it out."
            )
        low, high = float(least.mean()), float(greatest.mean())
        if not low < wanted < high:
            averaged = ", averaged over prompts" if strata.count > 1 else ""
            raise UnreachableTargetError(
                f"feature '{name}': moment {wanted:g} is outside of what {n} samples of the base show{averaged}, "
                f"{low:g} to {high:g}. Choose a moment strictly between them"
                + (", or make it a filter (moment 1.0)." if (low, high) == (0.0, 1.0) else ", or draw more samples.")
            )


def rarity_advice(n: int) -> str:
    """The upper bound of a rate after n samples without a hit, and how many samples would show it."""
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


def _least_variance_ratio(z: Tensor, hessian: Tensor) -> float:
    """The smallest ratio, over all directions, of the variance under λ to that of the samples."""
    centred = z - z.mean(0)
    factor = torch.linalg.cholesky(centred.T @ centred / len(z))
    half = torch.linalg.solve_triangular(factor, hessian, upper=False)
    ratio = torch.linalg.solve_triangular(factor, half.T, upper=False)
    return float(torch.linalg.eigvalsh(ratio)[0])


def _out_of_reach(features: Tensor, goal: Tensor, names: Sequence[str]) -> UnreachableTargetError:
    """Goals within their ranges may still exclude each other, or leave hardly any effective sample."""
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
