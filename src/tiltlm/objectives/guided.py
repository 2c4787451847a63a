"""Guided distillation: the law of a guide teaches every token, and what the guide learns too late corrects it.

A guide promises ψ(x_≤t), its estimate of E_a[P/(Z a) | x_≤t], and g(v|x_<t) = a(v|x_<t) ψ(x_<t v) / E_t, where
E_t = Σ_v a(v|x_<t) ψ(x_<t v). Let ρ_t = (a/q)(x_<t), and let δ_t = E_t − ψ(x_<t) be what the law of the next token adds
to the promise before it. For any ψ, E_q[w ∇ log π(x)] with w = P/(Z q) is the mean over q of

    Σ_t ρ_t E_t Σ_v g(v|x_<t) ∇ log π(v|x_<t)  +  Σ_t C_t ∇ log π(x_t|x_<t),   C_t = Σ_{s>t} ρ_s δ_s + w − (a/q)(x) ψ(x)

The first part distills g, with no noise over tokens. The second corrects a token by what the whole next-token laws
behind it still said, each of them a mean over all tokens, and by what the text was worth at last beyond its promise.
With the exact ψ it is zero; with ψ = π/a on every prefix both together are GDC++.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.objectives.objective import Record
from tiltlm.objectives.settings import number


def prefix_weights(law: Tensor, proposal: Tensor) -> Tensor:
    """(g/q)(x_<t) [N, T], the weight of the prefix before each token, from log-probabilities [N, T] under g and q."""
    log_ratio = law - proposal
    # Shifted, not subtracted: after a token that g rules out the weight is 0, and −inf − −inf is no number.
    return torch.nn.functional.pad(log_ratio.cumsum(-1)[..., :-1], (1, 0)).exp()


@dataclass(frozen=True)
class Guided:
    """c = κ C_t beside the distillation of the guide's law g, weighted by κ ρ_t E_t + (1 − κ) (g/q)(x_<t).

    ``correction`` κ = 1 is unbiased for the gradient of KL(p‖π), κ = 0 for that of KL(g‖π), without noise over tokens.
    ``feedback`` lets the guide lean: each step moves its coefficients by that share of what the policy's moments lack,
    in units of their variance.
    """

    name: str = "guided"
    correction: float = 1.0
    feedback: float = 0.0

    def __post_init__(self) -> None:
        number("correction", self.correction, 0, 1)
        number("feedback", self.feedback, 0, 1)

    def coefficients(self, record: Record) -> Tensor:
        """κ C_t [N, T]."""
        assert record.guide is not None
        # Without a correction no weight is taken, and none can overflow.
        if not self.correction:
            return torch.zeros_like(record.guide.tokens)
        return self.correction * corrections(record)

    def lessons(self, record: Record) -> Tensor:
        """How much the guide's law teaches at each token [N, T]."""
        assert record.guide is not None
        assert record.tokens is not None
        of_guide = prefix_weights(record.guide.tokens, record.tokens.proposal.to(record.guide.tokens))
        if not self.correction:
            return of_guide
        return self.correction * expected_promises(record) + (1 - self.correction) * of_guide


def expected_promises(record: Record) -> Tensor:
    """ρ_t E_t [N, T]: what the law of the next token promises, weighted by the prefix before it."""
    guide, tokens = record.guide, record.tokens
    assert guide is not None
    assert tokens is not None
    base = tokens.base.to(guide.tokens)
    return prefix_weights(base, tokens.proposal.to(base)) * guide.expected.exp() * tokens.mask


def corrections(record: Record) -> Tensor:
    """C_t [N, T]."""
    guide, tokens = record.guide, record.tokens
    assert guide is not None
    assert tokens is not None
    base, proposal = tokens.base.to(guide.tokens), tokens.proposal.to(guide.tokens)
    promised = prefix_weights(base, proposal) * guide.promises[:, :-1].exp() * tokens.mask
    added = expected_promises(record) - promised
    later = added.flip(-1).cumsum(-1).flip(-1) - added
    worth = (record.target_logscore - record.base_logprob - record.log_z).to(later).exp()
    surplus = (base - proposal).sum(-1).exp() * (worth - guide.promises[:, -1].exp())
    return (later + surplus[:, None]) * tokens.mask
