"""Guided distillation: the law of a guide teaches every token, and what the guide learns too late corrects it.

A guide promises ψ(x_≤t), its estimate of E_a[P/(Z a) | x_≤t], and g(v|x_<t) = a(v|x_<t) ψ(x_<t v) / E_t, where
E_t = Σ_v a(v|x_<t) ψ(x_<t v). Let ρ_t = (a/q)(x_<t), and let δ_t = E_t − ψ(x_<t) be what the law of the next token adds
to the promise before it. For any ψ, E_q[w ∇ log π(x)] with w = P/(Z q) is the mean over q of

    Σ_t L_t Σ_v g(v|x_<t) ∇ log π(v|x_<t)  +  Σ_t C_t ∇ log π(x_t|x_<t)

with any of these lessons L and corrections C, prefix by prefix:

    L_t = 0               C_t = w                                        DPG
    L_t = 0               C_t = w − (π/q)(x)                             GDC++
    L_t = (g/q)(x_<t)     C_t = w − (g/q)(x)                             each text corrected as a whole
    L_t = ρ_t E_t         C_t = Σ_{s>t} ρ_s δ_s + w − (a/q)(x) ψ(x)      each token by the laws behind it

The first has all the noise, the second little where π is near p, the third little where g is, and the last where ψ
says of prefixes what they are worth. So any mix with shares that sum to one at each position is right on average, and
``balance.py`` finds the one that varies least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.objectives.objective import Record
from tiltlm.objectives.settings import number

# Of a weight, so that its square is a number in float64.
MOST_NATS = 300.0


@dataclass(frozen=True)
class Guided:
    """c = κ C_t beside the distillation of the guide's law g, weighted by κ L_t + (1 − κ) (g/q)(x_<t).

    ``correction`` κ = 1 is unbiased for the gradient of KL(p‖π), κ = 0 for that of KL(g‖π), without noise over tokens.
    L and C are mixed by the shares of the record, or those of the last form alone. ``feedback`` lets the guide lean:
    each step moves its coefficients by that share of what the policy's moments lack, in units of their variance.
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
        return self.correction * mixed(forms(record).corrections, record.guide.shares)

    def lessons(self, record: Record) -> Tensor:
        """How much the guide's law teaches at each token [N, T]."""
        assert record.guide is not None
        assert record.tokens is not None
        of_guide = prefix_weights(record.guide.tokens, record.tokens.proposal.to(record.guide.tokens))
        if not self.correction:
            return of_guide
        unbiased = mixed(forms(record).lessons, record.guide.shares)
        return self.correction * unbiased + (1 - self.correction) * of_guide


@dataclass(frozen=True)
class KeptGuide(Guided):
    """The same for a policy that keeps its guide, π(v|x_<t) ∝ θ(v|x_<t) ψ(x_<t v), θ being the weights that are tuned.

    Its own samples teach it, each batch twice.
    """

    name: str = "kept_guide"
    keeps_guide: ClassVar[bool] = True
    num_iterations: ClassVar[int] = 2


@dataclass(frozen=True)
class Forms:
    """The K forms of the same gradient: ``lessons`` L and ``corrections`` C [K, N, T], 0 where masked."""

    lessons: Tensor
    corrections: Tensor


def mixed(forms: Tensor, shares: Tensor | None) -> Tensor:
    """Σ_k of forms [K, N, T] by their shares [T, K] at each position; the last alone without any."""
    return forms[-1] if shares is None else torch.einsum("knt,tk->nt", forms, shares.to(forms))


def forms(record: Record) -> Forms:
    """DPG, GDC++, texts corrected as a whole, and tokens by the laws behind them, in this order."""
    guide, tokens = record.guide, record.tokens
    assert guide is not None
    assert tokens is not None
    law = guide.tokens
    base, proposal, mask = tokens.base.to(law), tokens.proposal.to(law), tokens.mask
    score = (record.target_logscore - record.log_z).to(law)
    worth = weight(score - proposal.sum(-1))[:, None]
    of_policy = weight((tokens.policy.to(law) - proposal).sum(-1))[:, None]
    of_guide = weight((law - proposal).sum(-1))[:, None]
    of_base = prefix_weights(base, proposal)
    expected = of_base * guide.expected.exp() * mask
    added = expected - of_base * guide.promises[:, :-1].exp() * mask
    later = added.flip(-1).cumsum(-1).flip(-1) - added
    # Of a text whose promise is all that it is worth nothing is left, however much the base's weight is.
    surplus = weight((base - proposal).sum(-1)) * ((score - base.sum(-1)).exp() - guide.promises[:, -1].exp())
    nothing = torch.zeros_like(law)
    lessons = [nothing, nothing, prefix_weights(law, proposal), expected]
    corrections = [worth, worth - of_policy, worth - of_guide, later + surplus[:, None]]
    return Forms(*(torch.stack([x.expand_as(law) * mask for x in parts]) for parts in (lessons, corrections)))


def prefix_weights(law: Tensor, proposal: Tensor) -> Tensor:
    """(g/q)(x_<t) [N, T], the weight of the prefix before each token, from log-probabilities [N, T] under g and q."""
    log_ratio = law - proposal
    # Shifted, not subtracted: after a token that g rules out the weight is 0, and −inf − −inf is no number.
    return weight(torch.nn.functional.pad(log_ratio.cumsum(-1)[..., :-1], (1, 0)))


def weight(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio, finite: a form that comes near the limit has no share in a mix, and must not be 0 · ∞."""
    return log_ratio.clamp_max(MOST_NATS).exp()
