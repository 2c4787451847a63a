"""The guided base without any rejection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.estimation import Closeness, Estimate, proposal_closeness
from tiltlm.sampling.sampler import AcceptanceStep, Sampler
from tiltlm.sampling.target_proposal import Draws, Source


@dataclass(frozen=True)
class GuidedBase(Sampler):
    """Accepts all draws of the guided base."""

    name: ClassVar[str] = "guided"

    @property
    def required_source(self) -> Source | None:
        return "guided"

    def description(self, source: Source) -> str:
        return "guided: all draws of the guided base"

    def acceptance_rate(self, log_weights: Tensor, n: int) -> Estimate:
        return Estimate(1.0, 0.0)

    def closeness(self, log_weights: Tensor, n: int) -> Closeness:
        return proposal_closeness(log_weights)

    def expected_draws(self, n: int, acceptance: float, support: float) -> float:
        return n

    def start(self, n: int, acceptance: float, generator: torch.Generator) -> AcceptanceStep:
        return GuidedBaseStep(n, generator)


class GuidedBaseStep(AcceptanceStep):
    """Accepts every draw."""

    @property
    def draws_needed(self) -> float:
        return self.remaining

    def take(self, draws: Draws) -> Draws | None:
        return self.accept(draws, torch.arange(len(draws)))
