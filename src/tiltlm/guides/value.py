"""The twist: what the target still promises after a prefix, estimated from samples of the base; it makes the guide."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.learned import LearnedStates
from tiltlm.guides.token_states import TokenStates
from tiltlm.lm import Guide
from tiltlm.targets.base_sample import BaseSample
from tiltlm.targets.target import Target

# What a position tells of its neighbours: the weight of a state's samples falls by this factor with each token.
NEIGHBOUR = 0.7
# So many samples of a state, as they are at all positions, stand beside those near one position.
PRIOR_SAMPLES = 8.0
# What the features say of a text that ends in a state counts as so many samples that end there.
TOLD_SAMPLES = 2.0
# No state is left with less than this share of the mean promise: the guided law must reach all of the target.
FLOOR = 1e-5


@dataclass(frozen=True)
class ValueFunction:
    """ψ(s, t) = E_a[P(x)/a(x) | state s after t tokens], estimated from samples.

    ``visited`` [N, T + 1] is the cell of each sample after t tokens, t · 2S + state, in the states of a ``Guide``; a
    row that had ended before points to the cell behind the last. ``length`` is T. With a ``chain`` ψ follows from its
    steps and from what ended texts are worth; without, it is an average over the samples that pass each cell.
    ``learned`` are states for features that no automaton reads. It took ``forward_passes`` of all samples.
    """

    states: TokenStates
    visited: Tensor
    length: int
    chain: MarkovChain | None = None
    learned: LearnedStates | None = None
    forward_passes: int = 0

    def states_before(self, mask: Tensor) -> Tensor:
        """The states of the samples before each of their tokens [N, T], −1 where ``mask`` [N, T] is 0."""
        before = self.visited[:, : mask.shape[1]] % (2 * len(self.states.transitions))
        return torch.where(mask, before, -1)

    def guide_toward(self, target: Target, base_sample: BaseSample) -> Guide:
        """The guide toward a target, by the samples that this twist was made of."""
        return self.guide(base_sample.log_weights(target), base_sample.log_ratio, self.final_log_tilt(target))

    def final_log_tilt(self, target: Target) -> Tensor | None:
        """log P(x) − log a(x) [S] of a text that ends in each state; None where the automata do not tell it."""
        values = self.states.values
        if values is None:
            return None
        return target.log_score(torch.zeros(len(values), dtype=torch.float64), values).double()

    def guide(self, log_weights: Tensor, log_ratio: Tensor | None = None, of_states: Tensor | None = None) -> Guide:
        """The guide toward P, given log P(x) − log q(x) [N] of the samples, −inf for a filter's no.

        ``log_ratio`` [N] is log a(x) − log q(x), 0 where the base drew them; ``of_states`` [S] is log P(x) − log a(x)
        of a text that ends in each state, where that is known, and may be all that is.
        """
        known = log_weights if of_states is None else torch.cat([log_weights, of_states])
        greatest = known[known > -math.inf].max() if bool((known > -math.inf).any()) else 0.0
        weights = (log_weights - greatest).exp()
        ratios = torch.ones_like(weights) if log_ratio is None else log_ratio.exp()
        told = (of_states - greatest).exp() if of_states is not None else None
        counts, sums = self._totals(ratios), self._totals(weights)
        mean = weights.sum() / ratios.sum()
        final = self._final(counts, sums, mean, told)
        if self.chain is not None:
            guide = build_guide(self.states, self.chain.promise(final), final)
        else:
            guide = build_guide(self.states, self._table(counts, sums, mean, final), final, mean)
        scale = guide.log_scale + float(greatest)
        if self.learned is not None:
            guide = self.learned.guide(guide, self.along(guide), weights / ratios / mean)
        return replace(guide, log_scale=scale)

    def along(self, guide: Guide) -> Tensor:
        """log ψ of the guide's states after each token of the samples [N, T], 0 where a row had ended before."""
        cells = guide.log_value_table.reshape(-1)
        return torch.cat([cells, cells.new_zeros(1)])[self.visited[:, 1:]]

    def _final(self, counts: Tensor, sums: Tensor, mean: Tensor, told: Tensor | None) -> Tensor:
        """The worth [S] of texts that have ended."""
        s = len(self.states.transitions)
        # A text cut at the full length is as final as one that has ended.
        counts, sums = (x[:, s:].sum(0) + x[-1, :s] for x in (counts, sums))
        if told is None:
            return _shrunk(sums, counts, mean.expand(s), 0.0)
        # An automaton may leave out subtleties: what it tells is worth what texts were worth of which it told as much,
        # and first of all those that have the same count.
        worth, groups = told, [torch.unique(told, return_inverse=True)[1]]
        groups += [] if self.states.counted is None else [self.states.counted]
        for of in groups:
            alike = torch.zeros(int(of.max()) + 1, dtype=told.dtype)
            summed, counted = (alike.index_add(0, of, x)[of] for x in (sums, counts))
            worth = _shrunk(summed, counted, worth, TOLD_SAMPLES)
        return _shrunk(sums, counts, worth, TOLD_SAMPLES)

    def _table(self, counts: Tensor, sums: Tensor, mean: Tensor, final: Tensor) -> Tensor:
        """ψ [T + 1, S] where the samples passed; few borrow from other positions, fewer still from all samples."""
        s = len(self.states.transitions)
        counts, sums = counts[:-1, :s], sums[:-1, :s]
        anywhere = _shrunk(sums.sum(0), counts.sum(0), mean.expand(s), 1.0)
        on_the_way = _shrunk(_with_neighbours(sums), _with_neighbours(counts), anywhere, PRIOR_SAMPLES)
        return torch.cat([on_the_way, final[None]])

    def _totals(self, weights: Tensor) -> Tensor:
        """Σ of weights [N] over the samples that pass each cell [T + 1, 2S]."""
        cells = (self.length + 1) * 2 * len(self.states.transitions)
        spread = weights[:, None].expand_as(self.visited).reshape(-1)
        total = torch.zeros(cells + 1, dtype=torch.float64).index_add_(0, self.visited.reshape(-1), spread)
        return total[:-1].reshape(self.length + 1, -1)


def build_guide(states: TokenStates, promise: Tensor, final: Tensor, mean: Tensor | None = None) -> Guide:
    """The guide of what open states promise [T + 1, S] and ended texts are worth [S]; ``mean`` is that of all texts."""
    both = torch.cat([promise, final.expand_as(promise)], 1)
    mean = promise[0, states.start] if mean is None else mean
    # Where nothing is known to be worth anything, all is worth as much.
    if float(mean) <= 0:
        return states.guide(torch.zeros_like(both))
    return replace(states.guide((both / mean).clamp_min(FLOOR).log()), log_scale=math.log(mean))


def cells_visited(states: TokenStates, tokens: Tensor, mask: Tensor, length: int) -> Tensor:
    """The cells [N, length + 1] of samples with these tokens [N, T]; see ``ValueFunction``."""
    count = 2 * len(states.transitions)
    guide = states.guide(torch.zeros(1, count))
    state, visited = guide.begin(len(tokens)), torch.full((len(tokens), length + 1), (length + 1) * count)
    visited[:, 0] = state
    for t in range(tokens.shape[1]):
        state = guide.advance(state, tokens[:, t])
        visited[:, t + 1] = torch.where(mask[:, t], (t + 1) * count + state, visited[:, t + 1])
    return visited


def _shrunk(sums: Tensor, counts: Tensor, prior: Tensor, prior_samples: float) -> Tensor:
    """Means, as if ``prior_samples`` more samples had shown ``prior``; the prior itself where there is nothing."""
    weight = counts + prior_samples
    return torch.where(weight > 0, (sums + prior_samples * prior) / weight.clamp_min(1e-300), prior)


def _with_neighbours(values: Tensor) -> Tensor:
    """Each row [T, S] with those around it, weighted down by their distance."""
    position = torch.arange(len(values), dtype=torch.float64)
    return NEIGHBOUR ** (position[:, None] - position).abs() @ values
