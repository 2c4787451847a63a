"""Estimate a value function from the samples that a target was fitted on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tiltlm.estimation import Strata
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.context_classes import LastTokens, with_contexts
from tiltlm.guides.learned import LEVELS, LearnedStates, Prefixes, Scale, fit_token_weights
from tiltlm.guides.token_states import MOST_STATES, TokenStates, build_token_states, single_state
from tiltlm.guides.value import ValueFunction, cells_visited
from tiltlm.lm import Guide, LanguageModel, Transitions
from tiltlm.targets import BaseSample, Target


def estimate_values(model: LanguageModel, target: Target, base_sample: BaseSample) -> ValueFunction:
    """Follow the samples that the target was fitted on through the states of its features; the model reads them.

    Features without an automaton have learned states, if there is enough to learn.
    """
    samples = base_sample.samples
    tokens, mask = samples.tokens.cpu(), samples.mask.cpu()
    if any(feature.automaton() is not None for feature in target.features):
        last_tokens = LastTokens.empty(tokens[mask], model.vocab_size, model.device)
        twist = _with_chain(model, build_token_states(model, target.features, samples), base_sample, last_tokens)
        promise = twist.guide_toward(target, base_sample).log_value_table[:, : len(twist.states.transitions)].exp()
        finer = with_contexts(twist.states, last_tokens, promise, tokens, twist.states_before(mask))
        if finer is not twist.states:
            twist = replace(_with_chain(model, finer, base_sample), forward_passes=2)
    else:
        states, length = single_state(model), base_sample.max_completion_length
        twist = ValueFunction(states, cells_visited(states, tokens, mask, length), length)
    if all(feature.automaton() is not None for feature in target.features):
        return twist
    log_weights, log_ratio = base_sample.log_weights(target), base_sample.log_ratio
    if (strata := Strata.of(samples.prompt_ids, len(samples))).count > 1:
        log_weights = strata.softmax(log_weights).log()
    return replace(twist, learned=learned_states(twist, tokens, mask, log_weights, log_ratio))


def guide_toward(base: LanguageModel, target: Target, base_sample: BaseSample) -> Guide:
    """The guide toward a target, made of the samples of the base that it was fitted on."""
    return estimate_values(base, target, base_sample).guide_toward(target, base_sample)


def _with_chain(
    model: LanguageModel, states: TokenStates, base_sample: BaseSample, last_tokens: LastTokens | None = None
) -> ValueFunction:
    """The twist of these states, with the chain that the model's laws at the samples' prefixes make of them."""
    samples, length = base_sample.samples, base_sample.max_completion_length
    chain = MarkovChain.empty(states, length, model.device)
    chain.learn(model, samples, base_sample.prefix_log_ratio, last_tokens)
    visited = cells_visited(states, samples.tokens.cpu(), samples.mask.cpu(), length)
    return ValueFunction(states, visited, length, chain, forward_passes=1)


def learned_states(
    twist: ValueFunction, tokens: Tensor, mask: Tensor, log_weights: Tensor, log_ratio: Tensor
) -> LearnedStates | None:
    """Levels beside the states of ``twist``; None where two halves of the samples tell nothing of one another.

    ``tokens`` and ``mask`` [N, T] are those of the samples that ``twist`` follows; ``log_weights`` and ``log_ratio``
    [N] are log P(x) − log q(x) and log a(x) − log q(x).
    """
    ratio = log_ratio.exp()
    tilt = (log_weights - log_ratio - log_weights.logsumexp(0)).exp() * ratio.sum()
    # Both halves have the same share of what is wanted.
    order = tilt.argsort(descending=True, stable=True)
    halves = [order[0::2].sort().values, order[1::2].sort().values]
    if any(not bool((tilt[half] > 0).any()) for half in halves):
        return None
    scale = Scale.of(tilt)
    # A table knows its own samples too well to say what is left to learn of them.
    log_values = torch.zeros(tokens.shape, dtype=torch.float64)
    for half, other in zip(halves, reversed(halves), strict=True):
        guide = replace(twist, visited=twist.visited[other]).guide(log_weights[other], log_ratio[other])
        log_values[half] = replace(twist, visited=twist.visited[half]).along(guide)[:, : tokens.shape[1]]
    share = ratio[:, None] * mask / mask.sum(1, keepdim=True).clamp_min(1)
    prefixes = Prefixes(tokens, scale.logit(log_values.exp()), share, scale.place(tilt))
    found = fit_token_weights(prefixes, halves, twist.states.transitions.shape[1])
    if found is None:
        return None
    weights, sums = found
    reached = prefixes.sums(weights)[mask]
    levels = min(LEVELS, MOST_STATES // len(twist.states.transitions))
    if levels < 2 or float(reached.max() - reached.min()) <= 0:
        return None
    step = float(reached.max() - reached.min()) / (levels - 1)
    return _with_levels(twist, tokens, mask, weights, step, sums, share)


def _with_levels(
    twist: ValueFunction, tokens: Tensor, mask: Tensor, weights: Tensor, step: float, sums: Tensor, share: Tensor
) -> LearnedStates:
    """Each state at each level of the sum: levels count along with what the automata count."""
    table, whole = twist.states.transitions, (weights / step).round().long()
    along = (whole[tokens] * mask).cumsum(1)
    low, high = min(0, int(along.min())), max(0, int(along.max()))
    levels, changes = torch.arange(high - low + 1), len(table.counts)
    pairs, changed = torch.unique(whole * changes + table.changes, return_inverse=True)
    level = (levels + (pairs // changes)[:, None]).clamp(0, high - low)
    after = table.counts[pairs % changes][:, :, None] * len(levels) + level[:, None, :]
    both = Transitions(table.places, changed, after.flatten(1))
    state = torch.arange(len(table)).repeat_interleave(len(levels))
    start = twist.states.start * len(levels) - low
    nats = (levels + low).repeat(len(table)).double() * step
    return LearnedStates(TokenStates(both, start), state, nats, sums, share)
