"""Samplers: which of a proposal's draws to keep, so that what is kept follows the target, or comes near it.

Each says beforehand, from the weights of a pilot, what it will accept and how near to p its law is; and begins, for one
prompt, an intake that takes draws as they come and gives texts. What happens to one prompt's draws depends on their
weights w = P/q alone, so no prompt's Z is needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tiltlm.errors import UsageError, nearest
from tiltlm.estimation import (
    Closeness,
    Estimate,
    acceptance_rate,
    accepted_law,
    chain_acceptance,
    chain_law,
    log_beta_for_acceptance,
    log_beta_for_kl,
    proposal_law,
    resampled_law,
)
from tiltlm.sampling.acceptance import Accepting, Chains, Intake, Pool, TakingAll
from tiltlm.sampling.target_proposal import CALLED, Source
from tiltlm.targets import Target, TiltedTarget

# Quasi-rejection that is not told otherwise comes as near as this, in nats.
NEAR_KL = 0.01
# Resampling holds no more draws than these at once.
MOST_HELD = 16_384


@dataclass(frozen=True)
class Sampler(ABC):
    """A rule for what to keep, with its settings."""

    name: ClassVar[str]

    @property
    def only_source(self) -> Source | None:
        """The one proposal that it works with, None for any."""
        return None

    @property
    def keeps_pilot(self) -> bool:
        """Whether texts may come from the pilot: not where the weights of its draws decide on a setting."""
        return True

    def settled(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        """This sampler with what was left open decided by a pilot: log-weights [N] of each of its prompts.

        ``source`` names the proposal. Raises UsageError where it cannot work.
        """
        return self

    @abstractmethod
    def words(self, source: Source) -> str:
        """What it does, in a line, once it is settled."""

    @abstractmethod
    def rate(self, log_weights: Tensor, n: int) -> Estimate:
        """The share of proposals that is accepted, for ``n`` texts of a prompt."""

    @abstractmethod
    def law(self, log_weights: Tensor, n: int) -> Closeness:
        """How near to p the law of each of its ``n`` texts is."""

    @abstractmethod
    def draws(self, n: int, rate: float, hit: float) -> float:
        """How many proposals ``n`` texts of a prompt need, about; ``hit`` is the share with P > 0."""

    @abstractmethod
    def begin(self, n: int, rate: float, generator: torch.Generator) -> Intake:
        """An intake that gives ``n`` texts."""


@dataclass(frozen=True)
class Guided(Sampler):
    """All that the guided base draws, as it is: control of a model without tuning it."""

    name: ClassVar[str] = "guided"

    @property
    def only_source(self) -> Source | None:
        return "guided"

    def words(self, source: Source) -> str:
        return "guided: all that the guided base draws, as it is"

    def rate(self, log_weights: Tensor, n: int) -> Estimate:
        return Estimate(1.0, 0.0)

    def law(self, log_weights: Tensor, n: int) -> Closeness:
        return proposal_law(log_weights)

    def draws(self, n: int, rate: float, hit: float) -> float:
        return n

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Intake:
        return TakingAll(n, generator)


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

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Intake:
        return Accepting(n, generator, self.bound, rate, bounded=True)


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

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Intake:
        return Accepting(n, generator, self.bound, rate, bounded=False)


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


@dataclass(frozen=True)
class Resampling(Sampler):
    """Draws a pool, and keeps texts of it in proportion to their weights, by systematic resampling.

    A pool has ``oversample`` draws for each text, and no fewer than ``least`` (by default, those of the pilot); texts
    that would need more than 16,384 draws come from several pools.
    """

    name: ClassVar[str] = "resample"
    oversample: int = 32
    least: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("oversample", self.oversample), ("least", self.least)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: {value} must be at least 1, a number of draws")

    @property
    def block(self) -> int:
        """Texts that one pool gives at most."""
        return max(1, MOST_HELD // self.oversample)

    def pool(self, n: int) -> int:
        """Draws in the pool that gives the next of ``n`` texts."""
        return max(self.least or 1, self.oversample * min(n, self.block))

    def settled(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        return self if self.least is not None else replace(self, least=len(weights[0]))

    def words(self, source: Source) -> str:
        return (
            f"resample: texts chosen by weight P/q from pools of {CALLED[source]}, {self.oversample} draws for each "
            f"text and at least {self.least or 1:,} in a pool"
        )

    def rate(self, log_weights: Tensor, n: int) -> Estimate:
        return Estimate(n / self.needed(n), 0.0)

    def law(self, log_weights: Tensor, n: int) -> Closeness:
        # Of several pools the last is the smallest.
        return resampled_law(log_weights, self.pool(n % self.block or self.block))

    def draws(self, n: int, rate: float, hit: float) -> float:
        return self.needed(n)

    def needed(self, n: int) -> int:
        """Draws of all pools together, where each has a hit."""
        whole, rest = divmod(n, self.block)
        return whole * self.pool(self.block) + (self.pool(rest) if rest else 0)

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Intake:
        return Pool(n, generator, self)


@dataclass(frozen=True)
class Metropolis(Sampler):
    """Independent Metropolis–Hastings: several chains move from x to a draw y with probability min(1, w(y)/w(x)).

    Each begins with the first draw of q in the support, throws away ``burn_in`` steps, and gives its text at every
    ``thin``-th step from there. A prompt with fewer texts than ``chains`` has one chain for each.
    """

    name: ClassVar[str] = "mcmc"
    chains: int = 8
    burn_in: int = 100
    thin: int = 10

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("burn_in", 0), ("thin", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least {least}")

    def words(self, source: Source) -> str:
        return (
            f"mcmc: up to {self.chains} chains for each prompt, which move to draws of {CALLED[source]}; "
            f"{self.burn_in} steps of burn-in, {self.thin} steps from text to text"
        )

    def rate(self, log_weights: Tensor, n: int) -> Estimate:
        return chain_acceptance(log_weights)

    def law(self, log_weights: Tensor, n: int) -> Closeness:
        return chain_law(log_weights, self.burn_in)

    def draws(self, n: int, rate: float, hit: float) -> float:
        return min(self.chains, n) * (1 / hit + self.steps(n)) if hit else math.inf

    def steps(self, n: int) -> int:
        """Steps that each chain takes."""
        return self.burn_in + self.thin * (-(-n // min(self.chains, n)) - 1)

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Intake:
        return Chains(n, generator, self)


SAMPLERS: dict[str, type[Sampler]] = {
    sampler.name: sampler for sampler in (Rejection, QuasiRejection, Resampling, Metropolis, Guided)
}


def build_sampler(name: str, **settings: Any) -> Sampler:
    """The sampler of this name with its settings. Raises UsageError for an unknown name or setting."""
    if name not in SAMPLERS:
        raise UsageError(f"sampler: '{name}' is not known; {nearest(name, SAMPLERS)}")
    for key in settings:
        having = [other for other, kind in SAMPLERS.items() if key in [field.name for field in fields(kind)]]
        if name not in having:
            raise UsageError(f"{key}: a setting of {' and '.join(having) or 'no sampler'}, not of {name}; leave it out")
    return SAMPLERS[name](**settings)
