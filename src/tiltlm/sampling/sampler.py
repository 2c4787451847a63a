"""What a sampler of the target is: a rule that keeps some of a proposal's draws, and the step that applies it.

A sampler says beforehand, from the weights of a pilot, its acceptance rate and how near to p its texts are. For each
prompt it begins an acceptance step, which takes draws as they come and returns texts. A prompt's draws are judged by
their weights w = P/q alone, so no prompt's Z is needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.estimation import (
    Closeness,
    Estimate,
)
from tiltlm.sampling.target_proposal import Draws, Source
from tiltlm.targets import Target


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
    def begin(self, n: int, rate: float, generator: torch.Generator) -> Acceptance:
        """An intake that gives ``n`` texts."""


class Acceptance(ABC):
    """Takes the draws of one prompt until it has given ``left`` more texts."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.left, self.generator = n, generator

    @property
    @abstractmethod
    def wanted(self) -> float:
        """About how many draws it still needs."""

    @abstractmethod
    def take(self, draws: Draws) -> Draws | None:
        """The texts that follow from these draws and those before them, if any."""

    def uniform(self, n: int) -> Tensor:
        """Numbers [n] in [0, 1), from the sampler's generator."""
        return torch.rand(n, dtype=torch.float64, generator=self.generator)

    def given(self, draws: Draws, rows: Tensor) -> Draws | None:
        """These rows of the draws, no more than are left."""
        rows = rows[: self.left]
        self.left -= len(rows)
        return draws.select(rows) if len(rows) else None
