"""Sampling importance resampling: texts from a pool of draws, in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation import Closeness, Estimate, resampled_closeness
from tiltlm.sampling.sampler import AcceptanceStep, Sampler
from tiltlm.sampling.target_proposal import SOURCE_NAMES, Draws, Source
from tiltlm.targets import Target

# The most draws in a pool.
MAX_POOL = 16_384


@dataclass(frozen=True)
class Resampling(Sampler):
    """Draws a pool and chooses texts from it in proportion to their weights, by systematic resampling.

    A pool has ``oversample`` draws for each text and at least ``min_pool`` in all, by default as many as the pilot.
    Texts that need more than 16,384 draws come from several pools.
    """

    name: ClassVar[str] = "resample"
    oversample: int = 32
    min_pool: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("oversample", self.oversample), ("min_pool", self.min_pool)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: {value} must be at least 1, a number of draws")

    @property
    def texts_per_pool(self) -> int:
        """The most texts from one pool."""
        return max(1, MAX_POOL // self.oversample)

    def pool_size(self, n: int) -> int:
        """The draws in the next pool, where ``n`` texts are still to come."""
        return max(self.min_pool or 1, self.oversample * min(n, self.texts_per_pool))

    def fit_pilot(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        return self if self.min_pool is not None else replace(self, min_pool=len(weights[0]))

    def description(self, source: Source) -> str:
        return (
            f"resample: texts chosen by weight P/q from pools of {SOURCE_NAMES[source]}, {self.oversample} draws for "
            f"each text and at least {self.min_pool or 1:,} in a pool"
        )

    def acceptance_rate(self, log_weights: Tensor, n: int) -> Estimate:
        return Estimate(n / self.total_draws(n), 0.0)

    def closeness(self, log_weights: Tensor, n: int) -> Closeness:
        # The last of several pools is the smallest, so its texts are the farthest from p.
        return resampled_closeness(log_weights, self.pool_size(n % self.texts_per_pool or self.texts_per_pool))

    def expected_draws(self, n: int, acceptance: float, support: float) -> float:
        return self.total_draws(n)

    def total_draws(self, n: int) -> int:
        """The draws of all pools for ``n`` texts, if each pool has a draw with P > 0."""
        whole, rest = divmod(n, self.texts_per_pool)
        return whole * self.pool_size(self.texts_per_pool) + (self.pool_size(rest) if rest else 0)

    def start(self, n: int, acceptance: float, generator: torch.Generator) -> AcceptanceStep:
        return ResamplingStep(n, generator, self)


class ResamplingStep(AcceptanceStep):
    """Fills pools and resamples each; a pool without a draw of P > 0 is discarded."""

    def __init__(self, n: int, generator: torch.Generator, settings: Resampling) -> None:
        super().__init__(n, generator)
        self.settings = settings
        self.held: list[Draws] = []

    @property
    def draws_needed(self) -> float:
        return self.settings.total_draws(self.remaining) - sum(map(len, self.held))

    def take(self, draws: Draws) -> Draws | None:
        self.held.append(draws)
        found = []
        while self.remaining and sum(map(len, self.held)) >= (size := self.settings.pool_size(self.remaining)):
            held = Draws.concatenate(self.held)
            count = min(self.remaining, self.settings.texts_per_pool)
            found.append(self.accept(held, _resampled(held.log_weights[:size], count, self.uniform(1))))
            self.held = [held.select(torch.arange(size, len(held)))] if len(held) > size else []
        accepted = [part for part in found if part is not None]
        return Draws.concatenate(accepted) if accepted else None


def _resampled(log_weights: Tensor, n: int, uniform: Tensor) -> Tensor:
    """Systematic resampling: rows [n] in proportion to their weights; no rows where all weights are 0."""
    if not bool((log_weights > -math.inf).any()):
        return torch.empty(0, dtype=torch.long)
    cumulative = log_weights.softmax(0).cumsum(0)
    points = (torch.arange(n, dtype=torch.float64) + uniform) / n
    return torch.searchsorted(cumulative, points * cumulative[-1], right=True).clamp_max(int(cumulative.argmax()))
