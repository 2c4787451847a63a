"""The pull of one chunk of samples on the policy: its coefficients, and what a guide teaches beside them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.lm import NextToken, Samples
from tiltlm.objectives import Objective, Record, prefix_weights
from tiltlm.training.metrics import Scores


def pull_chunk(objective: Objective, samples: Samples, scores: Scores, laws: NextToken, log_z: float) -> Tensor:
    """What each of N samples adds to the objective [N], with the gradient c · ∇ log π and that of the distillation.

    Raises NumericalError for a coefficient that is not finite.
    """
    record = Record(
        policy_logprob=scores.policy_logprob,
        base_logprob=scores.base_logprob,
        proposal_logprob=scores.proposal_logprob,
        target_logscore=scores.target_logscore,
        log_z=log_z,
        guide_logprob=laws.guide.double().sum(-1).cpu() if laws.guide is not None else None,
    )
    coefficients = _finite(objective, record).to(laws.policy)
    pulled = coefficients * laws.policy.sum(-1) if coefficients.ndim == 1 else (coefficients * laws.policy).sum(-1)
    if laws.guide is None or laws.taught is None:
        return pulled
    return pulled + (prefix_weights(laws.guide, samples.proposal_logprob.to(laws.guide)) * laws.taught).sum(-1)


def _finite(objective: Objective, record: Record) -> Tensor:
    coefficients = objective.coefficients(record)
    if not bool(torch.isfinite(coefficients).all()):
        raise NumericalError(
            f"{objective.name} gave a coefficient that is not finite; the policy's log-probabilities run from "
            f"{float(record.policy_logprob.min()):.3g} to {float(record.policy_logprob.max()):.3g}. Lower "
            f"training.learning_rate or set training.max_grad_norm."
        )
    return coefficients


def ignores_the_impossible(objective: Objective) -> bool:
    """Whether a row with P = 0 has coefficient 0 whatever else is true of it, as in DPG and GDC, not in GDC++."""
    # What depends on NaN is no number, and so not 0, unless it is compared or replaced: hence numbers too.
    unknown = torch.tensor([math.nan, -0.1, -3.0, -10.0, -100.0], dtype=torch.float64)
    record = Record(
        policy_logprob=unknown,
        base_logprob=unknown.flip(0),
        proposal_logprob=torch.full_like(unknown, -9.0),
        target_logscore=torch.full_like(unknown, -math.inf),
        log_z=0.0,
        guide_logprob=unknown,
    )
    try:
        return bool((objective.coefficients(record) == 0).all())
    except Exception:  # an objective of the user's own that takes no NaN: then nothing is known of it
        return False
