"""The Markov chain of places and counts: its value is the pass rate, also with few separate statistics."""

from __future__ import annotations

import pytest
import torch

from enumerable import tiny_model
from tiltlm.exact import enumerate_completions
from tiltlm.features import Feature
from tiltlm.features.automaton import Automaton, Phrases
from tiltlm.features.batch import Batch
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.token_states import TokenStates, build_token_states
from tiltlm.lm import LanguageModel, Samples, Transitions

LENGTH = 5


class Lead(Feature):
    """1 where "a" comes more often than "b"."""

    def __init__(self) -> None:
        super().__init__(name="lead", binary=True)

    def compute(self, batch: Batch) -> list[float]:
        return [float(text.split().count("a") > text.split().count("b")) for text in batch.texts]

    def automaton(self) -> Automaton:
        return Phrases((("a", 1), ("b", -1)), ignore_case=False, max_count=LENGTH)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@pytest.fixture(scope="module")
def samples(model: LanguageModel) -> Samples:
    return model.sample(4000, seed=2, max_completion_length=LENGTH)


@pytest.fixture(scope="module")
def states(model: LanguageModel, samples: Samples) -> TokenStates:
    return build_token_states(model, [Lead()], samples)


@pytest.fixture(scope="module")
def rate(model: LanguageModel) -> float:
    listed = enumerate_completions(model, max_completion_length=LENGTH)
    passed = Lead()(listed.texts) > 0
    return float(listed.sequence_logprob.exp()[passed].sum())


def learned(states: TokenStates, model: LanguageModel, samples: Samples) -> MarkovChain:
    chain = MarkovChain.empty(states, LENGTH)
    chain.add_samples(model, samples)
    return chain


def test_the_value_of_the_start_is_the_pass_rate(
    states: TokenStates, model: LanguageModel, samples: Samples, rate: float
) -> None:
    assert states.transitions.counts.shape[1] == 2 * LENGTH + 1
    assert states.start > 0
    values = learned(states, model, samples).values(states.passing())
    assert 0.1 < rate < 0.9
    assert float(values[0, states.start]) == pytest.approx(rate, rel=0.06)


def test_values_do_not_depend_on_how_states_split_into_places_and_counts(
    states: TokenStates, model: LanguageModel, samples: Samples
) -> None:
    """A full table gives the same value for every state with many prefixes."""
    written = TokenStates(Transitions.of(states.transitions[:]), states.start, states.values)
    chain, other = (learned(one, model, samples) for one in (states, written))
    often = (chain.visits.sum(0)[chain.row] > 200).nonzero().squeeze(-1)
    assert len(often) > 5
    assert torch.equal(chain.visits[:, chain.row[often]], other.visits[:, other.row[often]])
    found, expected = (one.values(states.passing())[:, often] for one in (chain, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_with_few_edges_all_counts_of_a_place_share_statistics(
    states: TokenStates, model: LanguageModel, samples: Samples, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltlm.guides.chain.MAX_COUNT_EDGES", 0)
    chain = learned(states, model, samples)
    assert len(chain.place) == len(states.transitions.places)
    assert chain.count.tolist() == [-1] * len(chain.place)
    values = chain.values(states.passing())
    assert float(values[0, states.start]) == pytest.approx(rate, rel=0.15)
    # The value still rises with the count.
    last = values[-2].reshape(len(states.transitions.places), -1)
    assert bool((last.diff(dim=1) > -1e-9).all())
    assert bool((last[:, -1] > last[:, 0] + 0.5).all())


def test_end_rates_depend_on_position_where_edges_do_not(
    states: TokenStates, model: LanguageModel, samples: Samples, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltlm.guides.chain.MAX_EDGE_SUMS", 1)
    chain = learned(states, model, samples)
    assert len(chain.mass) == 1
    assert len(chain.weight) == LENGTH
    end_rates = (chain._end_rates() * chain.visits).sum(1) / chain.visits.sum(1)
    # The last position has few prefixes.
    torch.testing.assert_close(end_rates[:-1], (chain.end_mass.sum(1) / chain.weight.sum(1))[:-1], rtol=0.05, atol=0)
    assert float(end_rates.max()) > 1.1 * float(end_rates.min())
    assert float(chain.values(states.passing())[0, states.start]) == pytest.approx(rate, rel=0.1)
