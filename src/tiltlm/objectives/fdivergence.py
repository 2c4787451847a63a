"""f-DPG and α-DPG: minimize other divergences from samples of a proposal.

D_f(π‖p) = E_p[f(t)] with t = π/p has the gradient E_π[f′(t) ∇ log π]. So c = (−f′(t) − B) π/q. With B = −f′(1) the
coefficient is 0 at π = p (Go et al. 2023, 2302.08215). Ratios are computed from logs. Where P = 0 their limit is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tiltlm.objectives.dpg import policy_weight, target_weight
from tiltlm.objectives.objective import Objective
from tiltlm.objectives.record import Record
from tiltlm.objectives.settings import choice, number

UNBOUNDED = "its coefficient is infinite on a text outside the target's support"


def log_ratio(record: Record) -> Tensor:
    """log t = log π + log Z − log P [N]; +∞ where P = 0."""
    return record.policy_logprob + record.log_z - record.target_logscore


def _kl(record: Record) -> Tensor:
    return target_weight(record) - policy_weight(record)


def _reverse_kl(record: Record) -> Tensor:
    return -log_ratio(record) * policy_weight(record)


def _js(record: Record) -> Tensor:
    # −log(2t/(t + 1)) = log(1 + 1/t) − log 2
    return (softplus(-log_ratio(record)) - math.log(2)) * policy_weight(record)


def _tv(record: Record) -> Tensor:
    return -0.5 * log_ratio(record).sign() * policy_weight(record)


def _chi2(record: Record) -> Tensor:
    # f = (1 − t)²/t, f′ = 1 − 1/t², and π/(q t²) = w²/r
    log_weight = record.target_logscore - record.log_z - record.proposal_logprob
    return (2 * log_weight - (record.policy_logprob - record.proposal_logprob)).exp() - policy_weight(record)


def _reverse_chi2(record: Record) -> Tensor:
    # f = (t − 1)², f′ = 2 (t − 1)
    return -2 * torch.expm1(log_ratio(record)) * policy_weight(record)


DIVERGENCES: dict[str, Callable[[Record], Tensor]] = {
    "kl": _kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "tv": _tv,
    "chi2": _chi2,
    "reverse_chi2": _reverse_chi2,
}


@dataclass(frozen=True)
class FDPG(Objective):
    """c = (−f′(t) + f′(1)) π/q for a ``divergence``.

    ``kl`` KL(p‖π), which is GDC++; ``reverse_kl`` KL(π‖p); ``js`` twice the Jensen–Shannon divergence; ``tv`` total
    variation; ``chi2`` χ²(p‖π) = Σ (p − π)²/π; ``reverse_chi2`` χ²(π‖p).
    """

    name: ClassVar[str] = "f_dpg"
    divergence: str = "js"

    def __post_init__(self) -> None:
        choice("divergence", self.divergence, list(DIVERGENCES))

    @property
    def needs_full_support(self) -> str | None:
        """Why this divergence cannot match a target with P = 0 on some texts; None where it can."""
        infinite = self.divergence in ("reverse_kl", "reverse_chi2")
        return f"with divergence {self.divergence} {UNBOUNDED}; choose kl, js, tv or chi2" if infinite else None

    def coefficients(self, record: Record) -> Tensor:
        """The coefficient of the divergence [N]."""
        return DIVERGENCES[self.divergence](record)


@dataclass(frozen=True)
class AlphaDPG(Objective):
    """c = (t^(α−1) − 1)/(1 − α) · π/q (2512.05962): from GDC++ at ``alpha`` 0 to reverse KL, −log t, at 1.

    ``clip`` is an upper bound of the pseudo-reward (t^(α−1) − 1)/(1 − α); null: none.
    """

    name: ClassVar[str] = "alpha_dpg"
    alpha: float = 0.5
    clip: float | None = None

    def __post_init__(self) -> None:
        number("alpha", self.alpha, 0, 1)
        if self.clip is not None:
            number("clip", self.clip, 0)

    @property
    def needs_full_support(self) -> str | None:
        """Why this divergence cannot match a target with P = 0 on some texts; None where it can."""
        return f"with alpha 1 {UNBOUNDED}; choose an alpha below 1" if self.alpha == 1 else None

    def coefficients(self, record: Record) -> Tensor:
        """The coefficient [N]."""
        ratio, left = policy_weight(record), 1 - self.alpha
        log_t = log_ratio(record)
        if self.clip is not None:
            reward = -log_t if left == 0 else torch.expm1(-left * log_t) / left
            return reward.clamp_max(self.clip) * ratio
        if left == 0:
            return -log_t * ratio
        # Where t is small, t^(α−1) π/q = p^(1−α) π^α / q is finite even if neither factor is.
        weight = left * (record.target_logscore - record.log_z) - record.proposal_logprob
        weight = weight + self.alpha * record.policy_logprob if self.alpha else weight
        near = torch.expm1(-left * log_t) * ratio
        return torch.where(log_t < -1 / left, weight.exp() - ratio, near) / left
