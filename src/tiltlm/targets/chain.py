"""The features' automata on a model's tokens, as a Markov chain whose steps are averages of whole next-token laws.

The law at a prefix tells how likely each step from its state is, also the steps that no sample took. So

    ψ_t(s) = Σ_s' P_t(s → s') ψ_{t+1}(s'),     ψ_T(s) = the mean of P/a over texts that end in state s

is what each state promises, with the noise of few samples averaged out, and where no sample met the target at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tiltlm.lm import Guide, LanguageModel, Samples
from tiltlm.targets.contexts import LastTokens
from tiltlm.targets.prefix_states import PrefixStates

# Steps are averaged over all positions of a stretch; there are at most so many, and with many states fewer.
MOST_STRETCHES, MOST_STEPS = 40, 2**25
ROWS_AT_ONCE = 256
# Visits to a state in one stretch that count as much as what is known of the state in all.
ELSEWHERE = 20.0
# Visits to a state that count as much as what is known of its kin.
KIN = 1.0
# Visits to all of a kin that count as much as the guess that all states after it are equally likely.
GUESS = 0.5


@dataclass
class Chain:
    """``transitions`` [S, V] as in a ``Guide``, for texts of at most ``length`` tokens.

    From a state tokens lead to at most D others: ``successors`` [S, D], the last repeated where there are fewer, and
    ``places`` [S, V] says to which of them each token leads. ``moved`` [G, S, D] sums the probabilities of these over
    prefixes in G stretches of positions, each with its weight; ``weight`` and ``visits`` [G, S] are the sums of the
    weights and the number of prefixes. States of one ``kin`` [S] go on alike where little is known of each.
    """

    transitions: Tensor
    length: int
    successors: Tensor
    places: Tensor
    moved: Tensor
    weight: Tensor
    visits: Tensor
    kin: Tensor

    @staticmethod
    def empty(states: PrefixStates, length: int, device: torch.device | None = None) -> Chain:
        """A chain that has seen nothing."""
        transitions = states.transitions.to(device or "cpu")
        count, device = len(transitions), transitions.device
        successors, places = _successors(transitions)
        stretches = min(length, MOST_STRETCHES, max(1, MOST_STEPS // successors.numel()))
        moved = torch.zeros(stretches, *successors.shape, device=device)
        weight = torch.zeros(stretches, count, dtype=torch.float64, device=device)
        kin = torch.arange(count) if states.kin is None else states.kin
        return Chain(transitions, length, successors, places, moved, weight, torch.zeros_like(weight), kin)

    @torch.no_grad()
    def learn(
        self,
        model: LanguageModel,
        samples: Samples,
        log_weights: Tensor | None = None,
        last_tokens: LastTokens | None = None,
    ) -> None:
        """Add the model's next-token laws at every prefix, to ``last_tokens`` too.

        ``log_weights`` [N, T] are those of the prefixes.
        """
        count, device = len(self.transitions), self.transitions.device
        still = Guide(self.transitions, torch.zeros(1, 2 * count))
        for rows in model.chunks(samples):
            chunk = samples.select(rows).trimmed()
            reading = model.read(chunk).cast()
            places = chunk.flat_rows.to(device), chunk.flat_columns.to(device)
            tokens = chunk.tokens.to(device)
            states = still.states(tokens)[places] % count
            last = pad(tokens[:, :-1], (1, 0), value=self.transitions.shape[1])[places]
            weights = torch.ones(len(states), dtype=torch.float64, device=device)
            if log_weights is not None:
                weights = log_weights[rows.cpu()].to(device)[places].exp()
            for piece in reading.pieces():
                law = reading.logits(piece).float().softmax(-1).to(device)
                self.add(states[piece], places[1][piece], law, weights[piece])
                if last_tokens is not None:
                    last_tokens.add(last[piece], law, weights[piece])

    def add(self, states: Tensor, columns: Tensor, laws: Tensor, weights: Tensor, visits: Tensor | None = None) -> None:
        """Add next-token laws [P, V] at prefixes in these states [P], after as many tokens as ``columns`` [P] say.

        A law may stand for several ``visits`` [P], whose weights [P] are then their sum.
        """
        count, stretches, most = len(self.transitions), len(self.moved), self.moved.shape[-1]
        cells = columns * stretches // self.length * count + states
        moved = torch.zeros(len(cells), most, device=self.moved.device)
        moved.scatter_add_(1, self.places[states].long(), laws.float() * weights[:, None].float())
        self.moved.view(-1, most).index_add_(0, cells, moved)
        self.weight.view(-1).index_add_(0, cells, weights)
        self.visits.view(-1).index_add_(0, cells, torch.ones_like(weights) if visits is None else visits)

    def promise(self, final: Tensor) -> Tensor:
        """ψ [T + 1, S] of the states after each number of tokens, given that of texts that have ended [S]."""
        promises, stretches, steps, successors = [final], len(self.moved), self._steps(), self.successors.cpu()
        here = [t * stretches // self.length for t in range(self.length)]
        for stretch in reversed(range(stretches)):
            step = steps(stretch)
            for _ in range(here.count(stretch)):
                promises.append(torch.linalg.vecdot(step, torch.cat([promises[-1], final])[successors]))
        return torch.stack(promises[::-1])

    def _steps(self) -> Callable[[int], Tensor]:
        """What gives the probabilities [S, D] of the successors in a stretch."""
        successors = self.successors.cpu()
        # Repeated ones have no token; that a text ends is not guessed.
        possible = torch.ones_like(successors, dtype=torch.float64)
        possible[:, 1:] = (successors[:, 1:] != successors[:, :-1]).double()
        possible[successors >= len(successors)] = 0.0
        guess = possible / possible.sum(1, keepdim=True).clamp_min(1.0)
        weight, visits = self.weight.cpu(), self.visits.cpu()
        moved, weights, visited = self.moved.sum(0, dtype=torch.float64).cpu(), weight.sum(0), visits.sum(0)
        of_kin = [torch.zeros_like(x).index_add_(0, self.kin, x)[self.kin] for x in (moved, weights, visited)]
        anywhere = _mean(moved, weights, visited, _mean(of_kin[0], of_kin[1], of_kin[2], guess, GUESS), KIN)

        def step(stretch: int) -> Tensor:
            return _mean(self.moved[stretch].cpu().double(), weight[stretch], visits[stretch], anywhere, ELSEWHERE)

        return step


def _successors(transitions: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct states of each row [S, D], the last repeated; and the place of each token's among them [S, V]."""
    rows, places = [], []
    for some in torch.split(transitions, ROWS_AT_ONCE):
        ordered, tokens = some.sort(1)
        place = pad((ordered.diff(dim=1) != 0).cumsum(1), (1, 0))
        found = ordered[:, -1:].repeat(1, int(place.max()) + 1)
        rows.append(found.scatter_(1, place, ordered))
        places.append(torch.empty_like(place).scatter_(1, tokens, place).int())
    most = max(row.shape[1] for row in rows)
    return torch.cat([torch.cat([r, r[:, -1:].expand(-1, most - r.shape[1])], 1) for r in rows]), torch.cat(places)


def _mean(sums: Tensor, weight: Tensor, visits: Tensor, prior: Tensor, prior_visits: float) -> Tensor:
    """Weighted means [S, D] of n visits each, as if ``prior_visits`` more had shown ``prior``."""
    means = sums / weight.clamp_min(1e-300)[:, None]
    found = (means * visits[:, None] + prior_visits * prior) / (visits + prior_visits)[:, None]
    return found / found.sum(1, keepdim=True)
