"""The pull of one chunk of samples on the policy: its coefficients, and what a guide teaches beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.lm import Guide, Samples, token_logprob
from tiltlm.objectives import Objective, Record, distillation, prefix_weights
from tiltlm.training.metrics import Scores


def pull_chunk(
    objective: Objective,
    samples: Samples,
    scores: Scores,
    policy_law: Tensor,
    base_law: Tensor | None,
    guide: Guide | None,
    log_z: float,
) -> Tensor:
    """What each of N samples adds to the objective [N], with the gradient c · ∇ log π and that of the distillation.

    ``policy_law`` and ``base_law`` [N, T, V] are log-probabilities of the next token; the latter is read with a
    ``guide`` alone. Raises NumericalError for a coefficient that is not finite.
    """
    tokens = token_logprob(policy_law, samples)
    guide_law = guide_tokens = None
    if guide is not None and base_law is not None:
        with torch.no_grad():
            guide_law = (base_law + guide.sequence_log_weights(samples.tokens)).log_softmax(-1)
            guide_tokens = token_logprob(guide_law, samples)
    record = Record(
        policy_logprob=scores.policy_logprob,
        base_logprob=scores.base_logprob,
        proposal_logprob=scores.proposal_logprob,
        target_logscore=scores.target_logscore,
        log_z=log_z,
        guide_logprob=guide_tokens.double().sum(-1).cpu() if guide_tokens is not None else None,
    )
    coefficients = _finite(objective, record).to(tokens)
    pulled = coefficients * tokens.sum(-1) if coefficients.ndim == 1 else (coefficients * tokens).sum(-1)
    if guide_law is None or guide_tokens is None:
        return pulled
    weights = prefix_weights(guide_tokens, samples.proposal_logprob.to(guide_tokens)) * samples.mask
    return pulled + distillation(guide_law, policy_law, weights)


def _finite(objective: Objective, record: Record) -> Tensor:
    coefficients = objective.coefficients(record)
    if not bool(torch.isfinite(coefficients).all()):
        raise NumericalError(
            f"{objective.name} gave a coefficient that is not finite; the policy's log-probabilities run from "
            f"{float(record.policy_logprob.min()):.3g} to {float(record.policy_logprob.max()):.3g}. Lower "
            f"training.learning_rate or set training.max_grad_norm."
        )
    return coefficients
