"""Targets: the wanted distribution, as an unnormalized log-score of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.features import Feature

Kind = Literal["filter", "moment", "reward"]


@runtime_checkable
class Target(Protocol):
    """A target: the features that it reads, and the log-score that it computes from them."""

    @property
    def features(self) -> Sequence[Feature]:
        """The K features, in the order of the columns that ``log_score`` reads."""

    def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
        """log P(x) [N], unnormalized, from log a(x) [N] and feature values [N, K]; -inf outside the support."""


@dataclass(frozen=True)
class Term:
    """One factor of a target.

    A ``filter`` keeps only texts whose binary feature is 1; a ``moment`` multiplies by exp(coefficient · φ), where the
    coefficient was fitted so that E_p[φ] = ``goal``; a ``reward`` does so with coefficient 1/β.
    """

    feature: Feature
    kind: Kind
    goal: float | None = None
    coefficient: float = 0.0


@dataclass(frozen=True)
class TiltedTarget:
    """P(x) = a(x) · Π_j b_j(x) · exp(Σ_k λ_k φ_k(x)): filters, moments and rewards in one class (2012.11635, eq. 1)."""

    terms: tuple[Term, ...]

    @property
    def features(self) -> tuple[Feature, ...]:
        return tuple(term.feature for term in self.terms)

    def log_tilt(self, features: Tensor) -> Tensor:
        """log P(x)/a(x) [N] from feature values [N, K], in float64."""
        total = torch.zeros(features.shape[0], dtype=torch.float64, device=features.device)
        for term, values in self._columns(features):
            if term.kind == "filter":
                total = torch.where(values > 0, total, -math.inf)
            else:
                total = total + term.coefficient * values
        return total

    def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
        """log P(x) [N] in float64, -inf outside the support."""
        return base_logprob.double() + self.log_tilt(features)

    def reward(self, features: Tensor) -> Tensor:
        """The target read as a reward [N]: 1 where all filters hold, if it has any, plus Σ λφ of the other terms."""
        allowed = [values > 0 for term, values in self._columns(features) if term.kind == "filter"]
        tilts = [term.coefficient * values for term, values in self._columns(features) if term.kind != "filter"]
        held = [torch.stack(allowed).all(0).double()] if allowed else []
        return torch.stack([*held, *tilts]).sum(0)

    def _columns(self, features: Tensor) -> Iterator[tuple[Term, Tensor]]:
        return zip(self.terms, features.double().unbind(-1), strict=True)


def target_reward(target: Target, base_logprob: Tensor, features: Tensor) -> Tensor:
    """The target read as a reward [N], for methods that maximize one.

    A user's own target may define ``reward(features)``; otherwise the reward is log P − log a. Raises NumericalError
    where that is −∞.
    """
    if hasattr(target, "reward"):
        given: Tensor = target.reward(features)
        return given.double()
    tilt = target.log_score(base_logprob, features).double() - base_logprob
    if not bool(torch.isfinite(tilt).all()):
        raise NumericalError(
            "target: a text outside of its support has log P − log a = −∞, which is no reward; give the target a "
            "method reward(features) -> [N], or choose a method that matches a distribution, e.g. gdc++"
        )
    return tilt
