"""States split by the last two tokens, on a Markov base whose exact values are known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiltlm.exact import MarkovModel, markov_target, phrase
from tiltlm.features import contains
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.context_classes import MIN_PREFIXES, LastTokenSums, split_by_context
from tiltlm.guides.token_states import TokenStates
from tiltlm.lm import Transitions
from tiltlm.targets import Term

VOCABULARY, LENGTH, TEXTS = 60, 12, 2000
WANTED = [7, 8]
# Tokens that the first token of the phrase often follows.
LEADING = range(20, 30)


@pytest.fixture(scope="module")
def model() -> MarkovModel:
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, WANTED[0]] -= 4.0
    logits[list(LEADING), WANTED[0]] += 8.0
    return MarkovModel(logits.log_softmax(-1), LENGTH)


@pytest.fixture(scope="module")
def tokens(model: MarkovModel) -> Tensor:
    generator, columns = torch.Generator().manual_seed(1), [torch.zeros(TEXTS, dtype=torch.long)]
    for _ in range(LENGTH):
        columns.append(model.logprob[columns[-1]].exp().multinomial(1, generator=generator).squeeze(-1))
    return torch.stack(columns[1:], 1)


@pytest.fixture(scope="module")
def states() -> TokenStates:
    automaton = phrase(WANTED, VOCABULARY)
    return TokenStates.of(automaton.transitions, automaton.start, automaton.values)


def learned(states: TokenStates, model: MarkovModel, tokens: Tensor) -> tuple[MarkovChain, LastTokenSums, Tensor]:
    """A chain and last-token sums with the model's distributions at these prefixes; the states before each token."""
    guide = states.guide(torch.zeros(1, 2 * len(states.transitions)))
    before = guide.states(tokens) % len(states.transitions)
    last = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=0)
    probabilities = model.logprob[last].exp().flatten(0, 1).float()
    ones = torch.ones(len(probabilities), dtype=torch.float64)
    columns = torch.arange(LENGTH).expand_as(tokens).flatten()
    chain = MarkovChain.empty(states, LENGTH)
    chain.add(before.flatten(), columns, probabilities, ones)
    last_tokens = LastTokenSums.empty(tokens, VOCABULARY, torch.device("cpu"))
    last_tokens.add(torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=VOCABULARY).flatten(), probabilities, ones)
    return chain, last_tokens, before


def split(states: TokenStates, model: MarkovModel, tokens: Tensor) -> TokenStates:
    chain, last_tokens, before = learned(states, model, tokens)
    return split_by_context(states, last_tokens, chain.values(states.passing()), tokens, before)


def test_a_split_place_has_the_value_of_its_parent(states: TokenStates, model: MarkovModel, tokens: Tensor) -> None:
    finer = split(states, model, tokens)
    assert finer.parent is not None
    assert len(finer.transitions) > len(states.transitions)
    count, s = len(finer.transitions), len(states.transitions)
    guide = states.guide(torch.zeros(1, 2 * s))
    finer_guide = finer.guide(torch.zeros(1, 2 * count))
    assert torch.equal(finer.parent[finer_guide.states(tokens)], guide.states(tokens))
    assert finer.values is not None
    assert states.values is not None
    assert torch.equal(finer.values, states.values[finer.parent])


def test_a_text_ends_in_the_same_state_as_for_the_parent(
    states: TokenStates, model: MarkovModel, tokens: Tensor
) -> None:
    ending = states.transitions[:].clone()
    ending[:, 0] += len(ending)
    finer = split(replace(states, transitions=Transitions.of(ending)), model, tokens)
    assert finer.parent is not None
    count = len(finer.transitions)
    after = finer.transitions[:, 0]
    assert bool((after >= count).all())
    assert torch.equal(finer.parent[after - count], ending[finer.parent, 0] - len(ending))
    assert bool((finer.transitions[:, 1:] < count).all())


def test_tokens_that_lead_to_the_phrase_have_classes_of_their_own(
    states: TokenStates, model: MarkovModel, tokens: Tensor
) -> None:
    finer = split(states, model, tokens)
    after = finer.transitions[finer.start]
    leading = torch.zeros(VOCABULARY, dtype=torch.bool)
    leading[list(LEADING)] = True
    leading[WANTED[0]] = False
    others = ~leading
    others[WANTED[0]] = False
    assert not set(after[leading].tolist()) & set(after[others].tolist())


def test_values_are_near_the_exact_ones_of_the_last_token(
    states: TokenStates, model: MarkovModel, tokens: Tensor
) -> None:
    target = markov_target(model, phrase(WANTED, VOCABULARY), [Term(contains("x"), "filter", 1.0)])
    exact, finer = target.log_value_table, split(states, model, tokens)
    last = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=0)
    at = torch.arange(LENGTH)

    def error(of: TokenStates) -> float:
        chain, _, before = learned(of, model, tokens)
        guide = states.guide(torch.zeros(1, 2 * len(states.transitions)))
        truth = exact[at, last, guide.states(tokens)]
        found = chain.values(of.passing())[at, before].log()
        open_rows = (truth < -1e-9) & (truth > -math.inf)
        return float((found - truth)[open_rows].square().mean().sqrt())

    assert error(finer) < 0.35 * error(states)


def test_a_split_place_without_visits_has_the_edges_of_its_parent(
    states: TokenStates, model: MarkovModel, tokens: Tensor
) -> None:
    finer = split(states, model, tokens)
    assert finer.parent is not None
    chain, _, _ = learned(finer, model, tokens)
    unseen = (chain.visits.sum(0) == 0) & (torch.arange(len(finer.transitions)) >= len(states.transitions))
    assert bool(unseen.any())
    place = int(unseen.nonzero()[0])
    same_parent = (finer.parent == finer.parent[place]).nonzero().squeeze(-1)
    width = len(chain.edges.targets[place])

    def edges(values: Tensor, row: int) -> Tensor:
        return values[..., chain.offset[row] : chain.offset[row] + width]

    mass = torch.stack([edges(chain.mass, int(row)) for row in same_parent]).sum((0, 1), dtype=torch.float64)
    torch.testing.assert_close(edges(chain._edge_means(), place), mass / mass.sum(), atol=1e-3, rtol=0)


def test_few_prefixes_are_not_split(states: TokenStates, model: MarkovModel, tokens: Tensor) -> None:
    few = tokens[: MIN_PREFIXES // LENGTH]
    chain, last_tokens, before = learned(states, model, few)
    assert split_by_context(states, last_tokens, chain.values(states.passing()), few, before) is states


def test_rare_tokens_share_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltlm.guides.context_classes.MAX_TRANSITIONS", 3 * VOCABULARY)
    often, seldom = [1] * 30 + [2] * 20, [5, 6]
    last_tokens = LastTokenSums.empty(torch.tensor(often + seldom), VOCABULARY, torch.device("cpu"))
    assert last_tokens.mass.shape == (4, VOCABULARY)
    assert len(set(last_tokens.row_of_token[[1, 2]].tolist())) == 2
    assert last_tokens.row_of_token[5] == last_tokens.row_of_token[6] == last_tokens.row_of_token[40]
    probabilities = torch.eye(VOCABULARY)[[3, 4]]
    last_tokens.add(torch.tensor([5, 6]), probabilities, torch.ones(2, dtype=torch.float64))
    # The prior is the mean of the two distributions.
    torch.testing.assert_close(last_tokens.means()[last_tokens.row_of_token[5]], probabilities.mean(0))
