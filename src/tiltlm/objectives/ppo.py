"""PPO and GRPO: several updates on a batch with clipped probability ratios.

min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π/q per token has the gradient ρ A ∇ log π where ρ is not clipped, and 0 where it
is (Schulman et al. 2017, 1707.06347). So PPO and GRPO are rules for a coefficient like every method here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.objectives.groups import group_mean, group_std
from tiltlm.objectives.objective import Objective
from tiltlm.objectives.record import Record, TokenRecord, advantage_of, reward_of, tokens_of
from tiltlm.objectives.reinforce import adapted_beta, check_adaptive
from tiltlm.objectives.settings import flag, number

# Added to the standard deviation of a group, so that equal rewards do not divide by 0.
LEAST_DEVIATION = 1e-4


def clipped(advantage: Tensor, tokens: TokenRecord, clip: float | None) -> Tensor:
    """ρ A [N, T], 0 where the clipped surrogate has no gradient; never clipped if ``clip`` is None."""
    ratio = (tokens.policy - tokens.proposal).double().exp()
    coefficient = ratio * advantage
    if clip is None:
        return coefficient * tokens.mask
    outside = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.where(outside, 0.0, coefficient) * tokens.mask


@dataclass(frozen=True)
class PPO(Objective):
    """PPO with a value head, as Ziegler et al. 2019 (1909.08593) tune language models.

    The reward of a token is −β (log π − log a); the last token's adds r. Advantages are GAE(``gamma``, ``lam``) over a
    critic's values, whitened over the batch unless ``whiten`` is off. The critic is a linear head on the hidden states
    of the policy. Its squared error, with values clipped to ±``clip_value`` of those before the update, has the weight
    ``value_coef``. β adapts with ``target_kl`` as in ``kl_control``; null keeps it fixed.
    """

    name: ClassVar[str] = "ppo"
    only_on_policy: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    has_critic: ClassVar[bool] = True
    maximizes_reward: ClassVar[bool] = True
    default_iterations: ClassVar[int] = 4
    adaptive_field: ClassVar[str | None] = "beta"
    clip: float | None = 0.2
    beta: float = 0.2
    target_kl: float | None = 6.0
    horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    clip_value: float = 0.2
    whiten: bool = True

    def __post_init__(self) -> None:
        if self.clip is not None:
            number("clip", self.clip, 0)
        number("beta", self.beta, 0)
        check_adaptive(self.target_kl, self.horizon)
        number("gamma", self.gamma, 0, 1)
        number("lam", self.lam, 0, 1)
        number("value_coef", self.value_coef, 0)
        number("clip_value", self.clip_value, 0)
        flag("whiten", self.whiten)

    @property
    def zero_without_advantage(self) -> bool:
        return True

    @property
    def advantages_read_base(self) -> bool:
        return self.beta != 0

    def advantages(self, record: Record) -> Tensor:
        """GAE of each token [N, T], with mean 0 and variance 1 over the batch's tokens if ``whiten``."""
        advantage, mask = self._gae(record), tokens_of(record).mask
        if not self.whiten:
            return advantage
        known = advantage[mask]
        return torch.where(mask, (advantage - known.mean()) / (known.std(correction=0) + 1e-8), 0.0)

    def returns(self, record: Record) -> Tensor:
        """The critic's goal [N, T]: the advantage before whitening plus the value."""
        tokens = tokens_of(record)
        advantage = self._gae(record)
        return advantage if tokens.values is None else advantage + tokens.values

    def coefficients(self, record: Record) -> Tensor:
        """ρ A where it is not clipped [N, T]."""
        return clipped(advantage_of(record), tokens_of(record), self.clip)

    def value_loss(self, values: Tensor, before: Tensor, returns: Tensor) -> Tensor:
        """The critic's loss at each token [N, T]: the larger of the errors of its value and of that value clipped."""
        near = before + (values - before).clamp(-self.clip_value, self.clip_value)
        return 0.5 * self.value_coef * torch.maximum((values - returns).square(), (near - returns).square())

    def adapted(self, record: Record) -> PPO:
        """The objective with the penalty for the next batch."""
        return replace(self, beta=adapted_beta(self.beta, self.target_kl, self.horizon, record))

    def _gae(self, record: Record) -> Tensor:
        """A_t = Σ_s (γλ)^s δ_{t+s} with δ_t = r_t + γ V_{t+1} − V_t, and V = 0 after the last token."""
        tokens = tokens_of(record)
        rewards = -self.beta * (tokens.policy - tokens.base).double() * tokens.mask
        last = tokens.mask.sum(-1, keepdim=True) - 1
        rewards = rewards.scatter_add(1, last, reward_of(record).double()[:, None].to(rewards.device))
        values = torch.zeros_like(rewards) if tokens.values is None else tokens.values.double() * tokens.mask
        advantage, following = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
        for t in reversed(range(rewards.shape[1])):
            after = values[:, t + 1] if t + 1 < rewards.shape[1] else torch.zeros_like(following)
            following = rewards[:, t] + self.gamma * after - values[:, t] + self.gamma * self.lam * following
            advantage[:, t] = following
        return advantage * tokens.mask


@dataclass(frozen=True)
class GRPO(Objective):
    """Group-relative policy optimization (Shao et al. 2024, 2402.03300): rewards standardized within each prompt.

    c_t = (ρ_t A [unless clipped] + β (a/π − 1)) / length, the latter from the estimate a/π − 1 − log a/π of KL(π‖a) in
    the loss. ``scale_rewards`` off leaves the standard deviation out, and ``length_normalized`` off the length; both
    off is Dr. GRPO (2503.20783).
    """

    name: ClassVar[str] = "grpo"
    only_on_policy: ClassVar[bool] = True
    batchwise: ClassVar[bool] = True
    maximizes_reward: ClassVar[bool] = True
    clip: float | None = 0.2
    beta: float = 0.0
    scale_rewards: bool = True
    length_normalized: bool = True

    def __post_init__(self) -> None:
        if self.clip is not None:
            number("clip", self.clip, 0)
        number("beta", self.beta, 0)
        flag("scale_rewards", self.scale_rewards)
        flag("length_normalized", self.length_normalized)

    @property
    def zero_without_advantage(self) -> bool:
        return self.beta == 0

    @property
    def advantages_read_base(self) -> bool:
        return False

    def advantages(self, record: Record) -> Tensor:
        """(r − mean) / deviation [N] within each prompt."""
        reward, prompts = reward_of(record).double(), record.prompt_index
        advantage = reward - group_mean(reward, prompts)
        return advantage / (group_std(reward, prompts) + LEAST_DEVIATION) if self.scale_rewards else advantage

    def coefficients(self, record: Record) -> Tensor:
        """The coefficient of each token [N, T]."""
        tokens = tokens_of(record)
        found = clipped(advantage_of(record)[:, None].to(tokens.policy.device), tokens, self.clip)
        if self.beta:
            found = found + self.beta * torch.expm1((tokens.base - tokens.policy).double()) * tokens.mask
        return found / tokens.mask.sum(-1, keepdim=True) if self.length_normalized else found
