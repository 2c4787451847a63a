"""The pull of one chunk of samples on the policy: its coefficients, and what a guide teaches beside them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.evaluation.scores import Scores
from tiltlm.lm import NextToken, Samples
from tiltlm.objectives import AdaptiveObjective, BatchObjective, Guided, GuideRecord, Objective, Record, TokenRecord


def updates_per_batch(objective: Objective, wanted: int | None) -> int:
    """How many optimizer steps a batch gets: as many as the user says, or as the objective takes by itself.

    Raises UsageError for an objective that looks at a batch once.
    """
    most = getattr(objective, "most_iterations", None)
    if wanted is not None and most is not None and wanted > most:
        raise UsageError(
            f"training.num_iterations: {wanted} is too many for {objective.name}, which compares the samples of a "
            f"batch before any update on it; leave it out"
        )
    return wanted if wanted is not None else getattr(objective, "num_iterations", 1)


def sequence_record(scores: Scores, log_z: float | Tensor) -> Record:
    """What an objective reads of whole sequences."""
    return Record(scores.policy_logprob, scores.base_logprob, scores.proposal_logprob, scores.target_logscore, log_z)


def record_of(
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
    """What an objective reads of N samples; ``policy`` and ``base`` are log-probabilities of tokens [N, T]."""
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


def pull_chunk(objective: Objective, samples: Samples, record: Record, laws: NextToken) -> Tensor:
    """What each of N samples adds to the objective [N], with the gradient c · ∇ log π and that of the distillation.

    Raises NumericalError for a coefficient that is not finite.
    """
    coefficients = finite(objective, objective.coefficients(record), record).to(laws.policy)
    pulled = coefficients * laws.policy.sum(-1) if coefficients.ndim == 1 else (coefficients * laws.policy).sum(-1)
    if record.guide is None or laws.taught is None:
        return pulled
    lessons: Tensor = cast(Guided, objective).lessons(record)
    return pulled + (lessons.to(laws.taught) * laws.taught).sum(-1)


def finite(objective: Objective, values: Tensor, record: Record) -> Tensor:
    """The same coefficients or advantages. Raises NumericalError for any that is no finite number."""
    if bool(torch.isfinite(values).all()):
        return values
    reason = getattr(objective, "needs_full_support", None)
    if reason and bool((record.target_logscore == -math.inf).any()):
        raise NumericalError(f"{objective.name} cannot match a target with P = 0 on some texts: {reason}")
    raise NumericalError(
        f"{objective.name} gave a coefficient that is not finite; the policy's log-probabilities run from "
        f"{float(record.policy_logprob.min()):.3g} to {float(record.policy_logprob.max()):.3g}. Lower "
        f"training.learning_rate or set training.max_grad_norm."
    )


def ignores_the_impossible(objective: Objective) -> bool:
    """Whether a row with P = 0 has coefficient 0 whatever else is true of it, as in DPG and GDC, not in GDC++."""
    # What depends on NaN is no number, and so not 0, unless it is compared or replaced: hence numbers too.
    unknown = torch.tensor([math.nan, -0.1, -3.0, -10.0, -100.0], dtype=torch.float64)
    impossible = replace(_made_up(unknown), target_logscore=torch.full_like(unknown, -math.inf))
    return not isinstance(objective, BatchObjective | AdaptiveObjective) and _is_silent(objective, impossible)


def follows_its_advantage(objective: Objective) -> bool:
    """Whether a row with advantage 0 has coefficient 0, as in REINFORCE, not in GRPO with a price on KL."""
    record = _made_up(torch.tensor([-0.1, -3.0, -10.0, -100.0], dtype=torch.float64))
    return isinstance(objective, BatchObjective) and _is_silent(objective, record)


def needs_the_base(objective: Objective) -> bool:
    """Whether what an objective says of a whole batch depends on log a or log P, as in KL control, not in REINFORCE."""
    record = _made_up(torch.tensor([-0.1, -3.0, -10.0, -100.0], dtype=torch.float64))
    if not isinstance(objective, BatchObjective) or record.tokens is None:
        return False
    other = torch.tensor([-7.0, -0.5, -40.0, -2.0], dtype=torch.float64)
    moved = replace(record, base_logprob=other, target_logscore=other - 2.0)
    moved = replace(moved, tokens=replace(record.tokens, base=other[:, None]))
    try:
        return not torch.equal(objective.advantages(record), objective.advantages(moved))
    except Exception:  # an objective of the user's own that takes no such record
        return True


def _is_silent(objective: Objective, record: Record) -> bool:
    try:
        return bool((objective.coefficients(record) == 0).all())
    except Exception:  # an objective of the user's own that takes no such record: then nothing is known of it
        return False


def _made_up(values: Tensor) -> Record:
    """A record that no samples gave: an objective is asked what it makes of it."""
    sampled = torch.full_like(values, -9.0)
    mask = torch.ones(len(values), 1, dtype=torch.bool)
    return Record(
        policy_logprob=values,
        base_logprob=values.flip(0),
        proposal_logprob=sampled,
        target_logscore=values - 1.0,
        log_z=0.0,
        guide=GuideRecord(values[:, None], torch.stack([values, values], -1), values[:, None]),
        reward=values,
        prompt_index=torch.zeros(len(values), dtype=torch.long),
        tokens=TokenRecord(values[:, None], values.flip(0)[:, None], sampled[:, None], mask),
        advantage=torch.zeros_like(values),
    )
