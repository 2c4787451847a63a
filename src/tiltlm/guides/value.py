"""The value function of prefixes, ψ = E_a[P/a | prefix], estimated from samples of the base; and the guide from it."""

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

# The weight of a state's samples falls by this factor with each token of distance in position.
POSITION_DECAY = 0.7
# The mean over all positions counts as this many samples at each position.
PRIOR_SAMPLES = 8.0
# The value computed from a final state's features counts as this many samples that end in it.
FEATURE_PRIOR_SAMPLES = 2.0
# The smallest ψ, in units of its mean: a guided base must reach all of the target's support.
MIN_VALUE = 1e-5


@dataclass(frozen=True)
class ValueFunction:
    """ψ(s, t) = E_a[P(x)/a(x) | state s after t tokens], estimated from N samples of at most ``length`` = T tokens.

    ``cells`` [N, T + 1] is the cell of each sample after t tokens, t · 2S + state, in the states of a ``Guide``; one
    past the last cell where the text had ended before. With a ``chain`` ψ follows from its transitions and the values
    of finished texts. Without one it is the mean over the samples in each cell. ``learned`` adds states for features
    without an automaton. ``forward_passes`` is how often the base read all samples for it.
    """

    states: TokenStates
    cells: Tensor
    length: int
    chain: MarkovChain | None = None
    learned: LearnedStates | None = None
    forward_passes: int = 0

    def states_before(self, mask: Tensor) -> Tensor:
        """The states of the samples before each of their tokens [N, T], −1 where ``mask`` [N, T] is 0."""
        before = self.cells[:, : mask.shape[1]] % (2 * len(self.states.transitions))
        return torch.where(mask, before, -1)

    def guide_toward(self, target: Target, base_sample: BaseSample) -> Guide:
        """The guide toward a target, by the samples of this value function."""
        return self.guide(base_sample.log_weights(target), base_sample.log_ratio, self.final_log_tilt(target))

    def final_log_tilt(self, target: Target) -> Tensor | None:
        """log P(x) − log a(x) [S] of a text that ends in each state; None where a feature has no automaton."""
        values = self.states.values
        if values is None:
            return None
        return target.log_score(torch.zeros(len(values), dtype=torch.float64), values).double()

    def guide(
        self, log_weights: Tensor, log_ratio: Tensor | None = None, final_log_tilt: Tensor | None = None
    ) -> Guide:
        """The guide toward P, from log P(x) − log q(x) [N] of the samples, −inf outside of the support.

        ``log_ratio`` [N] is log a(x) − log q(x), by default 0 for samples of the base. ``final_log_tilt`` [S] is
        log P(x) − log a(x) of a text that ends in each state, where it is known.
        """
        known = log_weights if final_log_tilt is None else torch.cat([log_weights, final_log_tilt])
        greatest = known[known > -math.inf].max() if bool((known > -math.inf).any()) else 0.0
        weights = (log_weights - greatest).exp()
        ratios = torch.ones_like(weights) if log_ratio is None else log_ratio.exp()
        tilt = (final_log_tilt - greatest).exp() if final_log_tilt is not None else None
        counts, sums = self._cell_sums(ratios), self._cell_sums(weights)
        mean = weights.sum() / ratios.sum()
        final = self._final_values(counts, sums, mean, tilt)
        if self.chain is not None:
            guide = build_guide(self.states, self.chain.values(final), final)
        else:
            guide = build_guide(self.states, self._cell_means(counts, sums, mean, final), final, mean)
        scale = guide.log_scale + float(greatest)
        if self.learned is not None:
            guide = self.learned.guide(guide, self.sample_log_values(guide), weights / ratios / mean)
        return replace(guide, log_scale=scale)

    def sample_log_values(self, guide: Guide) -> Tensor:
        """log ψ of the guide after each token of the samples [N, T], 0 where the text had ended before."""
        table = guide.log_value_table.reshape(-1)
        return torch.cat([table, table.new_zeros(1)])[self.cells[:, 1:]]

    def _final_values(self, counts: Tensor, sums: Tensor, mean: Tensor, tilt: Tensor | None) -> Tensor:
        """The values [S] of finished texts, by their last state."""
        s = len(self.states.transitions)
        # A text cut at the full length is as final as one that has ended.
        counts, sums = (x[:, s:].sum(0) + x[-1, :s] for x in (counts, sums))
        if tilt is None:
            return _mean_with_prior(sums, counts, mean.expand(s), 0.0)
        # An automaton may only approximate its feature. So the computed value is corrected by the samples: first over
        # all states with the same computed value, then over those with the same count, then by state.
        values, groups = tilt, [torch.unique(tilt, return_inverse=True)[1]]
        groups += [] if self.states.final_count is None else [self.states.final_count]
        for group in groups:
            zeros = torch.zeros(int(group.max()) + 1, dtype=tilt.dtype)
            group_sums, group_counts = (zeros.index_add(0, group, x)[group] for x in (sums, counts))
            values = _mean_with_prior(group_sums, group_counts, values, FEATURE_PRIOR_SAMPLES)
        return _mean_with_prior(sums, counts, values, FEATURE_PRIOR_SAMPLES)

    def _cell_means(self, counts: Tensor, sums: Tensor, mean: Tensor, final: Tensor) -> Tensor:
        """ψ [T + 1, S]: means over near positions, shrunk toward those over all positions, these toward ``mean``."""
        s = len(self.states.transitions)
        counts, sums = counts[:-1, :s], sums[:-1, :s]
        overall = _mean_with_prior(sums.sum(0), counts.sum(0), mean.expand(s), 1.0)
        by_position = _mean_with_prior(_smoothed(sums), _smoothed(counts), overall, PRIOR_SAMPLES)
        return torch.cat([by_position, final[None]])

    def _cell_sums(self, weights: Tensor) -> Tensor:
        """The sum of the ``weights`` [N] of the samples in each cell [T + 1, 2S]."""
        cells = (self.length + 1) * 2 * len(self.states.transitions)
        expanded = weights[:, None].expand_as(self.cells).reshape(-1)
        total = torch.zeros(cells + 1, dtype=torch.float64).index_add_(0, self.cells.reshape(-1), expanded)
        return total[:-1].reshape(self.length + 1, -1)


def build_guide(states: TokenStates, values: Tensor, final: Tensor, mean: Tensor | None = None) -> Guide:
    """The guide with ψ [T + 1, S] of open states and [S] of finished texts; ``mean`` is the mean over all texts."""
    both = torch.cat([values, final.expand_as(values)], 1)
    mean = values[0, states.start] if mean is None else mean
    # Where all values are 0 the guide is constant.
    if float(mean) <= 0:
        return states.guide(torch.zeros_like(both))
    return replace(states.guide((both / mean).clamp_min(MIN_VALUE).log()), log_scale=math.log(mean))


def sample_cells(states: TokenStates, tokens: Tensor, mask: Tensor, length: int) -> Tensor:
    """The cells [N, length + 1] of samples with these tokens [N, T]; see ``ValueFunction``."""
    count = 2 * len(states.transitions)
    guide = states.guide(torch.zeros(1, count))
    state, cells = guide.begin(len(tokens)), torch.full((len(tokens), length + 1), (length + 1) * count)
    cells[:, 0] = state
    for t in range(tokens.shape[1]):
        state = guide.advance(state, tokens[:, t])
        cells[:, t + 1] = torch.where(mask[:, t], (t + 1) * count + state, cells[:, t + 1])
    return cells


def _mean_with_prior(sums: Tensor, counts: Tensor, prior: Tensor, prior_samples: float) -> Tensor:
    """Means with ``prior_samples`` more samples equal to ``prior``; the prior itself where there are no samples."""
    weight = counts + prior_samples
    return torch.where(weight > 0, (sums + prior_samples * prior) / weight.clamp_min(1e-300), prior)


def _smoothed(values: Tensor) -> Tensor:
    """Sums over positions [T, S], each weighted by its distance."""
    position = torch.arange(len(values), dtype=torch.float64)
    return POSITION_DECAY ** (position[:, None] - position).abs() @ values
