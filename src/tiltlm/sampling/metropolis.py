"""Independent Metropolis–Hastings: chains that move among a proposal's draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation import (
    Closeness,
    Estimate,
    chain_acceptance,
    chain_law,
)
from tiltlm.sampling.sampler import Acceptance, Sampler
from tiltlm.sampling.target_proposal import CALLED, Draws, Source


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

    def begin(self, n: int, rate: float, generator: torch.Generator) -> Acceptance:
        return MetropolisChains(n, generator, self)


class MetropolisChains(Acceptance):
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
