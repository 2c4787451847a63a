"""DPG, GDC and GDC++: minimize KL(p‖π) from samples of a proposal, weighted by importance.

∇ KL(p‖π) = −E_p[∇ log π] = −E_q[P/(Z q) ∇ log π]. Since E_q[(π/q) ∇ log π] = 0, any multiple of π/q may be taken off
the weight; GDC++ takes off exactly that, which is zero pull at π = p (2206.00761, §3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.objectives.objective import Record


def target_weight(record: Record) -> Tensor:
    """w = P/(Z q) [N], exponentiated once, from logs."""
    return (record.target_logscore - record.log_z - record.proposal_logprob).exp()


def policy_weight(record: Record) -> Tensor:
    """r = π/q [N]; 1 when the proposal is the policy itself."""
    return (record.policy_logprob - record.proposal_logprob).exp()


@dataclass(frozen=True)
class DPG:
    """c = P/(Z q): distributional policy gradient (Parshakova et al. 2019), on-policy in the original."""

    name: str = "dpg"

    def coefficients(self, record: Record) -> Tensor:
        """P/(Z q) [N]."""
        return target_weight(record)


@dataclass(frozen=True)
class GDC(DPG):
    """c = P/(Z q), with a proposal that follows the policy when that is closer to the target (2012.11635)."""

    name: str = "gdc"


@dataclass(frozen=True)
class GDCPlusPlus:
    """c = P/(Z q) − π/q: GDC with the baseline of the paper, unbiased on-policy and off-policy (2206.00761, eq. 14)."""

    name: str = "gdc++"

    def coefficients(self, record: Record) -> Tensor:
        """P/(Z q) − π/q [N]; on-policy P/(Z π) − 1."""
        return target_weight(record) - policy_weight(record)
