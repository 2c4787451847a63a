"""Clipped policy gradients: several updates on a batch, none of which moves a token's probability too far.

min(ρ A, clip(ρ, 1 ± ε) A) with ρ = π/q per token has the gradient ρ A ∇ log π where ρ is not clipped, and none where
it is (Schulman et al. 2017, 1707.06347). So PPO and GRPO are rules for a coefficient, as every method here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.objectives.groups import group_mean, group_std
from tiltlm.objectives.objective import Record, TokenRecord, advantage_of, reward_of
from tiltlm.objectives.reinforce import adapted_beta, check_adaptive
from tiltlm.objectives.settings import flag, number

# What keeps a group of equal rewards from dividing by 0.
LEAST_DEVIATION = 1e-4


def clipped(advantage: Tensor, tokens: TokenRecord, clip: float | None) -> Tensor:
    """ρ A [N, T], 0 where moving on would leave 1 ± ``clip``; never clipped if None."""
    ratio = (tokens.policy - tokens.proposal).double().exp()
    pull = ratio * advantage
    if clip is None:
        return pull * tokens.mask
    too_far = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.where(too_far, 0.0, pull) * tokens.mask


@dataclass(frozen=True)
class PPO:
    """PPO with a value head, as Ziegler et al. 2019 (1909.08593) tune language models.

    Each token costs β (log π − log a), the last one earns r. Advantages are GAE(``gamma``, ``lam``) over a critic's
    values, whitened over the batch unless ``whiten`` is off. The critic is a linear head on the policy's hidden states;
    its squared error, with values clipped to ±``clip_value`` of what they were, counts ``value_coef`` times. β adapts
    with ``target_kl``, as in ``kl_control``; null keeps it fixed.
    """

    name: str = "ppo"
    clip: float | None = 0.2
    beta: float = 0.2
    target_kl: float | None = 6.0
    horizon: float = 10_000.0
    gamma: float = 1.0
    lam: float = 0.95
    value_coef: float = 0.1
    clip_value: float = 0.2
    whiten: bool = True
    num_iterations: ClassVar[int] = 4  # updates on each batch, unless training.num_iterations says otherwise
    maximizes_reward: ClassVar[bool] = True
    moving: ClassVar[str] = "beta"

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

    def advantages(self, record: Record) -> Tensor:
        """GAE of each token [N, T], with mean 0 and variance 1 over the batch's tokens if ``whiten``."""
        advantage, mask = self._gae(record), _tokens(record).mask
        if not self.whiten:
            return advantage
        known = advantage[mask]
        return torch.where(mask, (advantage - known.mean()) / (known.std(correction=0) + 1e-8), 0.0)

    def returns(self, record: Record) -> Tensor:
        """What the critic is to learn [N, T]: the advantage before whitening, on top of the value."""
        tokens = _tokens(record)
        advantage = self._gae(record)
        return advantage if tokens.values is None else advantage + tokens.values

    def coefficients(self, record: Record) -> Tensor:
        """ρ A where it is not clipped [N, T]."""
        return clipped(advantage_of(record), _tokens(record), self.clip)

    def value_loss(self, values: Tensor, before: Tensor, returns: Tensor) -> Tensor:
        """The critic's error at each token, with gradient: the worse of its value and of that value clipped."""
        near = before + (values - before).clamp(-self.clip_value, self.clip_value)
        return 0.5 * self.value_coef * torch.maximum((values - returns).square(), (near - returns).square())

    def adapted(self, record: Record) -> PPO:
        """The same with the price for the next batch."""
        return replace(self, beta=adapted_beta(self.beta, self.target_kl, self.horizon, record))

    def _gae(self, record: Record) -> Tensor:
        """A_t = Σ_s (γλ)^s δ_{t+s} with δ_t = r_t + γ V_{t+1} − V_t, and V = 0 after the last token."""
        tokens = _tokens(record)
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
class GRPO:
    """Group-relative policy optimization (Shao et al. 2024, 2402.03300): rewards standardized within each prompt.

    c_t = (ρ_t A [unless clipped] + β (a/π − 1)) / length, the latter from the estimate a/π − 1 − log a/π of KL(π‖a) in
    the loss. ``scale_rewards`` off leaves the standard deviation out, and ``length_normalized`` off the length; both
    off is Dr. GRPO (2503.20783).
    """

    name: str = "grpo"
    clip: float | None = 0.2
    beta: float = 0.0
    scale_rewards: bool = True
    length_normalized: bool = True
    maximizes_reward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.clip is not None:
            number("clip", self.clip, 0)
        number("beta", self.beta, 0)
        flag("scale_rewards", self.scale_rewards)
        flag("length_normalized", self.length_normalized)

    def advantages(self, record: Record) -> Tensor:
        """(r − mean) / deviation [N] within each prompt."""
        reward, prompts = reward_of(record).double(), record.prompt_index
        advantage = reward - group_mean(reward, prompts)
        return advantage / (group_std(reward, prompts) + LEAST_DEVIATION) if self.scale_rewards else advantage

    def coefficients(self, record: Record) -> Tensor:
        """The coefficient of each token [N, T]."""
        tokens = _tokens(record)
        pull = clipped(advantage_of(record)[:, None].to(tokens.policy.device), tokens, self.clip)
        if self.beta:
            pull = pull + self.beta * torch.expm1((tokens.base - tokens.policy).double()) * tokens.mask
        return pull / tokens.mask.sum(-1, keepdim=True) if self.length_normalized else pull


def _tokens(record: Record) -> TokenRecord:
    assert record.tokens is not None, "an objective of tokens needs them in its record"
    return record.tokens
