"""Intakes: what takes the draws of one prompt as they come, and gives texts until it has given enough."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.sampling.target_proposal import Draws

if TYPE_CHECKING:
    from tiltlm.sampling.sampler import Metropolis, Resampling

# Nats by which a weight may pass a bound: where log P and log q come from two passes, they round differently.
ROUNDING = 1e-3


class Intake(ABC):
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


class TakingAll(Intake):
    """Everything that is drawn."""

    @property
    def wanted(self) -> float:
        return self.left

    def take(self, draws: Draws) -> Draws | None:
        return self.given(draws, torch.arange(len(draws)))


class Accepting(Intake):
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


class Pool(Intake):
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


class Chains(Intake):
    """Chains that move to the next draw with probability min(1, w(y)/w(x)), and give a text now and then."""

    def __init__(self, n: int, generator: torch.Generator, settings: Metropolis) -> None:
        super().__init__(n, generator)
        self.settings, self.chains = settings, min(settings.chains, n)
        # The step that the chains have taken: −1 until all have begun.
        self.step, self.last_step = -1, settings.steps(n)
        # Where the chains are, as far as they have begun, and draws too few for a step of all.
        self.at: Draws | None = None
        self.rest: Draws | None = None

    @property
    def wanted(self) -> float:
        there = sum(len(part) for part in (self.at, self.rest) if part is not None)
        return self.chains * (1 + self.last_step - max(self.step, 0)) - there

    def take(self, draws: Draws) -> Draws | None:
        if self.rest is not None:
            draws = Draws.concatenate([self.rest, draws])
        draws, begun = self._begun(draws)
        if begun < self.chains:
            self.at, self.rest = draws, None
            return None
        place, rows = torch.arange(self.chains), []
        if self.step < 0:
            self.step = 0
            rows = [place] if self.settings.burn_in == 0 else []
        steps = min((len(draws) - begun) // self.chains, self.last_step - self.step)
        taken = begun + steps * self.chains
        for offered in torch.arange(begun, taken).reshape(steps, self.chains):
            gain = draws.log_weights[offered] - draws.log_weights[place]
            place = torch.where(self.uniform(self.chains).log() < gain, offered, place)
            self.step += 1
            after = self.step - self.settings.burn_in
            if after >= 0 and after % self.settings.thin == 0:
                rows.append(place)
        self.at, self.rest = draws.select(place), draws.select(torch.arange(taken, len(draws)))
        return self.given(draws, torch.cat(rows)) if rows else None

    def _begun(self, draws: Draws) -> tuple[Draws, int]:
        """Where the chains are, before the draws that are left for their steps, and how many have begun."""
        have = 0 if self.at is None else len(self.at)
        if have < self.chains:
            # A chain begins where P > 0: from anywhere else it would take whatever comes.
            hits = (draws.log_weights > -math.inf).nonzero().squeeze(-1)[: self.chains - have]
            after = int(hits[-1]) + 1 if have + len(hits) == self.chains else len(draws)
            draws = draws.select(torch.cat([hits, torch.arange(after, len(draws))]))
            have += len(hits)
        return draws if self.at is None else Draws.concatenate([self.at, draws]), have


def _resampled(log_weights: Tensor, n: int, uniform: Tensor) -> Tensor:
    """Rows [n], each on average n times its share of the weight; none where no row has any."""
    if not bool((log_weights > -math.inf).any()):
        return torch.empty(0, dtype=torch.long)
    upto = log_weights.softmax(0).cumsum(0)
    at = (torch.arange(n, dtype=torch.float64) + uniform) / n
    return torch.searchsorted(upto, at * upto[-1], right=True).clamp_max(int(upto.argmax()))
