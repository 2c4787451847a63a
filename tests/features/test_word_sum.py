"""WordSum: sums of word values, and its sign against VADER's compound score."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlm.features import negation, sentiment, threshold
from tiltlm.features.automaton import Automaton, State, WordSum

PLAIN = [
    *("He was a great poet.", "The war killed his brother.", "She won a prize", "It is a book about trains."),
    *("He was not happy with the school", "His friends loved the gift, and so did she.", "They hated it", ""),
    *("The film was never good", "a terrible, horrible accident", "She lost the battle, and the war"),
    *("It was without success.", "Award-winning, he lives in Paris", "The man's peace", 'the "best" of all'),
    *("GREAT JOY", "nothing bad", "an incredible man", "The best and the worst of murders", "ha-ha, happy"),
]
TRICKY = [
    *PLAIN,
    "happ",
    "happy",
    "happyish",
    "not happ",
    "don't",
    "-",
    "won't kill",
    "a\nb",
    "\u2019happy\u2019",
    "très",
]
WORDS = ["happy", "sad", "the", "war", "prize", "house", "kill", "loved", "worst", "in", "good", "Terrible"]


def read(automaton: Automaton, text: str) -> State:
    state = automaton.start
    for character in text:
        state = automaton.step(state, character)
    return state


def total(text: str) -> int:
    """The sum after the last word has ended."""
    return int(read(sentiment().automaton(), text + " ")[0])


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


@pytest.mark.parametrize("text", PLAIN)
def test_the_sum_has_the_sign_of_vader(text: str) -> None:
    compound = float(sentiment()([text]))
    assert sign(total(text)) == sign(compound), (total(text), compound)


def test_the_plain_sentences_have_all_three_signs() -> None:
    assert {sign(float(value)) for value in sentiment()(PLAIN)} == {-1, 0, 1}


# Without a bound. With one, the order of the words matters.
UNBOUNDED = replace(sentiment().automaton(), max_count=100)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS), max_size=5), gap=st.sampled_from([" ", "\n", ", "]))
def test_the_sum_has_the_sign_of_vader_on_random_words_with_a_clear_score(words: list[str], gap: str) -> None:
    text = gap.join(words)
    compound = float(sentiment()([text]))
    reached = read(UNBOUNDED, text + " ")[0]
    if abs(compound) > 0.6:
        assert sign(reached) == sign(compound)


def test_values_negations_and_bounds() -> None:
    automaton = WordSum({"good": 2, "bad": -3, "badly": -1}, frozenset({"not", "isn't"}), max_count=4, reach=2)
    sums = {
        "good": 0,
        "good ": 2,
        "Good.": 2,
        "goods ": 0,
        "a good,bad ": -1,
        "good good good ": 4,
        "bad bad bad ": -4,
        "not good ": -2,
        "not so good ": -2,
        "not so very good ": 2,
        "isn't bad ": 3,
        "not good good good ": -2,
        "bad-ly ": 0,
        "badly ": -1,
        "bad's ": 0,
        "'bad' ": 0,
        "(bad) ": -3,
        "-bad ": -3,
        "good\n\nbad\t": -1,
    }
    for text, expected in sums.items():
        assert read(automaton, text)[0] == expected, text


def test_a_negated_value_may_count_less_but_never_nothing() -> None:
    automaton = WordSum({"good": 4, "bad": -6, "fine": 1}, frozenset({"not"}), max_count=9, negated=0.4)
    for text, expected in {"not good ": -2, "not bad ": 2, "not fine ": -1, "good ": 4}.items():
        assert read(automaton, text)[0] == expected, text


def test_prefixes_with_equal_continuations_share_a_node() -> None:
    automaton = WordSum({"fail": -2, "mail": -2, "nail": 1, "fails": -2, "mails": -2}, frozenset(), max_count=4)
    assert read(automaton, "fai") == read(automaton, "mai") != read(automaton, "nai")
    assert read(automaton, "fails") == read(automaton, "a mails")


@pytest.mark.parametrize("text", TRICKY)
def test_a_coarse_state_counts_the_word_that_may_end_here(text: str) -> None:
    automaton = sentiment().automaton()
    state = read(automaton, text)
    coarse = automaton.coarse(state)
    assert automaton.coarse(coarse) == coarse
    assert read(automaton, text + " ")[0] == automaton.step(coarse, " ")[0]


def test_all_kinds_of_sentiment_share_one_automaton() -> None:
    kinds = [sentiment(kind) for kind in ("positive", "negative", "compound")]
    kinds += [negation(kinds[0]), threshold(kinds[2], 0.5)]
    assert len({feature.automaton() for feature in kinds}) == 1
