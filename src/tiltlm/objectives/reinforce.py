"""REINFORCE, KL control and RLOO: maximize a reward, with a penalty on log π − log a.

∇ E_π[R] = E_π[(R(x) − B) ∇ log π(x)] for any baseline B that does not depend on x. With R = r − β (log π − log a) the
maximum is p ∝ a exp(r/β), and the gradient is −β ∇ KL(π‖p) (2206.00761, theorem 1). The reward of a record is the
target's: 1 where all filters hold, plus Σ λφ over its moments and rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.objectives.dpg import policy_weight
from tiltlm.objectives.groups import BASELINES, Baseline, baseline, others_mean
from tiltlm.objectives.objective import Objective
from tiltlm.objectives.record import Record, advantage_of, reward_of
from tiltlm.objectives.settings import above_zero, choice, number


@dataclass(frozen=True)
class Reinforce(Objective):
    """c = (r − B) π/q (Williams 1992). ``baseline`` B: ``none``, the batch's ``mean``, or ``leave_one_out``.

    The mean holds the sample itself, which shortens the expected gradient by 1 − 1/N; leave-one-out does not.
    """

    name: ClassVar[str] = "reinforce"
    batchwise: ClassVar[bool] = True
    maximizes_reward: ClassVar[bool] = True
    baseline: Baseline = "mean"

    def __post_init__(self) -> None:
        choice("baseline", self.baseline, BASELINES)

    @property
    def zero_without_advantage(self) -> bool:
        return True

    @property
    def advantages_read_base(self) -> bool:
        return False

    def rewards(self, record: Record) -> Tensor:
        """The reward that is maximized [N]."""
        return reward_of(record).double()

    def advantages(self, record: Record) -> Tensor:
        """R − B [N]."""
        rewards = self.rewards(record)
        return rewards - baseline(self.baseline, rewards)

    def coefficients(self, record: Record) -> Tensor:
        """(R − B) π/q [N]; π/q is 1 when the batch is the policy's own and fresh."""
        return advantage_of(record) * policy_weight(record)


@dataclass(frozen=True)
class ReinforceP(Reinforce):
    """REINFORCE with P(x) itself as the reward, the paper's degenerate baseline (2206.00761, §2.2).

    Its optimum is the single likeliest text of p. P of forty tokens is about e^−140, so P is divided by the batch's
    largest.
    """

    name: ClassVar[str] = "reinforce_p"
    maximizes_reward: ClassVar[bool] = False

    @property
    def advantages_read_base(self) -> bool:
        return True

    def rewards(self, record: Record) -> Tensor:
        score = record.target_logscore.double()
        largest = float(score.max())
        return (score - largest).exp() if largest > -math.inf else torch.zeros_like(score)


@dataclass(frozen=True)
class KLControl(Reinforce):
    """c = (r − β (log π − log a) − B) π/q: REINFORCE with a KL penalty (Jaques et al. 2017).

    With ``target_kl`` the penalty adapts after each batch: β ← β (1 + clip(KL/target_kl − 1, ±0.2) N/horizon), which
    holds KL(π‖a) near ``target_kl`` nats (Ziegler et al. 2019, 1909.08593).
    """

    name: ClassVar[str] = "kl_control"
    adaptive_field: ClassVar[str | None] = "beta"
    baseline: Baseline = "leave_one_out"
    beta: float = 0.2
    target_kl: float | None = None
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, 0)
        check_adaptive(self.target_kl, self.horizon)

    @property
    def advantages_read_base(self) -> bool:
        return self.beta != 0

    def rewards(self, record: Record) -> Tensor:
        return penalized_reward(record, self.beta)

    def adapted(self, record: Record) -> KLControl:
        """The objective with the penalty for the next batch."""
        return replace(self, beta=adapted_beta(self.beta, self.target_kl, self.horizon, record))


@dataclass(frozen=True)
class RLOO(Objective):
    """c = (R_i − mean of the prompt's other samples) π/q with R = r − β (log π − log a) (Ahmadian et al. 2024).

    With two samples of a prompt the advantages are R_1 − R_2 and R_2 − R_1.
    """

    name: ClassVar[str] = "rloo"
    batchwise: ClassVar[bool] = True
    maximizes_reward: ClassVar[bool] = True
    beta: float = 0.05

    def __post_init__(self) -> None:
        number("beta", self.beta, 0)

    @property
    def zero_without_advantage(self) -> bool:
        return True

    @property
    def advantages_read_base(self) -> bool:
        return self.beta != 0

    def advantages(self, record: Record) -> Tensor:
        """R − B [N], compared within each prompt."""
        rewards = penalized_reward(record, self.beta)
        return rewards - others_mean(rewards, record.prompt_index)

    def coefficients(self, record: Record) -> Tensor:
        """(R − B) π/q [N]."""
        return advantage_of(record) * policy_weight(record)


def penalized_reward(record: Record, beta: float) -> Tensor:
    """R = r − β (log π − log a) [N]."""
    return reward_of(record).double() - beta * (record.policy_logprob - record.base_logprob)


def check_adaptive(target_kl: float | None, horizon: float) -> None:
    """Raises UsageError unless ``target_kl`` (or None) and ``horizon`` are above 0."""
    if target_kl is not None:
        above_zero("target_kl", target_kl)
    above_zero("horizon", horizon)


def adapted_beta(beta: float, target_kl: float | None, horizon: float, record: Record) -> float:
    """β for the next batch, from KL(π‖a) on this one; unchanged without a ``target_kl``."""
    if target_kl is None:
        return beta
    ratio = policy_weight(record)
    kl = float((ratio * (record.policy_logprob - record.base_logprob)).mean())
    error = max(-0.2, min(0.2, kl / target_kl - 1))
    return beta * (1 + error * len(ratio) / horizon)
