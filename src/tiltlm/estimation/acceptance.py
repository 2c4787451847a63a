"""KL and TV from p to the distribution of a sampler's texts, and its acceptance rate, from a sample of its proposal q.

All functions take ``log_weights_N``, log w = log P(x) − log q(x) [N] of draws x ~ q, −inf where P = 0. The distribution
r of the texts differs from p by a function of w alone, so KL(p‖r) and TV(p, r) follow from the weights. Given
``probabilities_N``, the probabilities q(x) [N] of all x, the formulas are exact, with error 0. Otherwise standard
errors come from a jackknife over groups of draws. KL is in nats; both are nan ± nan where no draw has P > 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.means import float64_rows
from tiltlm.estimation.weights import checked_log_weights, no_hit

JACKKNIFE_GROUPS = 50
BISECTIONS = 60
# The trapezoidal rule in u = log t integrates exp(−ct) over t to exp(−π²/step) of itself, whatever c is.
STEP = 0.25
NEGLIGIBLE_NATS = 40.0
# In units of the largest weight; smaller weights have no visible part of p.
SMALLEST_WEIGHT = 1e-12

# A distribution r, given the probabilities [N] of the rows: its density r/p [N], and its mass where P = 0.
Density = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Closeness:
    """KL(p‖r) in nats and TV(p, r) of a distribution r."""

    kl: Estimate
    tv: Estimate


def proposal_closeness(log_weights_N: Tensor, probabilities_N: Tensor | None = None) -> Closeness:
    """The closeness of q itself: all draws are accepted."""

    def density_of(weights: Tensor) -> Density:
        return lambda probabilities: ((probabilities @ weights) / weights, probabilities[weights == 0].sum())

    return _closeness(log_weights_N, probabilities_N, density_of)


def acceptance_rate(log_weights_N: Tensor, log_beta: float, probabilities_N: Tensor | None = None) -> Estimate:
    """E_q[min(1, w/β)]: the acceptance rate of (quasi-)rejection with the bound β."""
    accepted = (checked_log_weights(log_weights_N) - log_beta).clamp_max(0).exp()
    return _estimates(len(accepted), probabilities_N, lambda probabilities: [probabilities @ accepted])[0]


def accepted_closeness(log_weights_N: Tensor, log_beta: float, probabilities_N: Tensor | None = None) -> Closeness:
    """The closeness of p_β ∝ min(P, βq): draws accepted with probability min(1, w/β). p_β is p if β ≥ max w.

    Source: quasi-rejection sampling, Eikema et al. 2022 (arXiv 2112.05702).
    """
    most = float(checked_log_weights(log_weights_N).max())

    def density_of(weights: Tensor) -> Density:
        beta = math.exp(min(log_beta - most, 0.0))
        cut = weights.clamp_max(beta)
        kept = torch.where(weights > 0, cut / weights, 0.0)
        return lambda probabilities: (kept * (probabilities @ weights) / (probabilities @ cut), torch.zeros(()))

    return _closeness(log_weights_N, probabilities_N, density_of)


def resampled_closeness(log_weights_N: Tensor, pool: int, probabilities_N: Tensor | None = None) -> Closeness:
    """The closeness of one of ``pool`` draws, chosen in proportion to its weight; pools with Σ w = 0 are discarded.

    For a pool of M the density r/p is M Z E[1/(w(x) + S)] / (1 − q(P = 0)^M), where S is the sum of M − 1 further
    weights, and E[1/(w + S)] = ∫ exp(−tw) L(t)^(M−1) dt with L(t) = E_q[exp(−tw)].
    """
    if pool < 1:
        raise UsageError(f"pool: {pool} must be at least 1")

    def density_of(weights: Tensor) -> Density:
        low, high = -NEGLIGIBLE_NATS - math.log(pool), math.log(NEGLIGIBLE_NATS / SMALLEST_WEIGHT)
        log_t = torch.arange(low, high, STEP, dtype=torch.float64)
        hits = weights > 0
        decay = (-log_t.exp()[:, None] * weights.clamp_min(SMALLEST_WEIGHT)).exp()

        def density(probabilities: Tensor) -> tuple[Tensor, Tensor]:
            missed = probabilities[~hits].sum()
            laplace = missed + decay[:, hits] @ probabilities[hits]
            mass = (log_t + torch.special.xlogy(pool - 1, laplace)).exp() * STEP
            return pool * (probabilities @ weights) * (mass @ decay) / (1 - missed**pool), torch.zeros(())

        return density

    return _closeness(log_weights_N, probabilities_N, density_of)


def chain_closeness(log_weights_N: Tensor, steps: int, probabilities_N: Tensor | None = None) -> Closeness:
    """The closeness of an independent Metropolis–Hastings chain after ``steps`` draws; it starts at one with P > 0.

    With w in units of Z and λ(v) = E_q[(1 − w/v)⁺], the probability to stay where w = v, the density r/p after n steps
    is E[T(max(w(x), w(y)))] + λ(w(x))^n / (w(x) q(P > 0)), y ~ q where P > 0, with T(v) = ∫_v^∞ n λ(u)^(n−1) u⁻² du.
    Source: Smith & Tierney 1996, Exact transition probabilities for the independence Metropolis sampler.
    """
    if steps < 0:
        raise UsageError(f"steps: {steps} must be at least 0")

    def density_of(weights: Tensor) -> Density:
        ordered, order = weights.sort()
        first = int((ordered == 0).sum())
        back = order.argsort()

        def density(probabilities: Tensor) -> tuple[Tensor, Tensor]:
            probability = probabilities[order]
            missed = probability[:first].sum()
            upto, w, weight_upto, stay = _staying(ordered, probability, first)
            left = torch.cat([upto[:-1] - weight_upto[:-1] / w[1:], torch.ones(1, dtype=w.dtype)])
            # Between two neighbouring weights λ is A − B/u, and the integral a difference of powers of it.
            pieces = torch.where(weight_upto > 0, (left**steps - stay**steps) / weight_upto.clamp_min(1e-300), 0.0)
            t = pieces.flip(0).cumsum(0).flip(0)
            above = (probability[first:] * t).flip(0).cumsum(0).flip(0) - probability[first:] * t
            found = ((upto - missed) * t + above + stay**steps / w) / (1 - missed)
            return torch.cat([torch.zeros(first, dtype=w.dtype), found])[back], torch.zeros(())

        return density

    return _closeness(log_weights_N, probabilities_N, density_of)


def chain_acceptance(log_weights_N: Tensor, probabilities_N: Tensor | None = None) -> Estimate:
    """E[min(1, w(y)/w(x))], x ~ p and y ~ q: the acceptance rate of a converged chain."""
    ordered, order = _relative(log_weights_N).sort()

    def moves(probabilities: Tensor) -> list[Tensor]:
        probability = probabilities[order]
        above = probability.flip(0).cumsum(0).flip(0) - probability
        return [(probability * ordered * (probability + 2 * above)).sum() / (probability @ ordered)]

    return _estimates(len(ordered), probabilities_N, moves)[0]


def chain_repeats(log_weights_N: Tensor, steps: int, probabilities_N: Tensor | None = None) -> Estimate:
    """E_p[λ^steps]: the probability that a converged chain has the same text after ``steps`` draws."""
    ordered, order = _relative(log_weights_N).sort()
    first = int((ordered == 0).sum())

    def repeats(probabilities: Tensor) -> list[Tensor]:
        probability = probabilities[order]
        _, w, _, stay = _staying(ordered, probability, first)
        return [(probability[first:] * w * stay**steps).sum()]

    return _estimates(len(ordered), probabilities_N, repeats)[0]


def log_beta_for_acceptance(log_weights: Sequence[Tensor], acceptance: float) -> float:
    """The largest log β with this acceptance rate, on average over prompts, each with its log-weights [N].

    At most the largest log-weight, from which on p_β is p on these rows. Raises UsageError where the rate is above that
    of β → 0, which accepts all of the support.
    """
    rows = [checked_log_weights(weights) for weights in log_weights]
    support = sum(float((weights > -math.inf).double().mean()) for weights in rows) / len(rows)
    if not 0 < acceptance <= support:
        raise UsageError(
            f"acceptance: {acceptance:g} cannot be reached: {support:.3g} of the draws lie in the target's support; "
            f"ask for less"
        )
    return _bisected(rows, lambda log_beta: _mean_acceptance(rows, log_beta) < acceptance, largest=True)


def log_beta_for_kl(log_weights: Sequence[Tensor], kl: float) -> float:
    """The smallest log β at which KL(p‖p_β) is at most ``kl`` nats, on average over prompts."""
    rows = [checked_log_weights(weights) for weights in log_weights]
    rows = [weights for weights in rows if not no_hit(weights)]

    def near(log_beta: float) -> bool:
        return sum(_accepted_kl(weights, log_beta) for weights in rows) <= kl * len(rows)

    return _bisected(rows, near)


def _bisected(rows: Sequence[Tensor], holds: Callable[[float], bool], *, largest: bool = False) -> float:
    """The smallest log β at which ``holds`` is true, or the ``largest`` at which it is false, within the weights."""
    hits = torch.cat([weights[weights > -math.inf] for weights in rows])
    low, high = float(hits.min()), float(hits.max())
    if holds(low) or low == high:
        return low
    if not holds(high):
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return low if largest else high


def _mean_acceptance(rows: Sequence[Tensor], log_beta: float) -> float:
    return sum(float((weights - log_beta).clamp_max(0).exp().mean()) for weights in rows) / len(rows)


def _accepted_kl(log_weights: Tensor, log_beta: float) -> float:
    """KL(p‖p_β) = E_p[log max(1, w/β)] + log Z_β − log Z, for rows of equal probability."""
    cut = log_weights.clamp_max(log_beta)
    excess = (log_weights - log_beta).clamp_min(0)
    return float(log_weights.softmax(0) @ excess + cut.logsumexp(0) - log_weights.logsumexp(0))


def _relative(log_weights_N: Tensor) -> Tensor:
    """Weights [N] in units of the largest; zeros where no row has P > 0."""
    log_weights = checked_log_weights(log_weights_N)
    return torch.zeros_like(log_weights) if no_hit(log_weights) else (log_weights - log_weights.max()).exp()


def _staying(ordered: Tensor, probability: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For the ascending weights above 0, from index ``first``: cumulative q, w in units of Z, cumulative E_q[w], and
    the probability λ that a chain stays there."""
    w = ordered[first:] / (probability @ ordered)
    upto, weight_upto = probability.cumsum(0)[first:], (probability[first:] * w).cumsum(0)
    return upto, w, weight_upto, (upto - weight_upto / w).clamp(0, 1)


def _closeness(
    log_weights_N: Tensor, probabilities_N: Tensor | None, density_of: Callable[[Tensor], Density]
) -> Closeness:
    """KL(p‖r) = −E_p[log r/p] and TV(p, r) = ½ (E_p|1 − r/p| + the mass of r where P = 0)."""
    weights = _relative(log_weights_N)
    density_at = density_of(weights)

    def distances(probabilities: Tensor) -> list[Tensor]:
        p = probabilities * weights / (probabilities @ weights)
        density, outside = density_at(probabilities)
        relevant = torch.where(p > 0, density, 1.0)
        return [-(p @ relevant.log()), 0.5 * (p @ (1 - relevant).abs() + outside)]

    kl, tv = _estimates(len(weights), probabilities_N, distances)
    return Closeness(kl, tv)


def _estimates(n: int, probabilities_N: Tensor | None, statistics: Callable[[Tensor], list[Tensor]]) -> list[Estimate]:
    """Functions of the rows' probabilities: exact at ``probabilities_N``, else at equal ones with jackknife errors."""
    if probabilities_N is not None:
        (probabilities,) = float64_rows(probabilities_N=probabilities_N)
        return [Estimate(float(value), 0.0) for value in statistics(probabilities)]
    values = torch.stack(statistics(torch.full((n,), 1 / n, dtype=torch.float64)))
    groups = min(n, JACKKNIFE_GROUPS)
    if groups < 2:
        return [Estimate(float(value), math.nan) for value in values]
    group = torch.arange(n) % groups
    without = []
    for left_out in range(groups):
        kept = (group != left_out).double()
        without.append(torch.stack(statistics(kept / kept.sum())))
    deviation = torch.stack(without) - torch.stack(without).mean(0)
    errors = ((groups - 1) / groups * deviation.square().sum(0)).sqrt()
    return [Estimate(float(value), float(error)) for value, error in zip(values, errors, strict=True)]
