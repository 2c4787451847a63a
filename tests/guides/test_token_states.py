"""From characters to tokens: a transition reads the characters of a token, also where states are merged."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from enumerable import TOKENS, tiny_model
from tiltlm.errors import UsageError
from tiltlm.exact import enumerate_completions
from tiltlm.features import (
    Feature,
    all_of,
    contains,
    length,
    measure,
    negation,
    pronouns,
    regex,
    sentiment,
    threshold,
    wordlist,
)
from tiltlm.features.automaton import Automaton, State, product_automaton
from tiltlm.guides.token_states import (
    MAX_PLACES,
    ChangeRecorder,
    TokenStates,
    TokenTrie,
    _apply_changes,
    build_token_states,
    token_texts,
)
from tiltlm.lm import LanguageModel, Samples

# A byte that is part of a character decodes to this; its state is not defined.
PART = "\ufffd"

FEATURES: dict[str, list[Feature]] = {
    "pronouns": [pronouns("female"), pronouns("male")],
    "words of a list": [wordlist("science")],
    "phrases": [wordlist(["he was", "was born", "in the", "of"]), negation(contains("New York"))],
    "words and length": [all_of(contains("the"), threshold(length("words"), 8, "<="))],
}
TINY: dict[str, list[Feature]] = {
    "a": [contains("a")],
    "a b": [contains("a b"), negation(contains("b"))],
    "length": [length("words")],
    "both": [threshold(length("words"), 2), wordlist(["b a", "a a", "b b b"])],
}


@pytest.fixture(scope="module")
def embedded() -> LanguageModel:
    return LanguageModel.from_pretrained("embedded", device="cpu")


@pytest.fixture(scope="module")
def samples(embedded: LanguageModel) -> Samples:
    """Samples of the embedded model without partial characters."""
    drawn = embedded.sample(80, seed=0, max_completion_length=12)
    texts = [embedded.tokenizer.decode(ids) for ids in drawn.completion_ids]
    return drawn.select(torch.tensor([text.isascii() for text in texts]))


@pytest.fixture(scope="module")
def states_of(embedded: LanguageModel, samples: Samples) -> Callable[[str], TokenStates]:
    """The states of FEATURES by name, built once each because they take seconds."""
    return cache(lambda name: build_token_states(embedded, FEATURES[name], samples))


def automaton_of(features: list[Feature]) -> Automaton:
    automaton = product_automaton(feature.automaton() for feature in features)
    assert automaton is not None
    return automaton


def read(automaton: Automaton, text: str) -> State:
    state = automaton.start
    for character in text:
        state = automaton.step(state, character)
    return state


def visited(automaton: Automaton, samples: Samples) -> set[State]:
    """The states of all prefixes of the samples."""
    decode = samples.tokenizer.decode
    prefixes = {tuple(ids[:t]) for ids in samples.completion_ids for t in range(len(ids) + 1)}
    return {read(automaton, decode(list(prefix), skip_special_tokens=True)) for prefix in prefixes}


def follow(states: TokenStates, tokens: torch.Tensor) -> torch.Tensor:
    """The state before each token, and the last one [N, T + 1]."""
    guide = states.guide(torch.zeros(1, 2 * len(states.transitions)))
    before = guide.states(tokens)
    return torch.cat([before, guide.advance(before[:, -1], tokens[:, -1])[:, None]], 1)


@pytest.mark.parametrize("name", FEATURES)
def test_transitions_are_steps_over_the_decoded_text(
    embedded: LanguageModel, samples: Samples, name: str, states_of: Callable[[str], TokenStates]
) -> None:
    """For random prefixes and tokens, states of the guide and of the automaton correspond one to one."""
    automaton, states = automaton_of(FEATURES[name]), states_of(name)
    assert len(states.transitions.places) < MAX_PLACES  # all places are kept
    before = follow(states, samples.tokens)
    rng = random.Random(0)
    prefixes = [(i, t) for i, ids in enumerate(samples.completion_ids) for t in range(len(ids))]
    decode = embedded.tokenizer.decode
    paired: dict[int, State] = {}
    frequent = [embedded.tokenizer.encode(f" {w}")[0] for w in ("he", "she", "her", "in", "the", "was", "New", "born")]
    for i, t in rng.sample(prefixes, 400):
        ids = samples.completion_ids[i][:t]
        for token in [*rng.sample(range(embedded.vocab_size), 6), *frequent]:
            if token in embedded.eos_ids or PART in decode([token]):
                continue
            state = read(automaton, decode([*ids, token], skip_special_tokens=True))
            reached = int(states.transitions[before[i, t], token])
            assert paired.setdefault(reached, state) == state, decode([*ids, token])
    assert len(set(paired.values())) == len(paired) > 4
    assert max(paired) < len(states.transitions)


def test_states_that_no_sample_visited_fill_the_remaining_places(embedded: LanguageModel, samples: Samples) -> None:
    """A phrase that is in no sample has all its states, and the last one has the value of the phrase."""
    phrase = "purple elephants dance"
    assert not any(phrase in text for text in samples.texts)
    states = build_token_states(embedded, [contains(phrase)], samples)
    ids = torch.tensor([embedded.tokenizer.encode(f" {phrase}.", add_special_tokens=False)])
    last = int(follow(states, ids)[0, -1])
    assert states.values is not None
    assert states.values[:, 0].tolist().count(1.0) >= 1
    assert float(states.values[last, 0]) == float(states.passing()[last]) == 1.0
    assert float(states.values[states.start, 0]) == 0.0


def test_values_of_states_are_those_of_texts_that_end_there(
    samples: Samples, states_of: Callable[[str], TokenStates]
) -> None:
    """The features of samples agree with the values of their last states."""
    for name, features in FEATURES.items():
        states = states_of(name)
        if any(feature.automaton() is None for feature in features):
            assert states.values is None
            continue
        assert states.values is not None
        last = follow(states, samples.tokens)[:, -1] % len(states.transitions)
        agree = (states.values[last] == measure(features, samples.texts)).all(1)
        assert float(agree.double().mean()) > 0.9, [feature.name for feature in features]


@pytest.mark.parametrize("name", FEATURES)
def test_an_end_keeps_the_state(embedded: LanguageModel, name: str, states_of: Callable[[str], TokenStates]) -> None:
    states = states_of(name)
    s = len(states.transitions)
    assert states.transitions.shape == (s, embedded.vocab_size)
    for eos in embedded.eos_ids:
        assert states.transitions[:, eos].tolist() == list(range(s, 2 * s))
    others = states.transitions[:][:, [i for i in range(embedded.vocab_size) if i not in embedded.eos_ids]]
    assert 0 <= int(others.min()) <= int(others.max()) < s
    # A special token adds no characters.
    assert states.transitions[:, 0].tolist() == list(range(s))


@pytest.mark.parametrize("features", TINY)
@pytest.mark.parametrize("tokens", TOKENS)
def test_the_last_state_of_every_completion_determines_the_values(tokens: str, features: str) -> None:
    """Also where one of several EOS tokens is a word."""
    model = tiny_model("gpt2", tokens)
    # Longer texts, so that states which only end texts of four tokens are visited before an end too.
    states = build_token_states(model, TINY[features], enumerate_completions(model, max_completion_length=5))
    listed = enumerate_completions(model, max_completion_length=4)
    last = follow(states, listed.tokens)[:, -1].tolist()
    values = torch.stack([f(listed.texts, completion_ids=listed.completion_ids) for f in TINY[features]], 1)
    found: dict[int, list[float]] = {}
    for text, ids, state, value in zip(listed.texts, listed.completion_ids, last, values.tolist(), strict=True):
        assert found.setdefault(state, value) == value, text
        assert (state >= len(states.transitions)) == (ids[-1] in model.eos_ids)
    assert len({tuple(value) for value in found.values()}) > 1


def test_the_texts_of_tokens_join_to_the_text(embedded: LanguageModel, samples: Samples) -> None:
    texts = token_texts(embedded)
    assert len(texts) == embedded.vocab_size
    for ids, text in zip(samples.completion_ids, samples.texts, strict=True):
        assert "".join(texts[i] for i in ids) == text
    assert [texts[i] for i in embedded.tokenizer.all_special_ids] == ["", ""]
    tiny = tiny_model("gpt2", "several_eos")
    assert [text.strip() for text in token_texts(tiny)] == ["a", "b", "", ".", "", ""]
    assert len({len(text) for text in token_texts(tiny)}) > 1


def test_embeddings_beyond_the_tokenizer_add_no_characters() -> None:
    model = tiny_model("gpt2", "pad_is_eos").copy()
    model.model.resize_token_embeddings(8)
    assert token_texts(model)[5:] == ["", "", ""]


@pytest.mark.parametrize("name", FEATURES)
def test_a_trie_of_tokens_reads_like_each_token_alone(name: str) -> None:
    automaton = automaton_of(FEATURES[name])
    letters = "hes wa\nNYork"
    rng = random.Random(0)
    texts = [
        "",
        " he",
        " her",
        "he",
        "he",
        *("".join(rng.choices(letters, k=rng.randrange(6))) for _ in range(80)),
    ]
    trie, memo = TokenTrie(texts), {}
    for before in ("", "he", "s", "he was", "New", "the ", "Ne"):
        count, place = read(automaton, before)
        found = trie.read_all(ChangeRecorder(automaton), (place, ()), memo)
        assert [(_apply_changes(automaton, count, changes), after) for after, changes in found] == [
            read(automaton, before + text) for text in texts
        ]


@pytest.mark.parametrize(("name", "most"), [("phrases", 1), ("phrases", 4), ("phrases", 12), ("pronouns", 4)])
def test_too_many_states_are_merged_and_the_guide_still_samples(
    embedded: LanguageModel, samples: Samples, name: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_token_states(embedded, FEATURES[name], samples)
    monkeypatch.setattr("tiltlm.guides.token_states.MAX_PLACES", most)
    states = build_token_states(embedded, FEATURES[name], samples)
    s = len(states.transitions)
    assert s < len(whole.transitions)
    assert states.transitions[:, embedded.eos_ids[0]].tolist() == list(range(s, 2 * s))
    others = states.transitions[:][:, [i for i in range(embedded.vocab_size) if i not in embedded.eos_ids]]
    assert 0 <= int(others.min()) <= int(others.max()) < s
    generator = torch.Generator().manual_seed(0)
    guide = states.guide(torch.randn(13, 2 * s, generator=generator))
    drawn = embedded.sample(40, seed=1, max_completion_length=12, guide=guide)
    with torch.no_grad():
        torch.testing.assert_close(embedded.logprob(drawn), drawn.proposal_logprob, rtol=0, atol=1e-4)


def test_with_few_places_the_coarse_ones_of_all_samples_are_kept(
    embedded: LanguageModel, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiltlm.guides.token_states.MAX_PLACES", 1)
    for features in FEATURES.values():
        automaton = automaton_of(features)
        states = build_token_states(embedded, features, samples)
        coarse = {automaton.coarse(state)[1] for state in visited(automaton, samples)}
        assert len(states.transitions.places) == len({automaton.start[1], *coarse})


def test_a_guide_over_merged_states_is_still_normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2", "pad_is_eos")
    listed = enumerate_completions(model, max_completion_length=4)
    monkeypatch.setattr("tiltlm.guides.token_states.MAX_PLACES", 2)
    states = build_token_states(model, TINY["both"], listed)
    log_values = torch.randn(5, 2 * len(states.transitions), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        probabilities = model.logprob(replace(listed, guide=states.guide(log_values))).sum(-1).exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-9)
    assert float((probabilities - listed.sequence_logprob.exp()).abs().sum()) > 0.05


def test_without_any_automaton_the_features_are_named() -> None:
    model = tiny_model("gpt2", "pad_is_eos")
    listed = enumerate_completions(model, max_completion_length=2)
    with pytest.raises(UsageError, match=r"^method: .*'matches 'a\+'', 'length in tokens' cannot"):
        build_token_states(model, [regex("a+"), length("tokens")], listed)
    assert len(build_token_states(model, [regex("a+"), contains("a")], listed).transitions) > 1


def test_places_are_kept_where_the_coarse_one_would_diverge_most(
    embedded: LanguageModel, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frequent beginnings of words without a value make room for rarer ones with a value."""
    feature = sentiment()
    automaton = automaton_of([feature])
    totals = [read(automaton, text)[0] for text in samples.texts]
    assert sum(total != 0 for total in totals) > 20
    monkeypatch.setattr("tiltlm.guides.token_states.MAX_PLACES", 70)
    last = follow(build_token_states(embedded, [feature], samples), samples.tokens)[:, -1].tolist()
    found: dict[int, list[int]] = {}
    for state, total in zip(last, totals, strict=True):
        found.setdefault(state, []).append(total)
    right = sum(max(map(reached.count, reached)) for reached in found.values())
    assert right > 0.9 * len(totals)
