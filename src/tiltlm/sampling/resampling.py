"""Sampling importance resampling: texts from a pool of draws, in proportion to their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation import (
    Closeness,
    Estimate,
    resampled_law,
)
from tiltlm.sampling.sampler import Acceptance, Sampler
from tiltlm.sampling.target_proposal import CALLED, Draws, Source
from tiltlm.targets import Target

# Resampling holds at most this many draws at once.
MOST_HELD = 16_384


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

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Acceptance:
        return DrawPool(n, generator, self)


class DrawPool(Acceptance):
    """Pools of draws, of which some are kept by systematic resampling; a pool without a hit is thrown away."""

    def __init__(self, n: int, generator: torch.Generator, settings: Resampling) -> None:
        super().__init__(n, generator)
        self.settings = settings
        self.held: list[Draws] = []

    @property
    def wanted(self) -> float:
        return self.settings.needed(self.left) - sum(map(len, self.held))

    def take(self, draws: Draws) -> Draws | None:
        self.held.append(draws)
        found = []
        while self.left and sum(map(len, self.held)) >= (size := self.settings.pool(self.left)):
            held = Draws.concatenate(self.held)
            rows = _resampled(held.log_weights[:size], min(self.left, self.settings.block), self.uniform(1))
            found.append(self.given(held, rows))
            self.held = [held.select(torch.arange(size, len(held)))] if len(held) > size else []
        given = [part for part in found if part is not None]
        return Draws.concatenate(given) if given else None


def _resampled(log_weights: Tensor, n: int, uniform: Tensor) -> Tensor:
    """Rows [n], each on average n times its share of the weight; none where no row has any."""
    if not bool((log_weights > -math.inf).any()):
        return torch.empty(0, dtype=torch.long)
    upto = log_weights.softmax(0).cumsum(0)
    at = (torch.arange(n, dtype=torch.float64) + uniform) / n
    return torch.searchsorted(upto, at * upto[-1], right=True).clamp_max(int(upto.argmax()))
