"""What an objective reads: log-probabilities of sampled sequences, and what is known of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TokenRecord:
    """Log-probabilities token by token, [N, T] in nats, 0 where ``mask`` [N, T] is False.

    ``values`` [N, T] is a critic's estimate of the reward to come, before each token; None without a critic.
    """

    policy: Tensor
    base: Tensor
    proposal: Tensor
    mask: Tensor
    values: Tensor | None = None


@dataclass(frozen=True)
class GuideRecord:
    """A guide g with value function ψ, an estimate of E_a[P/(Z a) | prefix]; all in nats.

    ``token_logprobs`` [N, T] are log g of the sampled tokens. ``log_values`` [N, T + 1] is log ψ before each token and
    at the end of the text. ``log_expected`` [N, T] is log Σ_v a(v|x_<t) ψ(x_<t v). ``mixture_weights`` [T, K] combine
    the K unbiased estimators of the guided gradient at each position; None: the last estimator alone.
    """

    token_logprobs: Tensor
    log_values: Tensor
    log_expected: Tensor
    mixture_weights: Tensor | None = None


@dataclass(frozen=True)
class Record:
    """N sampled sequences when their coefficients are computed; nothing here carries a gradient.

    ``policy_logprob`` (π), ``base_logprob`` (a), ``proposal_logprob`` (q) and ``target_logscore`` (log P, unnormalized)
    are [N] in nats. ``log_z`` is the current estimate of log Z, a number or one per row [N]. ``guide`` is set where a
    guide is distilled. ``reward`` [N] is the target read as a reward. ``prompt_index`` [N] tells which samples share a
    prompt. ``tokens`` holds the same log-probabilities token by token. ``advantage``, [N] or [N, T], is what
    ``Objective.advantages`` returned for these rows before any update on the batch.
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


def advantage_of(record: Record) -> Tensor:
    """The record's advantage, [N] or [N, T]; the trainer sets it for every objective that is ``batchwise``."""
    assert record.advantage is not None, "a batchwise objective is asked for advantages before coefficients"
    return record.advantage


def reward_of(record: Record) -> Tensor:
    """The record's reward [N]; the trainer sets it for every objective that is ``batchwise``."""
    assert record.reward is not None, "the trainer reads a reward off the target for batchwise objectives"
    return record.reward


def tokens_of(record: Record) -> TokenRecord:
    """The record's log-probabilities token by token."""
    assert record.tokens is not None, "an objective of tokens needs them in its record"
    return record.tokens


def guide_of(record: Record) -> GuideRecord:
    """The record's guide; the trainer sets it for every objective that ``distills``."""
    assert record.guide is not None, "an objective that distills a guide needs it in its record"
    return record.guide
