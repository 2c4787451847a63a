"""The guided base itself: everything that it draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.estimation import (
    Closeness,
    Estimate,
    proposal_law,
)
from tiltlm.sampling.sampler import Acceptance, Sampler
from tiltlm.sampling.target_proposal import Draws, Source


@dataclass(frozen=True)
class GuidedBase(Sampler):
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

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Acceptance:
        return AcceptAll(n, generator)


class AcceptAll(Acceptance):
    """Everything that is drawn."""

    @property
    def wanted(self) -> float:
        return self.left

    def take(self, draws: Draws) -> Draws | None:
        return self.given(draws, torch.arange(len(draws)))
