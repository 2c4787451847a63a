"""Rejection sampling, and quasi-rejection sampling, whose bound some weights may exceed."""

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
    accepted_closeness,
    log_beta_for_acceptance,
    log_beta_for_kl,
)
from tiltlm.sampling.sampler import AcceptanceStep, Sampler
from tiltlm.sampling.target_proposal import SOURCE_NAMES, Draws, Source
from tiltlm.targets import Target, TiltedTarget

# Nats of KL(p‖p_β) that quasi-rejection allows by default.
DEFAULT_KL = 0.01
# Nats by which a log-weight may exceed a true bound: log P and log q come from two passes that round differently.
ROUNDING = 1e-3


@dataclass(frozen=True)
class Rejection(Sampler):
    """Accepts x with probability w/β. The texts follow p exactly where β bounds w = P/q.

    ``log_beta`` is a bound that the caller guarantees, for any proposal. By default it is the known bound of the target
    for draws of the base; UsageError where none is known.
    """

    name: ClassVar[str] = "rejection"
    log_beta: float | None = None

    def __post_init__(self) -> None:
        if self.log_beta is not None and not math.isfinite(self.log_beta):
            raise UsageError(
                f"log_beta: {self.log_beta} must be a finite number, the logarithm of a bound of P(x)/q(x)"
            )

    @property
    def required_source(self) -> Source | None:
        return "base" if self.log_beta is None else None

    @property
    def bound(self) -> float:
        """log β, after ``fit_pilot``."""
        assert self.log_beta is not None, "fit_pilot() comes first"
        return self.log_beta

    def fit_pilot(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        return self if self.log_beta is not None else replace(self, log_beta=known_bound(target))

    def description(self, source: Source) -> str:
        return f"rejection: exact draws of p from {SOURCE_NAMES[source]}, where log P/q is at most {self.bound:.4g}"

    def acceptance_rate(self, log_weights: Tensor, n: int) -> Estimate:
        return acceptance_rate(log_weights, self.bound)

    def closeness(self, log_weights: Tensor, n: int) -> Closeness:
        return Closeness(Estimate(0.0, 0.0), Estimate(0.0, 0.0))

    def expected_draws(self, n: int, acceptance: float, support: float) -> float:
        return n / acceptance if acceptance else math.inf

    def start(self, n: int, acceptance: float, generator: torch.Generator) -> AcceptanceStep:
        return RejectionStep(n, generator, self.bound, acceptance, exact=True)


@dataclass(frozen=True)
class QuasiRejection(Rejection):
    """Accepts x with probability min(1, w/β). The texts follow p_β ∝ min(P, βq) (arXiv 2112.05702).

    Set ``log_beta``, or an ``acceptance`` rate. By default β is the smallest with KL(p‖p_β) ≤ 0.01 nats.
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
    def required_source(self) -> Source | None:
        return None

    @property
    def keeps_pilot(self) -> bool:
        return self.log_beta is not None

    def fit_pilot(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        if self.log_beta is not None:
            return self
        if self.acceptance is not None:
            return QuasiRejection(log_beta_for_acceptance(weights, self.acceptance))
        return QuasiRejection(log_beta_for_kl(weights, DEFAULT_KL))

    def description(self, source: Source) -> str:
        return (
            f"qrs: draws of {SOURCE_NAMES[source]}, accepted with probability min(1, P/(β q)), log β = {self.bound:.6g}"
        )

    def closeness(self, log_weights: Tensor, n: int) -> Closeness:
        return accepted_closeness(log_weights, self.bound)

    def start(self, n: int, acceptance: float, generator: torch.Generator) -> AcceptanceStep:
        return RejectionStep(n, generator, self.bound, acceptance, exact=False)


def known_bound(target: Target) -> float:
    """log max P(x)/a(x): a filter gives 0 or 1, the tilt of a binary feature at most exp(λ).

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
                f"sampler: rejection needs a bound of P(x)/a(x), and none is known for the tilt of "
                f"'{term.feature.name}', which is no binary feature; choose qrs, which needs none"
            )
        bound += max(0.0, term.coefficient)
    return bound


class RejectionStep(AcceptanceStep):
    """Accepts each draw with probability min(1, w/β); raises NumericalError for w > β where the step is ``exact``."""

    def __init__(self, n: int, generator: torch.Generator, log_beta: float, acceptance: float, *, exact: bool) -> None:
        super().__init__(n, generator)
        self.log_beta, self.acceptance, self.exact = log_beta, acceptance, exact

    @property
    def draws_needed(self) -> float:
        # A little more, so that the last texts take few rounds.
        return 1.2 * self.remaining / self.acceptance + 8

    def take(self, draws: Draws) -> Draws | None:
        excess = draws.log_weights - self.log_beta
        row = int(excess.argmax())
        if self.exact and float(excess[row]) > ROUNDING:
            raise NumericalError(
                f"log_beta: {self.log_beta:g} is no bound: log P(x)/q(x) is {float(draws.log_weights[row]):g} for "
                f"{draws.samples.texts[row]!r:.60}; give a larger one, or choose qrs, which needs none"
            )
        return self.accept(draws, (self.uniform(len(draws)).log() < excess).nonzero().squeeze(-1))
