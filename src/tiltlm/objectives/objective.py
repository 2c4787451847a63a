"""The one idea: every method is a rule for how hard each sample pulls on the policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class TokenRecord:
    """The log-probabilities behind a record token by token, [N, T] in nats, 0 where ``mask`` is False.

    ``values`` [N, T] is what a critic expects of the reward to come, before each token; None without a critic.
    """

    policy: Tensor
    base: Tensor
    proposal: Tensor
    mask: Tensor
    values: Tensor | None = None


@dataclass(frozen=True)
class GuideRecord:
    """A guide g behind a record: its log-probabilities ``tokens`` [N, T] in nats, and what each prefix still promises.

    ``promises`` [N, T + 1] is log ψ before each token and at the end of the text, ψ being the guide's estimate of
    E_a[P/(Z a) | prefix]; ``expected`` [N, T] is log Σ_v a(v|x_<t) ψ(x_<t v). ``shares`` [T, K] says how the K forms of
    the guided gradient are mixed at each position.
    """

    tokens: Tensor
    promises: Tensor
    expected: Tensor
    shares: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """What is known of N sampled sequences when their coefficients are computed; nothing here carries a gradient.

    All are log-probabilities in nats: of the policy π, the base a, the proposal q that drew the samples, and the
    target's unnormalized log P, each [N]; ``log_z`` is the current estimate of log Z, a number or one per row [N].
    ``guide`` is there where a guide is distilled. ``reward`` [N] is the target read as a reward,
    ``prompt_index`` [N] says which samples share a prompt, ``tokens`` has the same token by token, and ``advantage``,
    [N] or [N, T], is what ``advantages`` gave for these rows when the batch was drawn.
    """

    policy_logprob: Tensor
    base_logprob: Tensor
    proposal_logprob: Tensor
    target_logscore: Tensor
    log_z: float | Tensor
    guide: GuideRecord | None = None
    reward: Tensor | None = None
    prompt_index: Tensor | None = None
    tokens: TokenRecord | None = None
    advantage: Tensor | None = None


@runtime_checkable
class Objective(Protocol):
    """A rule for the coefficient c_i in   gradient = Σ_i c_i ∇ log π(x_i),   x_i ~ q."""

    @property
    def name(self) -> str:
        """How reports call it."""

    def coefficients(self, record: Record) -> Tensor:
        """One coefficient per sequence [N], or per token [N, T]; positive pulls the policy towards the sample.

        The N sequences may be part of a batch, as many as fit in memory: a coefficient may depend on its own row alone.
        """


@runtime_checkable
class BatchObjective(Objective, Protocol):
    """An objective with coefficients that depend on the whole batch, by a baseline, a group, or a normalization."""

    def advantages(self, record: Record) -> Tensor:
        """What the whole batch says of each sequence [N], or token [N, T]; asked once, before any update on it."""


@runtime_checkable
class CriticObjective(BatchObjective, Protocol):
    """An objective whose advantages are taken against a critic, which learns beside the policy."""

    def returns(self, record: Record) -> Tensor:
        """What the critic is to learn for each token [N, T]."""

    def value_loss(self, values: Tensor, before: Tensor, returns: Tensor) -> Tensor:
        """The critic's error at each token [N, T], from its values, those before any update, and the returns."""


@runtime_checkable
class AdaptiveObjective(Objective, Protocol):
    """A dataclass with a number that moves from batch to batch."""

    @property
    def moving(self) -> str:
        """The name of that field."""

    def adapted(self, record: Record) -> AdaptiveObjective:
        """The same for the next batch, with that number moved, given the record of this one."""


def advantage_of(record: Record) -> Tensor:
    """The record's advantage, which the loop fills in for every objective that has ``advantages``."""
    assert record.advantage is not None, "objectives with advantages() are asked for them before their coefficients"
    return record.advantage


def reward_of(record: Record) -> Tensor:
    """The record's reward [N]."""
    assert record.reward is not None, "the loop reads a reward off the target for objectives that maximize one"
    return record.reward
