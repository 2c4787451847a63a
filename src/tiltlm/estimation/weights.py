"""Importance weights in logarithms: self-normalization, effective sample size, and the Pareto k̂ of their tail."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.means import effective_size, float64_rows, standard_error

FEWEST_TAIL_WEIGHTS = 5


def log_importance_weights(target_logscore_N: Tensor, proposal_logprob_N: Tensor) -> Tensor:
    """log w = log P(x) − log q(x), float64 [N]; −inf where the target's score is 0.

    The same function gives log(π/q) when the policy's log-probabilities stand in for the scores. Raises NumericalError
    for a sample that its own proposal gives probability 0, and for a score of +inf.
    """
    score, proposal = float64_rows(target_logscore_N=target_logscore_N, proposal_logprob_N=proposal_logprob_N)
    for name, row, wrong in (
        ("proposal_logprob_N", proposal, proposal.isinf()),
        ("target_logscore_N", score, score == math.inf),
    ):
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise NumericalError(
                f"{name} is {float(row[at])} in row {at}; score with the distribution that drew the samples"
            )
    return score - proposal


def checked_log_weights(log_weights_N: Tensor) -> Tensor:
    """The log-weights as float64 [N] on the CPU; raises NumericalError for NaN and +inf, UsageError for a shape."""
    (log_weights,) = float64_rows(log_weights_N=log_weights_N)
    if bool((log_weights == math.inf).any()):
        at = int((log_weights == math.inf).nonzero()[0])
        raise NumericalError(f"log_weights_N is inf in row {at}; score with the distribution that drew the samples")
    return log_weights


def self_normalize(log_weights_N: Tensor) -> Tensor:
    """Weights [N], float64, that sum to 1; all zeros when no sample hits the target (every log-weight is −inf)."""
    log_weights = checked_log_weights(log_weights_N)
    return torch.zeros_like(log_weights) if no_hit(log_weights) else log_weights.softmax(0)


def no_hit(log_weights_N: Tensor) -> bool:
    """Whether every sample has weight 0: then Z is small, and nothing else is known of p."""
    return bool((log_weights_N == -math.inf).all())


def effective_sample_size(log_weights_N: Tensor) -> Estimate:
    """(Σw)²/Σw², in samples (Kong 1992), with the delta method's error; value 0 and error nan when no sample hits."""
    weights = self_normalize(log_weights_N)
    n = len(weights)
    size = effective_size(weights)
    if size == 0:
        return Estimate(0.0, math.nan)
    # With v = n·w̄ (mean 1): ESS = n·(mean v)²/mean v², so its influence is ESS·(2(v − 1) − (v²/mean v² − 1)).
    v = n * weights
    influence = size * (2 * (v - 1) - (v.square() / v.square().mean() - 1))
    return Estimate(size, standard_error(influence))


def pareto_k(log_weights_N: Tensor) -> float:
    """Shape k̂ of the generalized Pareto tail of the non-zero weights; compare it with ``pareto_k_threshold``.

    Below the threshold, estimates with these weights are reliable; above 0.7 no practical sample size is enough. Zero
    weights are left out: an atom at 0 does not change the tail. inf with fewer than 21 hits, which have no tail to fit.
    nan if the largest weights are all equal, as for a binary target with proposals from the base: such weights are
    bounded, and the number of hits decides instead.
    Source: Vehtari et al. 2024, Pareto smoothed importance sampling, with the fit of Zhang & Stephens 2009.
    """
    log_weights = checked_log_weights(log_weights_N)
    hits = log_weights[log_weights > -math.inf].sort().values
    n = len(hits)
    tail = math.ceil(min(0.2 * n, 3 * math.sqrt(n)))
    if tail < FEWEST_TAIL_WEIGHTS:
        return math.inf
    # Logarithms of equal weights differ by rounding.
    if float(hits[-1] - hits[-tail]) < 1e-9:
        return math.nan
    largest = (hits[-tail - 1 :] - hits[-1]).exp()
    excesses = largest[1:] - largest[0]
    # Ties at the cut are not beyond it, and weights that underflow have no logarithm.
    excesses = excesses[excesses > 1e-300]
    return _generalized_pareto_shape(excesses) if len(excesses) >= FEWEST_TAIL_WEIGHTS else math.nan


def _generalized_pareto_shape(excesses: Tensor) -> float:
    """Posterior mean of the shape from ascending excesses over a threshold (Zhang & Stephens 2009, equations 5 to 8).

    Their profile likelihood in b = −k/σ is averaged over a grid with their data-dependent prior; then Vehtari et al.'s
    weak prior shrinks the shape toward 0.5 with the weight of ten observations.
    """
    n = len(excesses)
    points = 30 + math.isqrt(n)
    steps = torch.arange(1, points + 1, dtype=torch.float64) - 0.5
    first_quartile = excesses[int(n / 4 + 0.5) - 1]
    b = 1 / excesses[-1] + (1 - (points / steps).sqrt()) / (3 * first_quartile)
    shape = torch.log1p(-b[:, None] * excesses).mean(1)
    log_likelihood = n * ((-b / shape).log() - shape - 1)
    b_mean = (log_likelihood.softmax(0) * b).sum()
    fitted = float(torch.log1p(-b_mean * excesses).mean())
    return (n * fitted + 10 * 0.5) / (n + 10)


def pareto_k_threshold(samples: int) -> float:
    """Largest k̂ at which ``samples`` (the non-zero weights) suffice: min(1 − 1/log10 n, 0.7) (Vehtari et al. 2024)."""
    return min(1 - 1 / math.log10(samples), 0.7) if samples > 1 else -math.inf
