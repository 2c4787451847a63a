"""Markov models under an automaton: every number against a plain sum over all sequences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tiltlm.errors import UnreachableTargetError, UsageError
from tiltlm.exact import (
    MarkovModel,
    MarkovTarget,
    TokenAutomaton,
    count_difference,
    exact_kl,
    final_states,
    markov_target,
    phrase,
)
from tiltlm.features import contains
from tiltlm.targets import Term

V, T = 3, 5
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))
PHRASE = phrase([1, 1, 2], V)
DIFFERENCE = count_difference([2], [0], V, most=T)
BOTH = PHRASE & DIFFERENCE
CONTAINS, MORE = (contains(word).renamed(word) for word in ("contains", "more"))
TARGETS: dict[str, tuple[TokenAutomaton, list[Term]]] = {
    "pointwise": (PHRASE, [Term(CONTAINS, "filter")]),
    "moment": (DIFFERENCE, [Term(MORE, "moment", goal=0.7)]),
    "hybrid": (BOTH, [Term(CONTAINS, "filter"), Term(MORE, "moment", goal=0.3)]),
}


def model(order: int) -> MarkovModel:
    generator = torch.Generator().manual_seed(order)
    logits = 1.5 * torch.randn(V**order, V, generator=generator, dtype=torch.float64)
    return MarkovModel(logits.log_softmax(-1), T, order, start=V**order - 1)


def contexts(order: int) -> list[list[int]]:
    """The context before each token, read off the tokens themselves."""
    before = [V - 1] * order
    found = []
    for sequence in SEQUENCES.tolist():
        whole = before + sequence
        found.append([sum(d * V ** (order - 1 - i) for i, d in enumerate(whole[t : t + order])) for t in range(T)])
    return found


def base_logprob(order: int) -> Tensor:
    logprob = model(order).logprob
    return torch.stack([logprob[c, x].sum() for c, x in zip(torch.tensor(contexts(order)), SEQUENCES, strict=True)])


def has_phrase(sequence: list[int]) -> bool:
    return any(sequence[i : i + 3] == [1, 1, 2] for i in range(T - 2))


def features() -> Tensor:
    rows = SEQUENCES.tolist()
    return torch.tensor([[float(has_phrase(r)), float(r.count(2) > r.count(0))] for r in rows], dtype=torch.float64)


def columns(name: str) -> list[int]:
    return {"pointwise": [0], "moment": [1], "hybrid": [0, 1]}[name]


def truth(order: int, name: str) -> tuple[MarkovTarget, Tensor]:
    """The target, and log P of every sequence with its coefficients."""
    automaton, terms = TARGETS[name]
    target = markov_target(model(order), automaton, terms)
    score = base_logprob(order)
    for column, term in zip(columns(name), terms, strict=True):
        values = features()[:, column]
        if term.kind == "filter":
            score = torch.where(values > 0, score, -torch.inf)
        else:
            tilt = float(target.log_tilt[automaton.values[:, columns(name).index(column)] > 0].max())
            score = score + tilt * values
    return target, score


CASES = list(itertools.product([1, 2], TARGETS))


def test_automata_have_the_values_of_the_features() -> None:
    assert BOTH.values[BOTH.read(SEQUENCES)[:, -1]].tolist() == features().tolist()


@pytest.mark.parametrize(("order", "name"), CASES)
def test_scores_and_log_z_are_those_of_all_sequences(order: int, name: str) -> None:
    target, score = truth(order, name)
    torch.testing.assert_close(target.score(SEQUENCES), score, rtol=0, atol=1e-10)
    assert target.log_z == pytest.approx(float(score.logsumexp(0)), abs=1e-10)


@pytest.mark.parametrize(("order", "name"), CASES)
def test_next_token_distributions_multiply_to_p(order: int, name: str) -> None:
    target, score = truth(order, name)
    states = target.automaton.read(SEQUENCES)
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for t, before in enumerate(torch.tensor(contexts(order)).unbind(-1)):
        total = total + target.next_token(t)[before, states[:, t], SEQUENCES[:, t]]
    inside = score > -math.inf
    torch.testing.assert_close(total[inside], (score - target.log_z)[inside], rtol=0, atol=1e-10)
    assert bool((total[~inside] == -math.inf).all())


@pytest.mark.parametrize(("order", "name"), CASES)
def test_moments_meet_their_goals_and_are_sums_over_all_sequences(order: int, name: str) -> None:
    target, score = truth(order, name)
    expected = score.softmax(0) @ features()[:, columns(name)]
    torch.testing.assert_close(target.moments, expected, rtol=0, atol=1e-10)
    for term, reached in zip(TARGETS[name][1], target.moments.tolist(), strict=True):
        assert reached == pytest.approx(1.0 if term.kind == "filter" else term.goal, abs=1e-9)


@pytest.mark.parametrize(("order", "name"), CASES)
@pytest.mark.parametrize("by_position", [False, True])
def test_kl_is_the_sum_over_all_sequences(order: int, name: str, by_position: bool) -> None:
    target, score = truth(order, name)
    shape = (V**order, len(target.automaton.transitions), V)
    generator = torch.Generator().manual_seed(3)
    policy = torch.randn((T, *shape) if by_position else shape, generator=generator, dtype=torch.float64)
    policy = policy.log_softmax(-1)
    states, before = target.automaton.read(SEQUENCES), torch.tensor(contexts(order))
    steps = [policy[t] if by_position else policy for t in range(T)]
    logprob = sum(steps[t][before[:, t], states[:, t], SEQUENCES[:, t]] for t in range(T))
    assert isinstance(logprob, Tensor)
    assert target.kl(policy) == pytest.approx(exact_kl(score - target.log_z, logprob), abs=1e-10)


def test_the_kl_to_the_base_of_a_filter_is_less_log_z() -> None:
    target, _ = truth(2, "pointwise")
    base = target.model.logprob[:, None].expand(-1, len(target.automaton.transitions), -1)
    assert target.kl(base) == pytest.approx(-target.log_z, abs=1e-10)


def test_a_policy_without_the_support_is_infinitely_far() -> None:
    target, _ = truth(1, "pointwise")
    policy = torch.full((V, len(target.automaton.transitions), V), 1 / (V - 1), dtype=torch.float64)
    policy[..., 1] = 0
    assert target.kl(policy.log()) == math.inf


def test_samples_follow_p() -> None:
    target, score = truth(2, "hybrid")
    n = 40_000
    index = (target.sample(n, seed=0) * V ** torch.arange(T - 1, -1, -1)).sum(-1)
    frequency, p = torch.bincount(index, minlength=V**T) / n, score.softmax(0)
    assert bool((frequency[p == 0] == 0).all())
    inside = p > 0
    chi_square = float((n * (frequency - p).square() / p.clamp_min(1e-300))[inside].sum())
    freedom = int(inside.sum()) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_last_state_under_the_base() -> None:
    reached = final_states(model(1), BOTH).exp()
    expected = torch.zeros_like(reached).index_add_(0, BOTH.read(SEQUENCES)[:, -1], base_logprob(1).exp())
    torch.testing.assert_close(reached, expected, rtol=0, atol=1e-12)


def test_a_rare_phrase_of_forty_tokens() -> None:
    vocabulary = 60
    logits = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rare = MarkovModel(logits.log_softmax(-1), 40)
    target = markov_target(rare, phrase([1, 2, 3], vocabulary), [Term(CONTAINS, "filter")])
    assert math.log(1e-6) < target.log_z < math.log(1e-3)
    assert float(target.moments) == pytest.approx(1.0, abs=1e-10)
    assert float((target.score(target.sample(500, seed=0)) == -math.inf).sum()) == 0


def test_unreachable_targets_are_refused() -> None:
    never = MarkovModel(torch.tensor([[0.5, 0.5, 0.0]]).expand(V, -1).log(), T)
    with pytest.raises(UnreachableTargetError, match="no sequence"):
        markov_target(never, phrase([2], V), [Term(CONTAINS, "filter")])
    with pytest.raises(UnreachableTargetError, match="more"):
        markov_target(never, count_difference([2], [0], V, T), [Term(MORE, "moment", goal=0.5)])


def test_tables_of_another_shape_or_sum_are_refused() -> None:
    with pytest.raises(UsageError, match="order 2"):
        MarkovModel(torch.zeros(V, V), T, order=2)
    with pytest.raises(UsageError, match="sum to 1"):
        MarkovModel(torch.zeros(V, V), T)
