"""Rejection sampling, exact or with a bound that weights may exceed (quasi-rejection)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.estimation import (
    Closeness,
    Estimate,
    acceptance_rate,
    accepted_law,
    log_beta_for_acceptance,
    log_beta_for_kl,
)
from tiltlm.sampling.sampler import Acceptance, Sampler
from tiltlm.sampling.target_proposal import CALLED, Draws, Source
from tiltlm.targets import Target, TiltedTarget

# Quasi-rejection without settings comes as near to p as this, in nats.
NEAR_KL = 0.01
# Nats by which a weight may exceed a bound: log P and log q come from two passes that round differently.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Rejection(Sampler):
    """Keeps x with probability w/β, which is exact where β bounds w = P/q.

    ``log_beta`` is a bound that the caller vouches for, whatever the proposal. By default it is the one that the target
    is known to keep with proposals of the base; UsageError where none is known.
    """

    name: ClassVar[str] = "rejection"
    log_beta: float | None = None

    def __post_init__(self) -> None:
        if self.log_beta is not None and not math.isfinite(self.log_beta):
            raise UsageError(
                f"log_beta: {self.log_beta} must be a finite number, the logarithm of a bound of P(x)/q(x)"
            )

    @property
    def only_source(self) -> Source | None:
        return "base" if self.log_beta is None else None

    @property
    def bound(self) -> float:
        """log β, once it is settled."""
        assert self.log_beta is not None, "settled() comes first"
        return self.log_beta

    def settled(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        return self if self.log_beta is not None else replace(self, log_beta=known_bound(target))

    def words(self, source: Source) -> str:
        return f"rejection: exact draws of p from {CALLED[source]}, where log P/q is at most {self.bound:.4g}"

    def rate(self, log_weights: Tensor, n: int) -> Estimate:
        return acceptance_rate(log_weights, self.bound)

    def law(self, log_weights: Tensor, n: int) -> Closeness:
        return Closeness(Estimate(0.0, 0.0), Estimate(0.0, 0.0))

    def draws(self, n: int, rate: float, hit: float) -> float:
        return n / rate if rate else math.inf

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Acceptance:
        return AcceptWithin(n, generator, self.bound, rate, bounded=True)


@dataclass(frozen=True)
class QuasiRejection(Rejection):
    """Keeps x with probability min(1, w/β), so that what is kept follows p_β ∝ min(P, βq) (arXiv 2112.05702).

    Give ``log_beta``, or the ``acceptance`` that is wanted; by default β is the smallest with KL(p‖p_β) ≤ 0.01 nats.
    """

    name: ClassVar[str] = "qrs"
    acceptance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.acceptance is not None and not 0 < self.acceptance <= 1:
            raise UsageError(f"acceptance: {self.acceptance} must lie in (0, 1]")
        if self.log_beta is not None and self.acceptance is not None:
            raise UsageError(
                "acceptance and log_beta were both given; each follows from the other, so give one of them"
            )

    @property
    def only_source(self) -> Source | None:
        return None

    @property
    def keeps_pilot(self) -> bool:
        return self.log_beta is not None

    def settled(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        if self.log_beta is not None:
            return self
        if self.acceptance is not None:
            return QuasiRejection(log_beta_for_acceptance(weights, self.acceptance))
        return QuasiRejection(log_beta_for_kl(weights, NEAR_KL))

    def words(self, source: Source) -> str:
        return f"qrs: draws of {CALLED[source]}, accepted with probability min(1, P/(β q)), log β = {self.bound:.6g}"

    def law(self, log_weights: Tensor, n: int) -> Closeness:
        return accepted_law(log_weights, self.bound)

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Acceptance:
        return AcceptWithin(n, generator, self.bound, rate, bounded=False)


def known_bound(target: Target) -> float:
    """log max P(x)/a(x): a filter leaves 0 or 1, and a tilt of a binary feature exp(λ) at most.

    Raises UsageError where no bound is known.
    """
    if not isinstance(target, TiltedTarget):
        raise UsageError("sampler: rejection needs a bound of P(x)/a(x), and none is known of this target; choose qrs")
    bound = 0.0
    for term in target.terms:
        if term.kind == "filter":
            continue
        if not term.feature.binary:
            raise UsageError(
                f"sampler: rejection needs a bound of P(x)/a(x), and none is known where '{term.feature.name}', which "
                f"is no binary feature, tilts the base; choose qrs, which needs none"
            )
        bound += max(0.0, term.coefficient)
    return bound


class AcceptWithin(Acceptance):
    """Each draw with probability min(1, w/β); ``bounded`` promises that no w is above β, and is held to it."""

    def __init__(self, n: int, generator: torch.Generator, log_beta: float, rate: float, *, bounded: bool) -> None:
        super().__init__(n, generator)
        self.log_beta, self.rate, self.bounded = log_beta, rate, bounded

    @property
    def wanted(self) -> float:
        # A little more, so that few rounds are drawn for the last texts.
        return 1.2 * self.left / self.rate + 8

    def take(self, draws: Draws) -> Draws | None:
        excess = draws.log_weights - self.log_beta
        row = int(excess.argmax())
        if self.bounded and float(excess[row]) > ROUNDING:
            raise NumericalError(
                f"log_beta: {self.log_beta:g} is no bound: log P(x)/q(x) is {float(draws.log_weights[row]):g} for "
                f"{draws.samples.texts[row]!r:.60}; give a larger one, or choose qrs, which needs none"
            )
        return self.given(draws, (self.uniform(len(draws)).log() < excess).nonzero().squeeze(-1))
