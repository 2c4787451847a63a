"""The abstract sampler, a rule that accepts some of a proposal's draws, and its abstract acceptance step.

A sampler states its acceptance rate and the distance of its texts from p beforehand, from the weights of a pilot. It
starts one acceptance step for each prompt, which takes draws and returns texts. It uses only the weights w = P/q of
that prompt's draws, so no prompt's Z is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.estimation import Closeness, Estimate
from tiltlm.sampling.target_proposal import Draws, Source
from tiltlm.targets import Target


@dataclass(frozen=True)
class Sampler(ABC):
    """A sampling rule with its settings. ``name`` is its name on the command line."""

    name: ClassVar[str]

    @property
    def required_source(self) -> Source | None:
        """The only proposal that it works with; None for any."""
        return None

    @property
    def keeps_pilot(self) -> bool:
        """Whether pilot draws may become texts. They may not where their weights determined a setting."""
        return True

    def fit_pilot(self, weights: Sequence[Tensor], target: Target, source: Source) -> Sampler:
        """This sampler with all settings fixed, given the log-weights [N] of each prompt of a pilot.

        ``source`` is the proposal. Raises UsageError where the sampler cannot work.
        """
        return self

    @abstractmethod
    def description(self, source: Source) -> str:
        """What it does, in one line; all settings are fixed."""

    @abstractmethod
    def acceptance_rate(self, log_weights: Tensor, n: int) -> Estimate:
        """The share of draws that become texts, for ``n`` texts of a prompt with these log-weights [N]."""

    @abstractmethod
    def closeness(self, log_weights: Tensor, n: int) -> Closeness:
        """KL and TV from p to the distribution of each of ``n`` texts of a prompt with these log-weights [N]."""

    @abstractmethod
    def expected_draws(self, n: int, acceptance: float, support: float) -> float:
        """The expected number of draws for ``n`` texts of a prompt.

        ``acceptance`` is the acceptance rate, ``support`` the share of draws with P > 0.
        """

    @abstractmethod
    def start(self, n: int, acceptance: float, generator: torch.Generator) -> AcceptanceStep:
        """An acceptance step for ``n`` texts of a prompt, with the forecast's acceptance rate."""


class AcceptanceStep(ABC):
    """Takes the draws of one prompt, in order, and returns texts; ``remaining`` texts are still to come."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.remaining, self.generator = n, generator

    @property
    @abstractmethod
    def draws_needed(self) -> float:
        """The expected number of further draws."""

    @abstractmethod
    def take(self, draws: Draws) -> Draws | None:
        """The new texts, given these further draws; None where there are none."""

    def uniform(self, n: int) -> Tensor:
        """Uniform random numbers [n] in [0, 1)."""
        return torch.rand(n, dtype=torch.float64, generator=self.generator)

    def accept(self, draws: Draws, rows: Tensor) -> Draws | None:
        """These rows of the draws as texts, at most ``remaining``."""
        rows = rows[: self.remaining]
        self.remaining -= len(rows)
        return draws.select(rows) if len(rows) else None
