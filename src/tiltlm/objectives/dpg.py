"""DPG, GDC and GDC++: minimize KL(p‖π) from weighted samples of a proposal.

∇ KL(p‖π) = −E_p[∇ log π] = −E_q[P/(Z q) ∇ log π]. Since E_q[(π/q) ∇ log π] = 0, any multiple of π/q may be subtracted
from the weight. GDC++ subtracts exactly π/q, so the coefficient is 0 at π = p (2206.00761, §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tiltlm.objectives.objective import Objective
from tiltlm.objectives.record import Record


def target_weight(record: Record) -> Tensor:
    """w = P/(Z q) [N], exponentiated once, from logs."""
    return (record.target_logscore - record.log_z - record.proposal_logprob).exp()


def policy_weight(record: Record) -> Tensor:
    """r = π/q [N]; 1 when the proposal is the policy itself."""
    return (record.policy_logprob - record.proposal_logprob).exp()


@dataclass(frozen=True)
class DPG(Objective):
    """c = P/(Z q): distributional policy gradient (Parshakova et al. 2019), on-policy in the original."""

    name: ClassVar[str] = "dpg"
    zero_outside_support: ClassVar[bool] = True

    def coefficients(self, record: Record) -> Tensor:
        """P/(Z q) [N]."""
        return target_weight(record)


@dataclass(frozen=True)
class GDC(DPG):
    """c = P/(Z q), with a proposal that follows the policy once the policy is closer to the target (2012.11635)."""

    name: ClassVar[str] = "gdc"
    default_proposal: ClassVar[str] = "kl"


@dataclass(frozen=True)
class GDCPlusPlus(Objective):
    """c = P/(Z q) − π/q: GDC with the baseline of the paper, unbiased on-policy and off-policy (2206.00761, eq. 14)."""

    name: ClassVar[str] = "gdc++"

    def coefficients(self, record: Record) -> Tensor:
        """P/(Z q) − π/q [N]; on-policy P/(Z π) − 1."""
        return target_weight(record) - policy_weight(record)
