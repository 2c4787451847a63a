"""The one idea: every method is a rule for how hard each sample pulls on the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Record:
    """What is known of N sampled sequences when their coefficients are computed; nothing here carries a gradient.

    All are log-probabilities in nats: of the policy π, the base a, the proposal q that drew the samples, and the
    target's unnormalized log P, each [N]; ``log_z`` is the current estimate of log Z, a number. The N sequences may be
    part of a batch, as many as fit in memory: a coefficient may depend on its own row and ``log_z`` alone.
    ``guide_logprob`` [N] is there where a guide g is distilled.
    """

    policy_logprob: Tensor
    base_logprob: Tensor
    proposal_logprob: Tensor
    target_logscore: Tensor
    log_z: float
    guide_logprob: Tensor | None = None


@runtime_checkable
class Objective(Protocol):
    """A rule for the coefficient c_i in   gradient = Σ_i c_i ∇ log π(x_i),   x_i ~ q."""

    @property
    def name(self) -> str:
        """How reports call it."""

    def coefficients(self, record: Record) -> Tensor:
        """One coefficient per sequence [N], or per token [N, T]; positive pulls the policy towards the sample."""
