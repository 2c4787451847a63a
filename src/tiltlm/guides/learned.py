"""Learned states: a running sum of token weights, for features without an automaton.

With P/a between ``low`` and ``high`` on the samples, and ψ the value of the automata's state (or of a single state),

    E_a[P(x)/a(x) | x_≤t]  ≈  low + (high − low) · σ(logit ψ(s, t) + Σ_{i≤t} u[x_i])

where the logit is of ψ rescaled to [0, 1]. The token weights u come from a logistic regression on all prefixes, with a
ridge penalty chosen on held-out samples. The rounded sum is a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from tiltlm.guides.token_states import TokenStates
from tiltlm.lm import Guide

# Levels of the rounded sum, over the range of the samples.
LEVELS = 64
# The strongest first.
RIDGE_PENALTIES = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
# Weights are used where the held-out loss falls by this many standard errors; the best of several penalties needs many.
MIN_STANDARD_ERRORS = 3.0
# The calibration's shift 0 and slope 1 have this prior precision; the slope is at most the second number.
CALIBRATION_PRIOR, MAX_SLOPE = 3.0, 10.0
# A rescaled value keeps this distance from 0 and 1.
MIN_DISTANCE = 1e-6


@dataclass(frozen=True)
class Prefixes:
    """All prefixes of N samples: the last ``token`` [N, T] of each, and the ``logit`` [N, T] of its state's value.

    ``weight`` [N, T] is the weight of a prefix, 0 where masked; the weights of a sample sum to a/q. ``outcome`` [N] is
    P/a of the sample, rescaled to [0, 1].
    """

    token: Tensor
    logit: Tensor
    weight: Tensor
    outcome: Tensor

    def select(self, rows: Tensor) -> Prefixes:
        """The prefixes of these samples."""
        return Prefixes(self.token[rows], self.logit[rows], self.weight[rows], self.outcome[rows])

    def sums(self, token_weights: Tensor) -> Tensor:
        """Σ u over the tokens of each prefix [N, T]."""
        return token_weights[self.token].cumsum(1)

    def loss(self, sums: Tensor) -> Tensor:
        """The cross-entropy [N] in nats of the outcomes under these sums [N, T]."""
        logits = self.logit + sums
        outcome = self.outcome[:, None].expand_as(logits)
        return (self.weight * binary_cross_entropy_with_logits(logits, outcome, reduction="none")).sum(1)

    def calibrate(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """The shift and slope [T + 1] of these sums [N, T] that minimize the loss after each number of tokens.

        The same sum says more about a text that is nearly complete than about its beginning. The last entries are for
        finished texts. With few prefixes shift and slope stay near 0 and 1. Solved by Newton's method.
        """
        inside = self.weight > 0
        last = inside & ~torch.nn.functional.pad(inside[:, 1:], (0, 1))
        ratio = self.weight.sum(1, keepdim=True)
        empty = torch.zeros_like(ratio)

        def grouped(values: Tensor) -> Tensor:
            return torch.cat([empty, values[:, :-1], (values * last).sum(1, keepdim=True)], 1)

        weight = torch.cat([empty, (inside & ~last)[:, :-1] * ratio, ratio], 1)
        logit, sums, outcome = grouped(self.logit), grouped(sums), self.outcome[:, None]
        shift, slope = torch.zeros_like(weight[0]), torch.ones_like(weight[0])
        for _ in range(20):
            predicted = (logit + shift + slope * sums).sigmoid()
            residual, curvature = weight * (predicted - outcome), weight * predicted * (1 - predicted)
            shift_gradient = residual.sum(0) + CALIBRATION_PRIOR * shift
            slope_gradient = (residual * sums).sum(0) + CALIBRATION_PRIOR * (slope - 1)
            # The Hessian's entries: shift-shift, slope-slope, shift-slope.
            one = curvature.sum(0) + CALIBRATION_PRIOR
            two = (curvature * sums.square()).sum(0) + CALIBRATION_PRIOR
            both = (curvature * sums).sum(0)
            determinant = one * two - both.square()
            shift = shift - ((two * shift_gradient - both * slope_gradient) / determinant).clamp(-1, 1)
            slope = slope - ((one * slope_gradient - both * shift_gradient) / determinant).clamp(-1, 1)
        return shift, slope.clamp(0, MAX_SLOPE)


@dataclass(frozen=True)
class LearnedStates:
    """S ``states``, each an automaton's state (``automaton_state`` [S]) with a rounded sum (``level`` [S], in nats).

    ``sums`` and ``weight`` [N, T] are those of the samples' prefixes. Each half's sums use token weights fitted on the
    other half.
    """

    states: TokenStates
    automaton_state: Tensor
    level: Tensor
    sums: Tensor
    weight: Tensor

    def guide(self, guide: Guide, sample_log_values: Tensor, tilt: Tensor) -> Guide:
        """The guide over these states, from the ``guide`` over the automata's states.

        ``sample_log_values`` [N, T] is log ψ of that guide on the samples; ``tilt`` [N] is P/a in the units of ψ.
        """
        scale = Scale.of(tilt)
        logit = scale.logit(sample_log_values[:, : self.sums.shape[1]].exp())
        shift, slope = Prefixes(torch.empty(0), logit, self.weight, scale.to_unit(tilt)).calibrate(self.sums)
        rows, final = torch.full((len(guide.log_value_table),), len(shift) - 1), len(shift) - 1
        rows[:final] = torch.arange(final)
        logits = scale.logit(guide.log_value_table.exp())
        still_open = logits[:, self.automaton_state] + shift[rows, None] + slope[rows, None] * self.level
        ended = logits[:, self.automaton_state + len(guide.transitions)] + shift[final] + slope[final] * self.level
        value = scale.from_unit(torch.cat([still_open, ended], 1).sigmoid())
        return self.states.guide(value.clamp_min(float(guide.log_value_table.exp().min())).log())


@dataclass(frozen=True)
class Scale:
    """The linear map from [``low``, ``high``] to [0, 1]."""

    low: float
    high: float

    @staticmethod
    def of(values: Tensor) -> Scale:
        low, high = float(values.min()), float(values.max())
        return Scale(low, high if high > low else low + 1.0)

    def to_unit(self, values: Tensor) -> Tensor:
        return (values - self.low) / (self.high - self.low)

    def logit(self, values: Tensor) -> Tensor:
        return self.to_unit(values).clamp(MIN_DISTANCE, 1 - MIN_DISTANCE).logit()

    def from_unit(self, values: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * values


def fit_token_weights(prefixes: Prefixes, halves: list[Tensor], vocabulary: int) -> tuple[Tensor, Tensor] | None:
    """Token weights [V], and the sums [N, T] of each half by the weights of the other half.

    None where they do not lower the held-out loss by enough standard errors.
    """
    parts = [prefixes.select(half) for half in halves]
    zeros = torch.zeros(vocabulary, dtype=torch.float64)
    without = prefixes.loss(torch.zeros_like(prefixes.logit))
    best, chosen, fitted = without, None, [zeros, zeros]
    for penalty in RIDGE_PENALTIES:
        fitted = [_fit(part, weights, penalty) for part, weights in zip(parts, fitted, strict=True)]
        sums = torch.zeros_like(prefixes.logit)
        for half, part, weights in zip(halves, parts, reversed(fitted), strict=True):
            sums[half] = part.sums(weights)
        loss = prefixes.loss(sums)
        if loss.sum() >= best.sum():
            break
        best, chosen = loss, (penalty, (fitted[0] + fitted[1]) / 2, sums)
    gain = without - best
    if chosen is None or float(gain.mean()) < MIN_STANDARD_ERRORS * float(gain.std()) / len(gain) ** 0.5:
        return None
    penalty, start, sums = chosen
    return _fit(prefixes, start, penalty), sums


def _fit(prefixes: Prefixes, start: Tensor, penalty: float) -> Tensor:
    """The token weights [V] that minimize Σ loss + ½ penalty ‖u‖², by L-BFGS."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = prefixes.loss(prefixes.sums(weights)).sum() + 0.5 * penalty * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach()
