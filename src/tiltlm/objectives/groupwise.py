"""BRAIn and VarGrad: distribution matching that compares the samples of a prompt with each other and needs no Z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.estimation import Strata
from tiltlm.objectives.groups import group_mean, group_size, group_sum
from tiltlm.objectives.objective import Objective
from tiltlm.objectives.record import Record, advantage_of


@dataclass(frozen=True)
class BRAIn(Objective):
    """c_i = n (w_i/Σw − r_i/Σr) over the n samples of a prompt, w = P/q and r = π/q (2402.02479).

    Both weights are normalized by the samples themselves: the bias is O(1/n), the variance lower than that of GDC++.
    A prompt whose samples all have P = 0 gets coefficients of 0.
    """

    name: ClassVar[str] = "brain"
    batchwise: ClassVar[bool] = True
    max_iterations: ClassVar[int | None] = 1

    @property
    def zero_without_advantage(self) -> bool:
        return True

    def advantages(self, record: Record) -> Tensor:
        """c [N]."""
        prompts = record.prompt_index
        target = _normalized(record.target_logscore - record.proposal_logprob, prompts)
        policy = _normalized(record.policy_logprob - record.proposal_logprob, prompts)
        has_hits = group_sum(target, prompts) > 0
        return torch.where(has_hits, group_size(target, prompts) * (target - policy), 0.0)

    def coefficients(self, record: Record) -> Tensor:
        """c [N], computed from the whole batch."""
        return advantage_of(record)


@dataclass(frozen=True)
class VarGrad(Objective):
    """c = 2 (f − mean of f over the prompt), f = log P − log π: trajectory balance, whose log Z is that mean.

    Minimizes the variance of f, which is 0 only at π = p, from samples of any distribution (Richter et al. 2020,
    2010.10436).
    """

    name: ClassVar[str] = "vargrad"
    batchwise: ClassVar[bool] = True
    max_iterations: ClassVar[int | None] = 1

    @property
    def zero_without_advantage(self) -> bool:
        return True

    @property
    def needs_full_support(self) -> str:
        """Why a target with P = 0 on some texts cannot be matched."""
        return "log P is −∞ on a text outside the target's support, and so is the variance that it minimizes"

    def advantages(self, record: Record) -> Tensor:
        """c [N]."""
        balance = record.target_logscore - record.policy_logprob
        return 2 * (balance - group_mean(balance, record.prompt_index))

    def coefficients(self, record: Record) -> Tensor:
        """c [N], computed from the whole batch."""
        return advantage_of(record)


def _normalized(log_weights: Tensor, groups: Tensor | None) -> Tensor:
    """Weights [N] that sum to 1 in each group; all 0 in a group without a positive weight."""
    strata = Strata.of(groups, len(log_weights))
    total = strata.logsumexp(log_weights)[strata.index]
    return torch.where(total > -torch.inf, (log_weights - total).exp(), 0.0)
