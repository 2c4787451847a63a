"""BRAIn and VarGrad: distribution matching that compares the samples of a prompt with each other, and needs no Z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.estimation import Strata
from tiltlm.objectives.groups import group_mean, group_size, group_sum
from tiltlm.objectives.objective import Record, advantage_of


@dataclass(frozen=True)
class BRAIn:
    """c_i = n (w_i/Σw − r_i/Σr) over the n samples of a prompt, w = P/q and r = π/q (2402.02479).

    Both weights are normalized by the samples themselves: biased as 1/n, and steadier than GDC++. A prompt whose
    samples all have P = 0 says nothing, and does not pull.
    """

    name: str = "brain"
    most_iterations: ClassVar[int] = 1

    def advantages(self, record: Record) -> Tensor:
        """c [N]."""
        prompts = record.prompt_index
        wanted = _normalized(record.target_logscore - record.proposal_logprob, prompts)
        present = _normalized(record.policy_logprob - record.proposal_logprob, prompts)
        hit = group_sum(wanted, prompts) > 0
        return torch.where(hit, group_size(wanted, prompts) * (wanted - present), 0.0)

    def coefficients(self, record: Record) -> Tensor:
        """c [N], as the whole batch gave it."""
        return advantage_of(record)


@dataclass(frozen=True)
class VarGrad:
    """c = 2 (f − mean of f over the prompt), f = log P − log π: trajectory balance, whose log Z is that mean.

    Minimizes the variance of f, which is 0 only at π = p, from samples of any law (Richter et al. 2020, 2010.10436).
    """

    name: str = "vargrad"
    most_iterations: ClassVar[int] = 1

    @property
    def needs_full_support(self) -> str:
        """Why a target with filters cannot be had."""
        return "log P is −∞ on a text that the target rules out, and so is the variance that it minimizes"

    def advantages(self, record: Record) -> Tensor:
        """c [N]."""
        balance = record.target_logscore - record.policy_logprob
        return 2 * (balance - group_mean(balance, record.prompt_index))

    def coefficients(self, record: Record) -> Tensor:
        """c [N], as the whole batch gave it."""
        return advantage_of(record)


def _normalized(log_weights: Tensor, groups: Tensor | None) -> Tensor:
    """Weights [N] that sum to 1 in each group, or are all 0 where none is above."""
    strata = Strata.of(groups, len(log_weights))
    total = strata.logsumexp(log_weights)[strata.index]
    return torch.where(total > -torch.inf, (log_weights - total).exp(), 0.0)
