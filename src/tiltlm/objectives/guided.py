"""Distillation of a guide's next-token distribution, with residual weights that make the gradient unbiased.

A guide has a value function ψ(x_≤t), its estimate of E_a[P/(Z a) | x_≤t], and the next-token distribution
g(v|x_<t) = a(v|x_<t) ψ(x_<t v) / E_t with E_t = Σ_v a(v|x_<t) ψ(x_<t v). Let ρ_t = (a/q)(x_<t) and δ_t = E_t − ψ(x_<t).
For any ψ, the gradient E_q[w ∇ log π(x)] with w = P/(Z q) is the mean over q of

    Σ_t D_t Σ_v g(v|x_<t) ∇ log π(v|x_<t)  +  Σ_t R_t ∇ log π(x_t|x_<t)

with any of these distillation weights D and residual weights R:

    D_t = 0               R_t = w                                        DPG
    D_t = 0               R_t = w − (π/q)(x)                             GDC++
    D_t = (g/q)(x_<t)     R_t = w − (g/q)(x)                             one residual per sequence
    D_t = ρ_t E_t         R_t = Σ_{s>t} ρ_s δ_s + w − (a/q)(x) ψ(x)      residuals of the later prefixes only

The variance of the second is small where π is near p, of the third where g is near p, of the last where ψ is near its
true value. Any combination with weights that sum to one at each position is unbiased. ``minimum_variance.py`` finds the
one with the least variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.objectives.objective import Estimators, Objective
from tiltlm.objectives.record import Record, guide_of, tokens_of
from tiltlm.objectives.settings import number

# The largest log-weight in nats: its square is still finite in float64.
MOST_NATS = 300.0


@dataclass(frozen=True)
class Guided(Objective):
    """c = κ R_t, beside a distillation of the guide's distribution g weighted by κ D_t + (1 − κ) (g/q)(x_<t).

    ``correction`` κ = 1 is unbiased for the gradient of KL(p‖π), κ = 0 for that of KL(g‖π), without sampling noise over
    tokens. D and R combine the estimators by the record's mixture weights, or are those of the last estimator.
    ``feedback`` moves the coefficients of the guide (not of the target) at each step by that share of the gap between
    the goals and the policy's moments, in units of the moments' variance.
    """

    name: ClassVar[str] = "guided"
    default_proposal: ClassVar[str] = "guided"
    distills: ClassVar[bool] = True
    correction: float = 1.0
    feedback: float = 0.0

    def __post_init__(self) -> None:
        number("correction", self.correction, 0, 1)
        number("feedback", self.feedback, 0, 1)

    @property
    def moment_feedback(self) -> float:
        return self.feedback

    def coefficients(self, record: Record) -> Tensor:
        """κ R_t [N, T]."""
        guide = guide_of(record)
        # Without a correction no weight is computed, so none can overflow.
        if not self.correction:
            return torch.zeros_like(guide.token_logprobs)
        return self.correction * combined(estimators(record).residual, guide.mixture_weights)

    def distillation_weights(self, record: Record) -> Tensor:
        """The weight of the distillation term at each token [N, T]."""
        guide = guide_of(record)
        of_guide = prefix_weights(guide.token_logprobs, tokens_of(record).proposal.to(guide.token_logprobs))
        if not self.correction:
            return of_guide
        unbiased = combined(estimators(record).distillation, guide.mixture_weights)
        return self.correction * unbiased + (1 - self.correction) * of_guide

    def token_loss(self, record: Record, coefficients: Tensor, policy: Tensor, guide: Tensor | None) -> Tensor:
        """The surrogate loss of each token [N, T], distillation included."""
        loss = super().token_loss(record, coefficients, policy, guide)
        return loss if guide is None else loss - self.distillation_weights(record).to(guide) * guide

    def estimators(self, record: Record) -> Estimators | None:
        """The four estimators, or None without a correction, when there is nothing to combine."""
        return estimators(record) if self.correction else None


@dataclass(frozen=True)
class KeptGuide(Guided):
    """The same for a policy that keeps its guide: π(v|x_<t) ∝ θ(v|x_<t) ψ(x_<t v), where θ are the tuned weights.

    It trains on the policy's own samples, each batch twice.
    """

    name: ClassVar[str] = "kept_guide"
    default_proposal: ClassVar[str] = "on_policy"
    keeps_guide: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 2


def combined(estimators: Tensor, mixture_weights: Tensor | None) -> Tensor:
    """Σ_k of estimators [K, N, T] by their weights [T, K] at each position; the last alone without weights."""
    if mixture_weights is None:
        return estimators[-1]
    return torch.einsum("knt,tk->nt", estimators, mixture_weights.to(estimators))


def estimators(record: Record) -> Estimators:
    """The four estimators, in the order of the table above."""
    guide, tokens = guide_of(record), tokens_of(record)
    logprobs = guide.token_logprobs
    base, proposal, mask = tokens.base.to(logprobs), tokens.proposal.to(logprobs), tokens.mask
    score = (record.target_logscore - record.log_z).to(logprobs)
    of_target = bounded_exp(score - proposal.sum(-1))[:, None]
    of_policy = bounded_exp((tokens.policy.to(logprobs) - proposal).sum(-1))[:, None]
    of_guide = bounded_exp((logprobs - proposal).sum(-1))[:, None]
    of_base = prefix_weights(base, proposal)
    expected = of_base * guide.log_expected.exp() * mask
    increments = expected - of_base * guide.log_values[:, :-1].exp() * mask
    later = increments.flip(-1).cumsum(-1).flip(-1) - increments
    # The difference comes first: it is 0 where ψ of the whole text is exact, however large the base's weight is.
    surplus = bounded_exp((base - proposal).sum(-1)) * ((score - base.sum(-1)).exp() - guide.log_values[:, -1].exp())
    zeros = torch.zeros_like(logprobs)
    distillation = [zeros, zeros, prefix_weights(logprobs, proposal), expected]
    residual = [of_target, of_target - of_policy, of_target - of_guide, later + surplus[:, None]]
    return Estimators(
        *(torch.stack([x.expand_as(logprobs) * mask for x in parts]) for parts in (distillation, residual))
    )


def prefix_weights(logprobs: Tensor, proposal: Tensor) -> Tensor:
    """(g/q)(x_<t) [N, T], the weight of the prefix before each token, from log-probabilities [N, T] under g and q."""
    log_ratio = logprobs - proposal
    # Shifted, not subtracted: after a token with g = 0 the weight is 0, and −inf − −inf is not a number.
    return bounded_exp(torch.nn.functional.pad(log_ratio.cumsum(-1)[..., :-1], (1, 0)))


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, bounded: an estimator near the bound gets no mixture weight, and 0 · ∞ must not arise."""
    return log_ratio.clamp_max(MOST_NATS).exp()
