"""A factored transition table agrees with the full one: same states, same distribution, smaller file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from enumerable import tiny_model
from tiltlm.exact import enumerate_completions
from tiltlm.features import pronouns
from tiltlm.features.lexical import Pronouns
from tiltlm.lm import Guide, LanguageModel, Transitions

LENGTH = 4


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@pytest.fixture
def transitions(model: LanguageModel) -> Transitions:
    """Three places and four counts at random, with ends."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(3, (3, model.vocab_size), generator=generator)
    places[:, model.eos_ids] = torch.arange(3, 6)[:, None]
    changes = torch.randint(1, 3, (3, model.vocab_size), generator=generator).to(torch.uint8)
    changes[:, model.eos_ids] = 0
    return Transitions(places, changes, torch.tensor([[0, 1, 2, 3], [1, 2, 3, 3], [0, 0, 1, 2]]))


def guides(transitions: Transitions) -> tuple[Guide, Guide]:
    """The same guide over a factored table and over the full table."""
    generator = torch.Generator().manual_seed(1)
    log_values = torch.randn(LENGTH + 1, 2 * len(transitions), generator=generator, dtype=torch.float64)
    return Guide(transitions, log_values, start=5), Guide(transitions[:], log_values, start=5)


def test_a_state_is_a_place_and_a_count(transitions: Transitions) -> None:
    table = transitions[:]
    assert table.shape == transitions.shape == (12, transitions.places.shape[1])
    for state in range(12):
        for token in range(table.shape[1]):
            place, change = int(transitions.places[state // 4, token]), int(transitions.changes[state // 4, token])
            expected = 4 * place + int(transitions.counts[change, state % 4])
            assert int(table[state, token]) == int(transitions[state, token]) == expected
    states, tokens = torch.tensor([0, 7, 7, 11]), torch.tensor([1, 0, 2, 3])
    assert torch.equal(transitions[states], table[states])
    assert torch.equal(transitions[states, tokens], table[states, tokens])
    assert torch.equal(Transitions.of(table)[states, tokens], table[states, tokens])
    assert torch.equal(Transitions.of(table)[:], table)


def test_the_distribution_is_that_of_the_full_table(model: LanguageModel, transitions: Transitions) -> None:
    listed = enumerate_completions(model, max_completion_length=LENGTH)
    one, other = guides(transitions)
    with torch.no_grad():
        logprob, expected = (model.logprob(replace(listed, guide=guide)).sum(-1) for guide in (one, other))
    torch.testing.assert_close(logprob, expected, rtol=0, atol=1e-12)
    assert float(logprob.exp().sum()) == pytest.approx(1, abs=1e-9)
    # More rows than states, and fewer.
    for rows in (3, 40):
        states = torch.randint(12, (rows,), generator=torch.Generator().manual_seed(rows))
        assert torch.equal(one.logit_bias(states, 1), other.logit_bias(states, 1))
        columns = torch.randint(LENGTH, (rows,), generator=torch.Generator().manual_seed(rows))
        assert torch.equal(one.logit_bias_at(states, columns), other.logit_bias_at(states, columns))


def test_files_keep_the_keys_of_the_first_version(transitions: Transitions, tmp_path: Path) -> None:
    for guide, table in zip(guides(transitions), ({"places", "changes", "counts"}, {"transitions"}), strict=True):
        guide.save(tmp_path / "guide")
        assert set(load_file(tmp_path / "guide")) == {"log_twist", *table}


def test_a_file_holds_a_row_for_each_place(transitions: Transitions, tmp_path: Path) -> None:
    one, other = guides(transitions)
    for guide, name in ((one, "one"), (other, "other")):
        guide.save(tmp_path / name)
        again = Guide.load(tmp_path / name)
        assert torch.equal(again.transitions[:], guide.transitions[:])
        assert torch.equal(again.log_value_table, guide.log_value_table)
        assert again.start == 5
        assert type(again.transitions) is type(guide.transitions)
    wide = replace(
        one,
        transitions=Transitions(
            *(x.repeat(1, 200) for x in (transitions.places, transitions.changes)), transitions.counts
        ),
    )
    wide.save(tmp_path / "places")
    replace(wide, transitions=wide.transitions[:]).save(tmp_path / "table")
    assert (tmp_path / "places").stat().st_size < 0.7 * (tmp_path / "table").stat().st_size


def test_the_count_of_pronouns_starts_in_the_middle_of_its_range() -> None:
    feature = pronouns("female")
    assert isinstance(feature, Pronouns)
    automaton = feature.automaton()
    assert automaton.counts.index(automaton.start[0]) == len(automaton.counts) // 2
