"""Learned states: a running sum of token weights, for what no automaton tells of a prefix.

With P/a between ``least`` and ``greatest`` on the samples, and ψ the promise of the automata's states, or of one state
where there is none,

    E_a[P(x)/a(x) | x_≤t]  ≈  least + (greatest − least) · σ(logit ψ(s, t) + Σ_{i≤t} u[x_i])

where the logit is that of ψ's place between the two. The weights u come from a logistic regression on all prefixes at
once, shrunk towards 0 as far as samples that they were not fitted on ask for; rounded, their sum is a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tiltlm.guides.token_states import TokenStates
from tiltlm.lm import Guide

# Levels of the sum, over the range that the samples show.
LEVELS = 64
# Ridge penalties, the strongest first: so many hits would have to speak for a token.
SHRINKAGES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
# Standard errors by which other samples must be told better with weights than without: the best of several penalties.
SURE = 3.0
# So many hits must speak for a sum's telling more, or less, than as fitted, and so much more it may tell.
FEW, STEEPEST = 3.0, 10.0
# How near to its least and greatest value a state's promise is taken to be.
NEAREST = 1e-6


@dataclass(frozen=True)
class Prefixes:
    """All prefixes of N samples: the ``token`` [N, T] that ends each, and the ``logit`` [N, T] of its state's promise.

    ``share`` [N, T] is what a prefix counts, 0 where there is none; over those of one sample it sums to a/q. ``worth``
    [N] is P/a of the sample, between 0 and 1.
    """

    token: Tensor
    logit: Tensor
    share: Tensor
    worth: Tensor

    def select(self, rows: Tensor) -> Prefixes:
        """Those of these samples."""
        return Prefixes(self.token[rows], self.logit[rows], self.share[rows], self.worth[rows])

    def sums(self, weights: Tensor) -> Tensor:
        """Σ u over the tokens of each prefix [N, T]."""
        return weights[self.token].cumsum(1)

    def loss(self, sums: Tensor) -> Tensor:
        """How badly these sums [N, T] tell the worth [N], in nats: least, on average, at its mean given the prefix."""
        logits = self.logit + sums
        worth = self.worth[:, None].expand_as(logits)
        return (self.share * binary_cross_entropy_with_logits(logits, worth, reduction="none")).sum(1)

    def lines(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and slope [T + 1] by which these sums [N, T] tell most after each number of tokens, by Newton's method.

        A sum tells more of a text that is nearly written than of its beginning. The last are those of texts that have
        ended; where few prefixes are, they stay near 0 and 1.
        """
        here = self.share > 0
        last = here & ~torch.nn.functional.pad(here[:, 1:], (0, 1))
        ratio = self.share.sum(1, keepdim=True)
        beginning = torch.zeros_like(ratio)

        def grouped(values: Tensor) -> Tensor:
            return torch.cat([beginning, values[:, :-1], (values * last).sum(1, keepdim=True)], 1)

        weight = torch.cat([beginning, (here & ~last)[:, :-1] * ratio, ratio], 1)
        logit, sums, worth = grouped(self.logit), grouped(sums), self.worth[:, None]
        shift, slope = torch.zeros_like(weight[0]), torch.ones_like(weight[0])
        for _ in range(20):
            told = (logit + shift + slope * sums).sigmoid()
            miss, sure = weight * (told - worth), weight * told * (1 - told)
            along_shift, along_slope = miss.sum(0) + FEW * shift, (miss * sums).sum(0) + FEW * (slope - 1)
            one, two, both = sure.sum(0) + FEW, (sure * sums.square()).sum(0) + FEW, (sure * sums).sum(0)
            determinant = one * two - both.square()
            shift = shift - ((two * along_shift - both * along_slope) / determinant).clamp(-1, 1)
            slope = slope - ((one * along_slope - both * along_shift) / determinant).clamp(-1, 1)
        return shift, slope.clamp(0, STEEPEST)


@dataclass(frozen=True)
class LearnedStates:
    """``states``, S of them: each is one of the automata's (``of`` [S]) at a level of the sum (``nats`` [S]).

    ``sums`` and ``share`` [N, T] are of the samples' prefixes, the sums by weights fitted on the other half of them.
    """

    states: TokenStates
    of: Tensor
    nats: Tensor
    sums: Tensor
    share: Tensor

    def guide(self, guide: Guide, along: Tensor, tilt: Tensor) -> Guide:
        """The guide over these states, from that over the automata's and its log ψ [N, T] along the samples.

        ``tilt`` [N] is P/a of these, up to what ψ is normalized by.
        """
        scale = Scale.of(tilt)
        logit = scale.logit(along[:, : self.sums.shape[1]].exp())
        shift, slope = Prefixes(torch.empty(0), logit, self.share, scale.place(tilt)).lines(self.sums)
        rows, final = torch.full((len(guide.log_value_table),), len(shift) - 1), len(shift) - 1
        rows[:final] = torch.arange(final)
        promise = scale.logit(guide.log_value_table.exp())
        still_open = promise[:, self.of] + shift[rows, None] + slope[rows, None] * self.nats
        ended = promise[:, self.of + len(guide.transitions)] + shift[final] + slope[final] * self.nats
        value = scale.value(torch.cat([still_open, ended], 1).sigmoid())
        return self.states.guide(value.clamp_min(float(guide.log_value_table.exp().min())).log())


@dataclass(frozen=True)
class Scale:
    """From ``least`` to ``greatest`` as from 0 to 1."""

    least: float
    greatest: float

    @staticmethod
    def of(values: Tensor) -> Scale:
        least, greatest = float(values.min()), float(values.max())
        return Scale(least, greatest if greatest > least else least + 1.0)

    def place(self, values: Tensor) -> Tensor:
        return (values - self.least) / (self.greatest - self.least)

    def logit(self, values: Tensor) -> Tensor:
        return self.place(values).clamp(NEAREST, 1 - NEAREST).logit()

    def value(self, places: Tensor) -> Tensor:
        return self.least + (self.greatest - self.least) * places


def fit_token_weights(prefixes: Prefixes, halves: list[Tensor], vocabulary: int) -> tuple[Tensor, Tensor] | None:
    """Weights [V], and the sums [N, T] of each half by those of the other; None where they tell nothing for sure."""
    parts = [prefixes.select(half) for half in halves]
    none = torch.zeros(vocabulary, dtype=torch.float64)
    without = prefixes.loss(torch.zeros_like(prefixes.logit))
    best, chosen, fitted = without, None, [none, none]
    for shrinkage in SHRINKAGES:
        fitted = [_fit(part, weights, shrinkage) for part, weights in zip(parts, fitted, strict=True)]
        sums = torch.zeros_like(prefixes.logit)
        for half, part, weights in zip(halves, parts, reversed(fitted), strict=True):
            sums[half] = part.sums(weights)
        loss = prefixes.loss(sums)
        if loss.sum() >= best.sum():
            break
        best, chosen = loss, (shrinkage, (fitted[0] + fitted[1]) / 2, sums)
    gain = without - best
    if chosen is None or float(gain.mean()) < SURE * float(gain.std()) / len(gain) ** 0.5:
        return None
    shrinkage, start, sums = chosen
    return _fit(prefixes, start, shrinkage), sums


def _fit(prefixes: Prefixes, start: Tensor, shrinkage: float) -> Tensor:
    """The weights [V] that make Σ loss + ½ shrinkage ‖u‖² least."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = prefixes.loss(prefixes.sums(weights)).sum() + 0.5 * shrinkage * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
