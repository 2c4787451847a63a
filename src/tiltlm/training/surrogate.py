"""The surrogate loss of a chunk of samples: its gradient is that of the objective."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.evaluation.scores import Scores
from tiltlm.lm import Guide, NextToken, Samples
from tiltlm.objectives import GuideRecord, Objective, Record, TokenRecord


def updates_per_batch(objective: Objective, wanted: int | None) -> int:
    """How many optimizer steps each batch gets: as many as the user sets, or the objective's default.

    Raises UsageError where the objective allows fewer.
    """
    most = objective.max_iterations
    if wanted is not None and most is not None and wanted > most:
        raise UsageError(
            f"training.num_iterations: {wanted} is too many for {objective.name}, which compares the samples of a "
            f"batch before any update on it; leave it out"
        )
    return wanted if wanted is not None else objective.default_iterations


def sequence_record(scores: Scores, log_z: float | Tensor) -> Record:
    """The record of whole sequences, without tokens."""
    return Record(scores.policy_logprob, scores.base_logprob, scores.proposal_logprob, scores.target_logscore, log_z)


def token_record(
    samples: Samples,
    scores: Scores,
    log_z: float | Tensor,
    policy: Tensor,
    base: Tensor,
    *,
    reward: Tensor | None = None,
    guide: GuideRecord | None = None,
    values: Tensor | None = None,
    advantage: Tensor | None = None,
) -> Record:
    """The record of N samples with their tokens; ``policy`` and ``base`` are log-probabilities of tokens [N, T]."""
    return Record(
        policy_logprob=scores.policy_logprob,
        base_logprob=scores.base_logprob,
        proposal_logprob=scores.proposal_logprob,
        target_logscore=scores.target_logscore,
        log_z=log_z,
        guide=guide,
        reward=reward,
        prompt_index=samples.prompt_index.cpu(),
        tokens=TokenRecord(policy.detach(), base, samples.proposal_logprob, samples.mask, values),
        advantage=advantage,
    )


def guide_record(
    samples: Samples,
    scored: NextToken,
    guide: Guide | None,
    log_z: float | Tensor,
    mixture_weights: Tensor | None,
) -> GuideRecord | None:
    """The guide's part of a record; with several prompts its values are already divided by each prompt's Z."""
    if guide is None or scored.guide is None or scored.expected is None:
        return None
    log_values = guide.log_values(samples.tokens, samples.mask).double()
    log_expected = scored.expected.double() + guide.log_scale
    if not isinstance(log_z, Tensor):
        log_values, log_expected = log_values - log_z, log_expected - log_z
    return GuideRecord(scored.guide.double(), log_values, log_expected, mixture_weights)


def finite(objective: Objective, values: Tensor, record: Record) -> Tensor:
    """The same coefficients or advantages. Raises NumericalError unless all are finite."""
    if bool(torch.isfinite(values).all()):
        return values
    reason = objective.needs_full_support
    if reason and bool((record.target_logscore == -math.inf).any()):
        raise NumericalError(f"{objective.name} cannot match a target with P = 0 on some texts: {reason}")
    raise NumericalError(
        f"{objective.name} gave a coefficient that is not finite; the policy's log-probabilities run from "
        f"{float(record.policy_logprob.min()):.3g} to {float(record.policy_logprob.max()):.3g}. Lower "
        f"training.learning_rate or set training.max_grad_norm."
    )
