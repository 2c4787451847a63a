"""Targets: the distribution that is wanted, as an unnormalized log-score of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from tiltlm.features import Feature

Kind = Literal["filter", "moment", "reward"]


@runtime_checkable
class Target(Protocol):
    """What training needs of a target: the features that it reads, and the log-score that it makes of them."""

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
        for term, values in zip(self.terms, features.double().unbind(-1), strict=True):
            if term.kind == "filter":
                total = torch.where(values > 0, total, -math.inf)
            else:
                total = total + term.coefficient * values
        return total

    def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
        """log P(x) [N] in float64, -inf outside the support."""
        return base_logprob.double() + self.log_tilt(features)
