"""States split by the last two tokens, on a Markov base where all of it is known."""

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
# Tokens after which the first wanted one often comes.
BRING = range(20, 30)


@pytest.fixture(scope="module")
def model() -> MarkovModel:
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, WANTED[0]] -= 4.0
    logits[list(BRING), WANTED[0]] += 8.0
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
    """A chain and the laws by last token that know the model's laws at these prefixes; the states before each token."""
    guide = states.guide(torch.zeros(1, 2 * len(states.transitions)))
    before = guide.states(tokens) % len(states.transitions)
    last = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=0)
    laws = model.logprob[last].exp().flatten(0, 1).float()
    ones = torch.ones(len(laws), dtype=torch.float64)
    columns = torch.arange(LENGTH).expand_as(tokens).flatten()
    chain = MarkovChain.empty(states, LENGTH)
    chain.add(before.flatten(), columns, laws, ones)
    last_tokens = LastTokenSums.empty(tokens, VOCABULARY, torch.device("cpu"))
    last_tokens.add(torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=VOCABULARY).flatten(), laws, ones)
    return chain, last_tokens, before


def split(states: TokenStates, model: MarkovModel, tokens: Tensor) -> TokenStates:
    chain, last_tokens, before = learned(states, model, tokens)
    return split_by_context(states, last_tokens, chain.values(states.passing()), tokens, before)


def test_a_cell_is_the_state_of_its_kin(states: TokenStates, model: MarkovModel, tokens: Tensor) -> None:
    cells = split(states, model, tokens)
    assert cells.parent is not None
    assert len(cells.transitions) > len(states.transitions)
    count, s = len(cells.transitions), len(states.transitions)
    guide = states.guide(torch.zeros(1, 2 * s))
    finer = cells.guide(torch.zeros(1, 2 * count))
    assert torch.equal(cells.parent[finer.states(tokens)], guide.states(tokens))
    assert cells.values is not None
    assert states.values is not None
    assert torch.equal(cells.values, states.values[cells.parent])


def test_a_text_ends_in_the_state_of_its_kin(states: TokenStates, model: MarkovModel, tokens: Tensor) -> None:
    ending = states.transitions[:].clone()
    ending[:, 0] += len(ending)
    cells = split(replace(states, transitions=Transitions.of(ending)), model, tokens)
    assert cells.parent is not None
    count = len(cells.transitions)
    after = cells.transitions[:, 0]
    assert bool((after >= count).all())
    assert torch.equal(cells.parent[after - count], ending[cells.parent, 0] - len(ending))
    assert bool((cells.transitions[:, 1:] < count).all())


def test_tokens_that_bring_what_is_wanted_have_classes_of_their_own(
    states: TokenStates, model: MarkovModel, tokens: Tensor
) -> None:
    cells = split(states, model, tokens)
    after = cells.transitions[cells.start]
    bring = torch.zeros(VOCABULARY, dtype=torch.bool)
    bring[list(BRING)] = True
    bring[WANTED[0]] = False
    others = ~bring
    others[WANTED[0]] = False
    assert not set(after[bring].tolist()) & set(after[others].tolist())


def test_a_promise_is_near_the_exact_one_of_the_last_token(
    states: TokenStates, model: MarkovModel, tokens: Tensor
) -> None:
    target = markov_target(model, phrase(WANTED, VOCABULARY), [Term(contains("x"), "filter", 1.0)])
    exact, cells = target.log_value_table, split(states, model, tokens)
    last = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=0)
    at = torch.arange(LENGTH)

    def miss(of: TokenStates) -> float:
        chain, _, before = learned(of, model, tokens)
        guide = states.guide(torch.zeros(1, 2 * len(states.transitions)))
        truth = exact[at, last, guide.states(tokens)]
        found = chain.values(of.passing())[at, before].log()
        open_rows = (truth < -1e-9) & (truth > -math.inf)
        return float((found - truth)[open_rows].square().mean().sqrt())

    assert miss(cells) < 0.35 * miss(states)


def test_a_cell_that_was_never_seen_goes_on_as_its_kin(states: TokenStates, model: MarkovModel, tokens: Tensor) -> None:
    cells = split(states, model, tokens)
    assert cells.parent is not None
    chain, _, _ = learned(cells, model, tokens)
    unseen = (chain.visits.sum(0) == 0) & (torch.arange(len(cells.transitions)) >= len(states.transitions))
    assert bool(unseen.any())
    cell = int(unseen.nonzero()[0])
    kin = (cells.parent == cells.parent[cell]).nonzero().squeeze(-1)
    width = len(chain.edges.targets[cell])

    def steps(values: Tensor, row: int) -> Tensor:
        return values[..., chain.offset[row] : chain.offset[row] + width]

    moved = torch.stack([steps(chain.mass, int(row)) for row in kin]).sum((0, 1), dtype=torch.float64)
    torch.testing.assert_close(steps(chain._edge_means(), cell), moved / moved.sum(), atol=1e-3, rtol=0)


def test_few_prefixes_split_nothing(states: TokenStates, model: MarkovModel, tokens: Tensor) -> None:
    few = tokens[: MIN_PREFIXES // LENGTH]
    chain, last_tokens, before = learned(states, model, few)
    assert split_by_context(states, last_tokens, chain.values(states.passing()), few, before) is states


def test_tokens_that_are_seldom_written_share_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiltlm.guides.context_classes.MAX_TRANSITIONS", 3 * VOCABULARY)
    often, seldom = [1] * 30 + [2] * 20, [5, 6]
    last_tokens = LastTokenSums.empty(torch.tensor(often + seldom), VOCABULARY, torch.device("cpu"))
    assert last_tokens.mass.shape == (4, VOCABULARY)
    assert len(set(last_tokens.row_of_token[[1, 2]].tolist())) == 2
    assert last_tokens.row_of_token[5] == last_tokens.row_of_token[6] == last_tokens.row_of_token[40]
    law = torch.eye(VOCABULARY)[[3, 4]]
    last_tokens.add(torch.tensor([5, 6]), law, torch.ones(2, dtype=torch.float64))
    # Two laws and one of all prefixes, which is their mean.
    torch.testing.assert_close(last_tokens.means()[last_tokens.row_of_token[5]], law.mean(0))
