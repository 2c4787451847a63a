"""Guided distillation: the law of a guide teaches every token, and each whole sample corrects it.

For any law g whose next-token law is known, E_q[w ∇ log π(x)] with w = P/(Z q) splits into

    E_q[Σ_t (g/q)(x_<t) Σ_v g(v|x_<t) ∇ log π(v|x_<t)]  +  E_q[(w − (g/q)(x)) ∇ log π(x)]

The first part distills g, with no noise over tokens; the second corrects what g gets wrong about p, and its noise is
that of P/g. With g = π the first part is zero and the second is GDC++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.objectives.dpg import target_weight
from tiltlm.objectives.objective import Record
from tiltlm.objectives.settings import number


def prefix_weights(guide_tokens: Tensor, proposal_tokens: Tensor) -> Tensor:
    """(g/q)(x_<t) [N, T], the weight of the prefix before each token, from token log-probabilities [N, T]."""
    log_ratio = guide_tokens - proposal_tokens
    # Shifted, not subtracted: after a token that the guide rules out the weight is 0, and −inf − −inf is no number.
    return torch.nn.functional.pad(log_ratio.cumsum(-1)[..., :-1], (1, 0)).exp()


@dataclass(frozen=True)
class Guided:
    """c = κ (P/(Z q) − g/q) beside the distillation of the guide's law g.

    ``correction`` κ = 1 is unbiased for the gradient of KL(p‖π), κ = 0 distills g alone. ``feedback`` lets the guide
    lean: each step moves its coefficients by that share of what the policy's moments lack, in units of their variance.
    """

    name: str = "guided"
    correction: float = 1.0
    feedback: float = 0.0

    def __post_init__(self) -> None:
        number("correction", self.correction, 0, 1)
        number("feedback", self.feedback, 0, 1)

    def coefficients(self, record: Record) -> Tensor:
        """κ (P/(Z q) − g/q) [N]."""
        assert record.guide_logprob is not None
        on_guide = (record.guide_logprob - record.proposal_logprob).exp()
        # Without a correction no weight is taken, and none can overflow.
        return self.correction * (target_weight(record) - on_guide) if self.correction else torch.zeros_like(on_guide)
