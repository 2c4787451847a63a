"""Divergences and moments of target and policy, estimated with standard errors from one weighted sample x ~ q.

All take rows [N] of one sample: ``target_logscore_N`` log P(x), unnormalized, −inf outside the target's support;
``proposal_logprob_N`` log q(x) of the proposal; ``policy_logprob_N`` log π(x); ``base_logprob_N`` log a(x). Rows
with P = 0 contribute 0. If no sample hits the target, means over p are nan ± nan. Values in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.means import UNKNOWN, effective_size, float64_rows, mean, standard_error, weighted_mean
from tiltlm.estimation.partition import log_partition
from tiltlm.estimation.weights import log_importance_weights, self_normalize


def moment_under_target(feature_N: Tensor, target_logscore_N: Tensor, proposal_logprob_N: Tensor) -> Estimate:
    """E_p[φ] by self-normalized importance weights P/q."""
    return weighted_mean(feature_N, self_normalize(log_importance_weights(target_logscore_N, proposal_logprob_N)))


def moment_under_policy(
    feature_N: Tensor, policy_logprob_N: Tensor | None = None, proposal_logprob_N: Tensor | None = None
) -> Estimate:
    """E_π[φ]: weighted by π/q, or the plain mean when the samples are the policy's own (give no log-probabilities)."""
    if policy_logprob_N is None and proposal_logprob_N is None:
        return mean(feature_N)
    if policy_logprob_N is None or proposal_logprob_N is None:
        raise UsageError("one of policy_logprob_N and proposal_logprob_N is missing; give both, or neither on-policy")
    # E_q[π/q] = 1 is known, but dividing by its estimate keeps a mean of 0/1 values within [0, 1] and cancels most of
    # the noise.
    return weighted_mean(feature_N, self_normalize(log_importance_weights(policy_logprob_N, proposal_logprob_N)))


def kl_from_target(
    target_logscore_N: Tensor,
    proposal_logprob_N: Tensor,
    reference_logprob_N: Tensor,
    log_z: Estimate | float | None = None,
) -> Estimate:
    """KL(p‖reference) = E_p[log P − log reference] − log Z, the reference being policy, proposal or base.

    Weights are self-normalized. ``log_z``: None takes it from this sample and lets the error carry both uncertainties
    with their correlation; an Estimate (a ``Partition``'s) adds its error as if independent; a float counts as exact.
    inf with error nan when the reference gives a hit probability 0.
    """
    log_weights = log_importance_weights(target_logscore_N, proposal_logprob_N)
    score, reference = float64_rows(target_logscore_N=target_logscore_N, reference_logprob_N=reference_logprob_N)
    weights = self_normalize(log_weights)
    z = _log_z(log_weights, log_z)
    if not bool(weights.any()) or not math.isfinite(z.value):
        return UNKNOWN
    gap = torch.where(weights > 0, score - reference, 0.0)
    over_target = (weights * gap).sum()
    value = float(over_target) - z.value
    if not math.isfinite(value):
        return Estimate(value, math.nan)
    relative = len(weights) * weights
    influence = relative * (gap - over_target)
    if log_z is None:
        return Estimate(value, standard_error(influence - (relative - 1), effective_size(weights)))
    return Estimate(value, math.hypot(standard_error(influence, effective_size(weights)), z.se))


def kl_difference(target_logscore_N: Tensor, proposal_logprob_N: Tensor, policy_logprob_N: Tensor) -> Estimate:
    """KL(p‖q) − KL(p‖π) = E_p[log π − log q], paired on the same samples, without Z; positive when π is closer."""
    weights = self_normalize(log_importance_weights(target_logscore_N, proposal_logprob_N))
    return weighted_mean(log_importance_weights(policy_logprob_N, proposal_logprob_N), weights)


def tv_from_target(
    target_logscore_N: Tensor,
    proposal_logprob_N: Tensor,
    reference_logprob_N: Tensor,
    log_z: Estimate | float | None = None,
) -> Estimate:
    """TV(p, reference) = ½ E_q|P/(Z q) − reference/q|, between 0 and 1 in expectation; ``log_z`` as in KL."""
    log_weights = log_importance_weights(target_logscore_N, proposal_logprob_N)
    ratio = log_importance_weights(reference_logprob_N, proposal_logprob_N).exp()
    return _total_variation(log_weights, log_z, [(1.0, ratio)])


def tv_difference(
    target_logscore_N: Tensor,
    proposal_logprob_N: Tensor,
    policy_logprob_N: Tensor,
    log_z: Estimate | float | None = None,
) -> Estimate:
    """TV(p, q) − TV(p, π), paired on the same samples; positive when π is closer to p."""
    log_weights = log_importance_weights(target_logscore_N, proposal_logprob_N)
    ratio = log_importance_weights(policy_logprob_N, proposal_logprob_N).exp()
    return _total_variation(log_weights, log_z, [(1.0, torch.ones_like(ratio)), (-1.0, ratio)])


def kl_policy_base(
    policy_logprob_N: Tensor,
    base_logprob_N: Tensor,
    proposal_logprob_N: Tensor | None = None,
    *,
    rao_blackwell_N: Tensor | None = None,
) -> Estimate:
    """KL(π‖a) = E_π[log π − log a]: a plain mean over the policy's own samples, else weighted by π/q.

    ``rao_blackwell_N``: per sequence Σ_t KL(π(·|x_<t)‖a(·|x_<t)), summed over the vocabulary; it takes the place of
    log π − log a, has the same mean and never more variance on-policy.
    """
    policy, base = float64_rows(policy_logprob_N=policy_logprob_N, base_logprob_N=base_logprob_N)
    values = torch.where(policy > -math.inf, policy - base, 0.0) if rao_blackwell_N is None else rao_blackwell_N
    return mean(values) if proposal_logprob_N is None else moment_under_policy(values, policy, proposal_logprob_N)


def _log_z(log_weights: Tensor, log_z: Estimate | float | None) -> Estimate:
    """The log Z to use and its error: given, given as exact, or this sample's own."""
    if log_z is None:
        return log_partition(log_weights)
    return log_z if isinstance(log_z, Estimate) else Estimate(float(log_z), 0.0)


def _total_variation(
    log_weights: Tensor, log_z: Estimate | float | None, terms: list[tuple[float, Tensor]]
) -> Estimate:
    """Σ sign · ½ E_q|w/Z − ratio| over terms (sign, ratio [N]), with the error that Z adds."""
    z = _log_z(log_weights, log_z)
    if not math.isfinite(z.value):
        return UNKNOWN
    relative = (log_weights - z.value).exp()
    values = torch.zeros_like(relative)
    slope = 0.0
    for sign, ratio in terms:
        values = values + sign * 0.5 * (relative - ratio).abs()
        # Minus the derivative of the value by log Z.
        slope += sign * 0.5 * float((torch.sign(relative - ratio) * relative).mean())
    value = values.mean()
    if log_z is None:
        return Estimate(float(value), standard_error(values - value - slope * (relative - 1)))
    return Estimate(float(value), math.hypot(standard_error(values - value), slope * z.se))
