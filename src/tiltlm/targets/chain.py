"""The features' automata on a model's tokens, as a Markov chain whose steps are averages of whole next-token laws.

The law at a prefix tells how likely each step from its state is, also the steps that no sample took. So

    ψ_t(s) = Σ_s' P_t(s → s') ψ_{t+1}(s'),     ψ_T(s) = the mean of P/a over texts that end in state s

is what each state promises, with the noise of few samples averaged out, and where no sample met the target at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.lm import Guide, LanguageModel, Samples

# Steps are averaged over all positions of a stretch; there are at most so many.
MOST_STRETCHES = 40
# Visits to a state in one stretch that count as much as what is known of the state in all.
ELSEWHERE = 20.0
# Visits to a state that count as much as the guess that all states after it are equally likely.
GUESS = 0.5


@dataclass
class Chain:
    """``transitions`` [S, V] as in a ``Guide``, for texts of at most ``length`` tokens.

    ``moved`` [G, S, 2S] sums the probabilities of each next state over prefixes in G stretches of positions, each with
    its weight; ``weight`` and ``visits`` [G, S] are the sums of the weights and the number of prefixes.
    """

    transitions: Tensor
    length: int
    moved: Tensor
    weight: Tensor
    visits: Tensor

    @staticmethod
    def empty(transitions: Tensor, length: int) -> Chain:
        """A chain that has seen nothing."""
        count, stretches = len(transitions), min(length, MOST_STRETCHES)
        device = transitions.device
        moved = torch.zeros(stretches, count, 2 * count, device=device)
        weight = torch.zeros(stretches, count, dtype=torch.float64, device=device)
        return Chain(transitions, length, moved, weight, torch.zeros_like(weight))

    @torch.no_grad()
    def learn(self, model: LanguageModel, samples: Samples, log_weights: Tensor | None = None) -> None:
        """Add the model's next-token laws at every prefix; ``log_weights`` [N, T] are those of the prefixes."""
        count, device = len(self.transitions), self.transitions.device
        still = Guide(self.transitions, torch.zeros(1, 2 * count))
        for rows in model.chunks(samples):
            chunk = samples.select(rows).trimmed()
            reading = model.read(chunk).cast()
            places = chunk.flat_rows.to(device), chunk.flat_columns.to(device)
            states = still.states(chunk.tokens.to(device))[places] % count
            weights = torch.ones(len(states), dtype=torch.float64, device=device)
            if log_weights is not None:
                weights = log_weights[rows.cpu()].to(device)[places].exp()
            for piece in reading.pieces():
                law = reading.logits(piece).float().softmax(-1).to(device)
                self.add(states[piece], places[1][piece], law, weights[piece])

    def add(self, states: Tensor, columns: Tensor, laws: Tensor, weights: Tensor, visits: Tensor | None = None) -> None:
        """Add next-token laws [P, V] at prefixes in these states [P], after as many tokens as ``columns`` [P] say.

        A law may stand for several ``visits`` [P], whose weights [P] are then their sum.
        """
        count, stretches = len(self.transitions), len(self.moved)
        cells = columns * stretches // self.length * count + states
        moved = torch.zeros(len(cells), 2 * count, device=self.moved.device)
        moved.scatter_add_(1, self.transitions[states], laws.float() * weights[:, None].float())
        self.moved.view(-1, 2 * count).index_add_(0, cells, moved)
        self.weight.view(-1).index_add_(0, cells, weights)
        self.visits.view(-1).index_add_(0, cells, torch.ones_like(weights) if visits is None else visits)

    def promise(self, final: Tensor) -> Tensor:
        """ψ [T + 1, S] of the states after each number of tokens, given that of texts that have ended [S]."""
        steps, stretches = self._steps(), len(self.moved)
        promises = [final]
        for t in reversed(range(self.length)):
            promises.append(steps[t * stretches // self.length] @ torch.cat([promises[-1], final]))
        return torch.stack(promises[::-1])

    def _steps(self) -> list[Tensor]:
        """Probabilities [S, 2S] of the next state in each stretch."""
        count = len(self.transitions)
        possible = torch.zeros(count, 2 * count, dtype=torch.float64).scatter_(1, self.transitions.cpu(), 1.0)
        possible[:, count:] = 0.0
        guess = possible / possible.sum(1, keepdim=True).clamp_min(1.0)
        moved, weight, visits = self.moved.cpu().double(), self.weight.cpu(), self.visits.cpu()
        anywhere = _mean(moved.sum(0), weight.sum(0), visits.sum(0), guess, GUESS)
        return [_mean(m, w, n, anywhere, ELSEWHERE) for m, w, n in zip(moved, weight, visits, strict=True)]


def _mean(sums: Tensor, weight: Tensor, visits: Tensor, prior: Tensor, prior_visits: float) -> Tensor:
    """Weighted means [S, 2S] of n visits each, as if ``prior_visits`` more had shown ``prior``."""
    means = sums / weight.clamp_min(1e-300)[:, None]
    found = (means * visits[:, None] + prior_visits * prior) / (visits + prior_visits)[:, None]
    return found / found.sum(1, keepdim=True)
