"""Independent Metropolis–Hastings: Markov chains whose moves are proposed by independent draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation import Closeness, Estimate, chain_acceptance, chain_closeness
from tiltlm.sampling.sampler import AcceptanceStep, Sampler
from tiltlm.sampling.target_proposal import SOURCE_NAMES, Draws, Source


@dataclass(frozen=True)
class Metropolis(Sampler):
    """Independent Metropolis–Hastings: each chain moves from x to a draw y with probability min(1, w(y)/w(x)).

    A chain starts at its first draw with P > 0, discards ``burn_in`` steps, then returns a text at every ``thin``-th
    step. A prompt with fewer texts than ``chains`` has one chain for each text.
    """

    name: ClassVar[str] = "mcmc"
    chains: int = 8
    burn_in: int = 100
    thin: int = 10

    def __post_init__(self) -> None:
        for name, least in (("chains", 1), ("burn_in", 0), ("thin", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: {getattr(self, name)} must be at least {least}")

    def description(self, source: Source) -> str:
        return (
            f"mcmc: up to {self.chains} chains for each prompt, which move to draws of {SOURCE_NAMES[source]}; "
            f"{self.burn_in} steps of burn-in, {self.thin} steps from text to text"
        )

    def acceptance_rate(self, log_weights: Tensor, n: int) -> Estimate:
        return chain_acceptance(log_weights)

    def closeness(self, log_weights: Tensor, n: int) -> Closeness:
        return chain_closeness(log_weights, self.burn_in)

    def expected_draws(self, n: int, acceptance: float, support: float) -> float:
        return min(self.chains, n) * (1 / support + self.steps(n)) if support else math.inf

    def steps(self, n: int) -> int:
        """The steps of each chain for ``n`` texts."""
        return self.burn_in + self.thin * (-(-n // min(self.chains, n)) - 1)

    def start(self, n: int, acceptance: float, generator: torch.Generator) -> AcceptanceStep:
        return MetropolisStep(n, generator, self)


class MetropolisStep(AcceptanceStep):
    """The chains of one prompt, all at the same step."""

    def __init__(self, n: int, generator: torch.Generator, settings: Metropolis) -> None:
        super().__init__(n, generator)
        self.settings, self.chains = settings, min(settings.chains, n)
        # −1 until all chains have started.
        self.step, self.last_step = -1, settings.steps(n)
        # The current draws of the started chains, and draws too few for a step of all chains.
        self.current: Draws | None = None
        self.rest: Draws | None = None

    @property
    def draws_needed(self) -> float:
        held = sum(len(part) for part in (self.current, self.rest) if part is not None)
        return self.chains * (1 + self.last_step - max(self.step, 0)) - held

    def take(self, draws: Draws) -> Draws | None:
        if self.rest is not None:
            draws = Draws.concatenate([self.rest, draws])
        draws, started = self._start_chains(draws)
        if started < self.chains:
            self.current, self.rest = draws, None
            return None
        position, rows = torch.arange(self.chains), []
        if self.step < 0:
            self.step = 0
            rows = [position] if self.settings.burn_in == 0 else []
        steps = min((len(draws) - started) // self.chains, self.last_step - self.step)
        used = started + steps * self.chains
        for proposed in torch.arange(started, used).reshape(steps, self.chains):
            log_ratio = draws.log_weights[proposed] - draws.log_weights[position]
            position = torch.where(self.uniform(self.chains).log() < log_ratio, proposed, position)
            self.step += 1
            after = self.step - self.settings.burn_in
            if after >= 0 and after % self.settings.thin == 0:
                rows.append(position)
        self.current, self.rest = draws.select(position), draws.select(torch.arange(used, len(draws)))
        return self.accept(draws, torch.cat(rows)) if rows else None

    def _start_chains(self, draws: Draws) -> tuple[Draws, int]:
        """The chains' current draws, followed by the draws left for steps, and the number of started chains."""
        started = 0 if self.current is None else len(self.current)
        if started < self.chains:
            # A chain starts where P > 0: from elsewhere it would accept any draw.
            hits = (draws.log_weights > -math.inf).nonzero().squeeze(-1)[: self.chains - started]
            after = int(hits[-1]) + 1 if started + len(hits) == self.chains else len(draws)
            draws = draws.select(torch.cat([hits, torch.arange(after, len(draws))]))
            started += len(hits)
        return draws if self.current is None else Draws.concatenate([self.current, draws]), started
