"""The twist: what the target still promises after a prefix, estimated from samples of the base; it makes the guide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.lm import Guide, LanguageModel
from tiltlm.targets.constrain import BaseSample
from tiltlm.targets.prefix_states import PrefixStates, prefix_states
from tiltlm.targets.target import Target

# What a position tells of its neighbours: the weight of a state's samples falls by this factor with each token.
NEIGHBOUR = 0.7
# So many samples of a state, as they are at all positions, stand beside those near one position.
PRIOR_SAMPLES = 8.0
# No state is left with less than this share of the mean promise: the guided law must reach all of the target.
FLOOR = 1e-5


@dataclass(frozen=True)
class Twist:
    """ψ(s, t) = E_a[P(x)/a(x) | state s after t tokens]: an average over the samples of the base that pass there.

    ``visited`` [N, T + 1] is the cell of each sample after t tokens, t · 2S + state, in the states of a ``Guide``; a
    row that had ended before points to the cell behind the last. ``length`` is T.
    """

    states: PrefixStates
    visited: Tensor
    length: int

    @staticmethod
    def of(model: LanguageModel, target: Target, base_sample: BaseSample) -> Twist:
        """Follow the samples that the target was fitted on through the states of its features.

        Raises UsageError when no feature says anything of a prefix.
        """
        samples, length = base_sample.samples, base_sample.max_completion_length
        states = prefix_states(model, target.features, samples)
        tokens, mask = samples.tokens.cpu(), samples.mask.cpu()
        guide, cells = states.guide(torch.zeros(1, 2 * len(states.transitions))), 2 * len(states.transitions)
        state, visited = guide.begin(len(samples)), torch.full((len(samples), length + 1), (length + 1) * cells)
        visited[:, 0] = state
        for t in range(tokens.shape[1]):
            state = guide.advance(state, tokens[:, t])
            visited[:, t + 1] = torch.where(mask[:, t], (t + 1) * cells + state, visited[:, t + 1])
        return Twist(states, visited, length)

    def guide(self, log_tilt: Tensor) -> Guide:
        """The guide toward a · exp(``log_tilt``), given log P(x) − log a(x) [N] of the samples; −inf is a filter's no.

        Few samples of a state borrow from those at other positions, fewer still from all samples.
        """
        s = len(self.states.transitions)
        tilt = (log_tilt - log_tilt.logsumexp(0)).exp() * len(log_tilt)  # the mean is 1
        counts, sums = self._totals(torch.ones_like(tilt)), self._totals(tilt)
        # A text cut at the full length is as final as one that has ended.
        final_counts, final_sums = (x[:, s:].sum(0) + x[-1, :s] for x in (counts, sums))
        nothing_known = torch.ones(s, dtype=torch.float64)
        final = _shrunk(final_sums, final_counts, nothing_known, 0.0)
        counts, sums = counts[:-1, :s], sums[:-1, :s]
        anywhere = _shrunk(sums.sum(0), counts.sum(0), nothing_known, 1.0)
        on_the_way = _shrunk(_with_neighbours(sums), _with_neighbours(counts), anywhere, PRIOR_SAMPLES)
        still_open = torch.cat([on_the_way, final[None]])
        return self.states.guide(torch.cat([still_open, final.expand_as(still_open)], 1).clamp_min(FLOOR).log())

    def _totals(self, weights: Tensor) -> Tensor:
        """Σ of weights [N] over the samples that pass each cell [T + 1, 2S]."""
        cells = (self.length + 1) * 2 * len(self.states.transitions)
        spread = weights[:, None].expand_as(self.visited).reshape(-1)
        total = torch.zeros(cells + 1, dtype=torch.float64).index_add_(0, self.visited.reshape(-1), spread)
        return total[:-1].reshape(self.length + 1, -1)


def _shrunk(sums: Tensor, counts: Tensor, prior: Tensor, prior_samples: float) -> Tensor:
    """Means, as if ``prior_samples`` more samples had shown ``prior``; the prior itself where there is nothing."""
    weight = counts + prior_samples
    return torch.where(weight > 0, (sums + prior_samples * prior) / weight.clamp_min(1e-300), prior)


def _with_neighbours(values: Tensor) -> Tensor:
    """Each row [T, S] with those around it, weighted down by their distance."""
    position = torch.arange(len(values), dtype=torch.float64)
    return NEIGHBOUR ** (position[:, None] - position).abs() @ values
