"""Estimate a value function from the samples that a target was fitted on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tiltlm.estimation import Strata
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.context_classes import LastTokenSums, split_by_context
from tiltlm.guides.learned import LEVELS, LearnedStates, Prefixes, Scale, fit_token_weights
from tiltlm.guides.token_states import MAX_STATES, TokenStates, build_token_states, single_state
from tiltlm.guides.value import ValueFunction, sample_cells
from tiltlm.lm import Guide, LanguageModel, Transitions
from tiltlm.targets import BaseSample, Target


def estimate_values(model: LanguageModel, target: Target, base_sample: BaseSample) -> ValueFunction:
    """The value function over the states of the target's features, from one or two forward passes of the samples.

    Features without an automaton get learned states, where the samples suffice.
    """
    samples = base_sample.samples
    tokens, mask = samples.tokens.cpu(), samples.mask.cpu()
    if any(feature.automaton() is not None for feature in target.features):
        last_tokens = LastTokenSums.empty(tokens[mask], model.vocab_size, model.device)
        states = build_token_states(model, target.features, samples)
        values = _chain_values(model, states, base_sample, last_tokens)
        psi = values.guide_toward(target, base_sample).log_value_table[:, : len(states.transitions)].exp()
        split = split_by_context(states, last_tokens, psi, tokens, values.states_before(mask))
        if split is not states:
            values = replace(_chain_values(model, split, base_sample), forward_passes=2)
    else:
        states, length = single_state(model), base_sample.max_completion_length
        values = ValueFunction(states, sample_cells(states, tokens, mask, length), length)
    if all(feature.automaton() is not None for feature in target.features):
        return values
    log_weights, log_ratio = base_sample.log_weights(target), base_sample.log_ratio
    if (strata := Strata.of(samples.prompt_ids, len(samples))).count > 1:
        log_weights = strata.softmax(log_weights).log()
    return replace(values, learned=fit_learned_states(values, tokens, mask, log_weights, log_ratio))


def guide_toward(base: LanguageModel, target: Target, base_sample: BaseSample) -> Guide:
    """The guide toward a target, from the samples of the base that the target was fitted on."""
    return estimate_values(base, target, base_sample).guide_toward(target, base_sample)


def _chain_values(
    model: LanguageModel, states: TokenStates, base_sample: BaseSample, last_tokens: LastTokenSums | None = None
) -> ValueFunction:
    """The value function of these states, with a chain from the model's distributions at the samples' prefixes."""
    samples, length = base_sample.samples, base_sample.max_completion_length
    chain = MarkovChain.empty(states, length, model.device)
    chain.add_samples(model, samples, base_sample.prefix_log_ratio, last_tokens)
    cells = sample_cells(states, samples.tokens.cpu(), samples.mask.cpu(), length)
    return ValueFunction(states, cells, length, chain, forward_passes=1)


def fit_learned_states(
    values: ValueFunction, tokens: Tensor, mask: Tensor, log_weights: Tensor, log_ratio: Tensor
) -> LearnedStates | None:
    """Learned states beside the states of ``values``; None where one half of the samples does not predict the other.

    ``tokens`` and ``mask`` [N, T] are those of the samples of ``values``; ``log_weights`` and ``log_ratio`` [N] are
    log P(x) − log q(x) and log a(x) − log q(x).
    """
    ratio = log_ratio.exp()
    tilt = (log_weights - log_ratio - log_weights.logsumexp(0)).exp() * ratio.sum()
    # Alternate by tilt, so that both halves hold the same share of the target.
    order = tilt.argsort(descending=True, stable=True)
    halves = [order[0::2].sort().values, order[1::2].sort().values]
    if any(not bool((tilt[half] > 0).any()) for half in halves):
        return None
    scale = Scale.of(tilt)
    # Values come from the other half, because means over a sample's own cells already include its outcome.
    log_values = torch.zeros(tokens.shape, dtype=torch.float64)
    for half, other in zip(halves, reversed(halves), strict=True):
        guide = replace(values, cells=values.cells[other]).guide(log_weights[other], log_ratio[other])
        own = replace(values, cells=values.cells[half])
        log_values[half] = own.sample_log_values(guide)[:, : tokens.shape[1]]
    weight = ratio[:, None] * mask / mask.sum(1, keepdim=True).clamp_min(1)
    prefixes = Prefixes(tokens, scale.logit(log_values.exp()), weight, scale.to_unit(tilt))
    found = fit_token_weights(prefixes, halves, values.states.transitions.shape[1])
    if found is None:
        return None
    token_weights, sums = found
    reached = prefixes.sums(token_weights)[mask]
    levels = min(LEVELS, MAX_STATES // len(values.states.transitions))
    if levels < 2 or float(reached.max() - reached.min()) <= 0:
        return None
    step = float(reached.max() - reached.min()) / (levels - 1)
    return _add_levels(values, tokens, mask, token_weights, step, sums, weight)


def _add_levels(
    values: ValueFunction,
    tokens: Tensor,
    mask: Tensor,
    token_weights: Tensor,
    step: float,
    sums: Tensor,
    weight: Tensor,
) -> LearnedStates:
    """Each state at each level of the rounded sum. A level is part of the count."""
    table, rounded = values.states.transitions, (token_weights / step).round().long()
    path = (rounded[tokens] * mask).cumsum(1)
    low, high = min(0, int(path.min())), max(0, int(path.max()))
    levels, changes = torch.arange(high - low + 1), len(table.counts)
    pairs, changed = torch.unique(rounded * changes + table.changes, return_inverse=True)
    level = (levels + (pairs // changes)[:, None]).clamp(0, high - low)
    after = table.counts[pairs % changes][:, :, None] * len(levels) + level[:, None, :]
    transitions = Transitions(table.places, changed, after.flatten(1))
    automaton_state = torch.arange(len(table)).repeat_interleave(len(levels))
    start = values.states.start * len(levels) - low
    nats = (levels + low).repeat(len(table)).double() * step
    return LearnedStates(TokenStates(transitions, start), automaton_state, nats, sums, weight)
