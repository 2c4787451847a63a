"""The value function is near the exact values of prefixes, and its guide brings the base near the target."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from enumerable import tiny_model
from tiltlm.exact import ExactTarget, enumerate_completions, exact_kl, exact_target
from tiltlm.features import contains, length, negation, wordlist
from tiltlm.guides import ValueFunction, estimate_values
from tiltlm.guides.token_states import TokenStates
from tiltlm.guides.value import MIN_VALUE, POSITION_DECAY, PRIOR_SAMPLES
from tiltlm.lm import Guide, LanguageModel, SamplingSettings
from tiltlm.targets import BaseSample, Term, TiltedTarget, draw_base_sample

LENGTH = 5
MANY = 20_000

TARGETS: dict[str, TiltedTarget] = {
    "filter": TiltedTarget((Term(contains("a"), "filter"),)),
    "rare filter": TiltedTarget((Term(contains("b b"), "filter"),)),
    "without": TiltedTarget((Term(negation(contains("d")), "filter"),)),
    "moment": TiltedTarget((Term(contains("c"), "moment", 0.8, 2.5),)),
    "reward": TiltedTarget((Term(length("words"), "reward", coefficient=0.8),)),
    "several": TiltedTarget(
        (
            Term(negation(contains("c")), "filter"),
            Term(wordlist(["a b", "b a"]), "moment", 0.5, 1.6),
            Term(length("words"), "reward", coefficient=-0.4),
        )
    ),
}


@cache
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@cache
def drawn(name: str, n: int = MANY, seed: int = 3) -> BaseSample:
    return draw_base_sample(base(), TARGETS[name].features, n, None, LENGTH, seed=seed)


@cache
def truth(name: str) -> ExactTarget:
    return exact_target(base(), TARGETS[name], enumerate_completions(base(), max_completion_length=LENGTH))


@cache
def value_function(name: str) -> ValueFunction:
    return estimate_values(base(), TARGETS[name], drawn(name))


def guide(name: str, sample: BaseSample | None = None) -> Guide:
    sample = sample or drawn(name)
    log_tilt = TARGETS[name].log_tilt(sample.features)
    return estimate_values(base(), TARGETS[name], sample).guide(log_tilt)


@torch.no_grad()
def guided(name: str, with_guide: Guide) -> Tensor:
    """log g [N] of every completion."""
    listed = replace(truth(name).samples, guide=with_guide, settings=SamplingSettings())
    return base().logprob(listed).sum(-1)


def exact_values(name: str) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """E_a[P/a | state after t tokens] and the probability of the state, by enumeration."""
    known, own = truth(name), value_function(name).states
    states = own.guide(torch.zeros(1, 2 * len(own.transitions)))
    above: dict[tuple[int, int], float] = defaultdict(float)
    below: dict[tuple[int, int], float] = defaultdict(float)
    scores = known.target_logscore.exp().tolist()
    for ids, a, p in zip(known.samples.completion_ids, known.base_logprob.exp().tolist(), scores, strict=True):
        state = states.begin(1)
        for t in range(len(ids) + 1):
            above[t, int(state)] += p
            below[t, int(state)] += a
            if t < len(ids):
                state = states.advance(state, torch.tensor([ids[t]]))
    return {key: above[key] / below[key] for key in below}, below


@pytest.mark.parametrize("name", TARGETS)
def test_with_many_samples_values_are_near_the_exact_ones(name: str) -> None:
    """Up to a constant, in states and positions that samples visit often."""
    exact, visits = exact_values(name)
    own = guide(name)
    z = math.exp(truth(name).log_z)
    error = total = 0.0
    for (t, state), value in exact.items():
        found = float(own.log_value_table[t, state].exp())
        error += visits[t, state] * abs(found - value / z)
        total += visits[t, state] * value / z
        # A final state has one value, which is not averaged over continuations.
        if (state >= len(own.transitions) or t == LENGTH) and visits[t, state] > 0.003:
            assert found == pytest.approx(max(value / z, MIN_VALUE), rel=0.12, abs=0.02)
    assert total == pytest.approx(LENGTH + 1, rel=0.6)
    assert error < 0.1 * total


KL_SHARE = {"filter": 0.06, "rare filter": 0.05, "without": 0.04, "moment": 0.1, "reward": 0.2, "several": 0.03}


@pytest.mark.parametrize("name", TARGETS)
def test_the_guided_base_is_much_nearer_to_the_target_than_the_base(name: str) -> None:
    known = truth(name)
    before = exact_kl(known.logprob, known.base_logprob)
    after = exact_kl(known.logprob, guided(name, guide(name)))
    assert before > 0.05
    assert 0 <= after < KL_SHARE[name] * before


def test_few_samples_help_and_more_samples_help_more() -> None:
    known = truth("several")
    kls = [exact_kl(known.logprob, guided("several", guide("several", drawn("several", n)))) for n in (100, 1000, MANY)]
    assert exact_kl(known.logprob, known.base_logprob) > 1.5 * kls[0]
    assert kls[0] > kls[1] > kls[2]


@pytest.mark.parametrize("name", ["filter", "rare filter", "without"])
def test_far_more_texts_pass_a_filter(name: str) -> None:
    known = truth(name)
    hits = known.features[:, 0] > 0
    by_base, by_guide = (float(x.exp()[hits].sum()) for x in (known.base_logprob, guided(name, guide(name))))
    assert by_base < 0.95
    # At least twenty times fewer texts fail.
    assert 1 - by_guide < 0.05 * (1 - by_base)
    samples = base().sample(500, seed=0, max_completion_length=LENGTH, guide=guide(name))
    assert float(TARGETS[name].features[0](samples.texts).mean()) == pytest.approx(by_guide, abs=0.03)


def test_the_guide_reaches_all_of_the_target_from_any_samples() -> None:
    """States that no sample of the target visited keep a positive value."""
    few = drawn("several", 30, seed=1)
    own = guide("several", few)
    assert bool(torch.isfinite(own.log_value_table).all())
    assert float(own.log_value_table.min()) >= math.log(MIN_VALUE) - 1e-12
    assert math.isfinite(exact_kl(truth("several").logprob, guided("several", own)))


def test_cells_are_states_at_positions_and_an_end_is_counted_once() -> None:
    own, sample = value_function("several"), drawn("several")
    s = len(own.states.transitions)
    assert own.cells.shape == (MANY, LENGTH + 1)
    assert own.length == LENGTH
    nothing = (LENGTH + 1) * 2 * s
    follow = own.states.guide(torch.zeros(1, 2 * s))
    for row in range(0, MANY, 401):
        ids, state = sample.samples.completion_ids[row], follow.begin(1)
        expected = [int(state)]
        for t, token in enumerate(ids):
            state = follow.advance(state, torch.tensor([token]))
            expected.append((t + 1) * 2 * s + int(state))
        expected += [nothing] * (LENGTH - len(ids))
        assert own.cells[row].tolist() == expected


def test_rare_cells_borrow_from_other_positions() -> None:
    """One open state and four samples: means by hand, with more weight on nearer positions."""
    transitions = torch.tensor([[0, 1]])
    cells, nothing = torch.tensor([0, 2, 4, 6]), 8
    ends_after = [1, 1, 2, 3]
    visited = cells.repeat(4, 1)
    for row, t in enumerate(ends_after):
        visited[row, t] += 1
        visited[row, t + 1 :] = nothing
    tilt = torch.tensor([0.4, 0.8, 2.0, 0.8], dtype=torch.float64)
    own = ValueFunction(TokenStates.of(transitions), visited, 3).guide(tilt.log())
    counts, sums = [4, 2, 1], [4.0, 2.8, 0.8]
    anywhere = (sum(sums) + 1) / (sum(counts) + 1)
    for t in range(3):
        near = [POSITION_DECAY ** abs(t - u) for u in range(3)]
        above, below = (sum(x * w for x, w in zip(xs, near, strict=True)) for xs in (sums, counts))
        expected = (above + PRIOR_SAMPLES * anywhere) / (below + PRIOR_SAMPLES)
        assert float(own.log_value_table[t, 0].exp()) == pytest.approx(expected)
    assert float(own.log_value_table[3, 0].exp()) == pytest.approx(1.0)
    assert own.log_value_table[:, 1].exp().tolist() == pytest.approx([1.0] * 4)


def test_a_constant_tilt_changes_nothing_and_the_same_samples_give_the_same_guide() -> None:
    tilt = TARGETS["several"].log_tilt(drawn("several").features)
    one, again, more = (value_function("several").guide(t) for t in (tilt, tilt, tilt + 123.0))
    other = guide("several")
    assert torch.equal(one.log_value_table, again.log_value_table)
    assert torch.equal(one.log_value_table, other.log_value_table)
    assert torch.equal(one.transitions[:], other.transitions[:])
    torch.testing.assert_close(one.log_value_table, more.log_value_table, rtol=0, atol=1e-9)


def test_without_a_tilt_the_guide_is_constant() -> None:
    own = value_function("several").guide(torch.zeros(MANY, dtype=torch.float64))
    torch.testing.assert_close(own.log_value_table, torch.zeros_like(own.log_value_table), rtol=0, atol=1e-9)
    torch.testing.assert_close(guided("several", own), truth("several").base_logprob, rtol=0, atol=1e-9)


def test_samples_that_all_end_early_still_give_a_guide_of_the_full_length() -> None:
    """Positions that no sample reached still have a value for every state."""
    sample = drawn("filter", 2000)
    short = sample.samples.lengths <= 3
    few = BaseSample(sample.samples.select(short).trimmed(), sample.features[short], LENGTH)
    own = guide("filter", few)
    assert own.log_value_table.shape[0] == LENGTH + 1
    assert bool(torch.isfinite(own.log_value_table).all())
    assert float(guided("filter", own).exp()[truth("filter").features[:, 0] > 0].sum()) > 0.9


def test_a_feature_without_an_automaton_beside_one_with_an_automaton() -> None:
    """Its part of the tilt is averaged over, and the guided base is still nearer."""
    target = TiltedTarget((Term(contains("a"), "filter"), Term(length("characters"), "reward", coefficient=0.1)))
    sample = draw_base_sample(base(), target.features, MANY, None, LENGTH, seed=0)
    known = exact_target(base(), target, truth("filter").samples)
    own = estimate_values(base(), target, sample).guide(target.log_tilt(sample.features))
    with torch.no_grad():
        guided_logprob = base().logprob(replace(known.samples, guide=own)).sum(-1)
    assert exact_kl(known.logprob, guided_logprob) < 0.4 * exact_kl(known.logprob, known.base_logprob)


def test_samples_correct_the_values_of_an_approximate_automaton() -> None:
    """A tenth of the texts that it rejects pass; so the value is 0.1, also of a state in which no sample ended."""
    states = TokenStates.of(torch.tensor([[0, 1, 2, 3]] * 4), values=torch.tensor([[0.0], [0.0], [1.0], [1.0]]))
    ended = torch.tensor([0] * 100 + [2] * 100)
    visited = torch.stack([torch.zeros_like(ended), 8 + ended], 1)
    weights = torch.tensor([1.0] * 10 + [0.0] * 90 + [1.0] * 100, dtype=torch.float64)
    final_log_tilt = torch.tensor([-math.inf, -math.inf, 0.0, 0.0], dtype=torch.float64)
    guide = ValueFunction(states, visited, 1).guide(weights.log(), None, final_log_tilt)
    values = (guide.log_value_table[-1, 4:] + guide.log_scale).exp()
    torch.testing.assert_close(values[:2], torch.tensor([0.1, 0.1], dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(values[2:], torch.tensor([1.0, 1.0], dtype=torch.float64), atol=1e-9, rtol=0)
