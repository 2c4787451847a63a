"""Automata of features: the last state determines the value, and equivalent states are one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlm.features import (
    Feature,
    all_of,
    any_of,
    build_feature,
    builtin_wordlists,
    contains,
    length,
    negation,
    pronouns,
    regex,
    threshold,
    wordlist,
)
from tiltlm.features.automaton import Automaton, Phrases, ProductAutomaton, State, WordCount, product_automaton

WORDS = [
    *("he", "her", "hers", "she", "herself", "him", "himself", "his", "the", "He", "SHE", "Her", "hE"),
    *("new", "york", "city", "New", "York", "new york", "york city", "newyork", "c++", "c+", "+", "x-ray", "ray", "x"),
    *("o'clock", "o’clock", "o'", "clock", "café", "CAFÉ", "caf", "4", "42", "_", "her_", "a", "über", "東京", ".net"),
]
GAPS = [" ", "  ", "\n", "\t \n", "", "-", "'", "’", "_", ".", ", ", "...", "\u00a0", "4", "(", '" ']
TRICKY = [
    *("", " ", "\n\n", "he", "he ", "hE.", "the", "The he", "she", "s he", "her", "hers", "herself", "her self"),
    *(
        "He",
        "Hex",
        "physics",
        "physic",
        "he's",
        "she’s here",
        "'he'",
        "he-she",
        "he_she",
        "he2",
        "2he",
        "he 2",
        "_he_",
        "(he)",
        "whether her other",
    ),
    *("new york", "New\n\tYork", "new  york", "new york city", "new york.", "new, york", "newyork", "new yorker"),
    *("new new york", "york new york city", "new york new", "new-york", "new york c", "a new", "york city"),
    *("x-ray", "x-x-ray", "x-", "x-rays", "x ray", "ray-x", "c++", "c+c++", "c++11", "c+++", "in C++, mostly", "c+"),
    *("five o'clock", "o’clock", "o'o'clock", "o'clocks", "o", "café", "CAFÉS", "un café", ".net", "a.net", "..net"),
    *("he she him", "she she he", "her him he", "himself herself he", "he\x1che", "his hers", "über", "42", "4 2"),
]
# Phrases that contain one another, overlap, or have other characters than letters.
LISTS = [
    ["new york city", "york"],
    ["new york", "york city", "york minster"],
    ["x-men", "ray", "x-ray"],
    ["e-mail", "mail order", "x"],
    ["c++", "+", ".net"],
    ["o'clock", "clock"],
    ["he her him", "her him", "him he"],
]
FEATURES: dict[str, Feature] = {
    **{f"contains {p}": contains(p) for p in ("he", "her", "new york", "c++", "o'clock", "café", "x-ray", ".net")},
    "contains new  york": contains(" new \n york "),
    "contains He": contains("He", ignore_case=False),
    "contains New York": contains("New York", ignore_case=False),
    **{f"list {i}": wordlist(entries) for i, entries in enumerate(LISTS)},
    "list with case": wordlist(["New york", "He", "her"], ignore_case=False),
    "science": wordlist("science"),
    **{f"pronouns {group}": pronouns(group) for group in ("female", "male", "neither")},
    "pronouns with possessives": pronouns("female", possessives=True),
    "words": length("words"),
    "no he": negation(contains("he")),
    "he and york": all_of(contains("he"), contains("york")),
    "he or no york": any_of(contains("he"), negation(contains("york"))),
    "female and short": all_of(pronouns("female"), threshold(length("words"), 3, "<=")),
    "more than two words": threshold(length("words"), 2, ">"),
}


def text_of(words: list[str], gaps: list[str]) -> str:
    return "".join(word + gap for word, gap in zip(words, gaps, strict=True))


TEXTS = st.integers(0, 7).flatmap(
    lambda n: st.builds(text_of, *(st.lists(st.sampled_from(x), min_size=n, max_size=n) for x in (WORDS, GAPS)))
)


def read(automaton: Automaton, text: str) -> State:
    state = automaton.start
    for character in text:
        state = automaton.step(state, character)
    return state


def settled(feature: Feature, texts: Iterable[str]) -> dict[State, float]:
    """The value of each state. All texts that end in a state must have the same value."""
    automaton, texts = feature.automaton(), list(texts)
    assert automaton is not None
    found: dict[State, tuple[float, str]] = {}
    for text, value in zip(texts, feature(texts).tolist(), strict=True):
        state = read(automaton, text)
        before, other = found.setdefault(state, (value, text))
        assert before == value, f"{text!r} and {other!r} both end in {state}"
    return {state: value for state, (value, _) in found.items()}


@pytest.mark.parametrize("name", FEATURES)
def test_the_last_state_determines_the_value_on_tricky_texts(name: str) -> None:
    joined = [one + gap + other for one in TRICKY for gap in ("", " ", "\n", "-") for other in TRICKY[::5]]
    assert len(set(settled(FEATURES[name], [*TRICKY, *joined]).values())) > 1


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=10, max_size=40))
def test_the_last_state_determines_the_value_on_texts_at_random(texts: list[str]) -> None:
    for feature in FEATURES.values():
        settled(feature, [*TRICKY, *texts])


@pytest.mark.parametrize("entries", LISTS)
@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXTS, min_size=5, max_size=20))
def test_a_list_has_fired_exactly_where_its_sum_is_full_once_the_word_is_over(
    entries: list[str], texts: list[str]
) -> None:
    feature = wordlist(entries)
    automaton = feature.automaton()
    assert automaton is not None
    for text, value in zip(texts, feature(texts).tolist(), strict=True):
        assert read(automaton, text + "\n")[0] == value, text


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(["he", "she", "her", "the", "him", "Herself"]), max_size=3))
def test_the_lead_of_female_pronouns_is_counted(words: list[str]) -> None:
    automaton = pronouns("female").automaton()
    female, male = ({"she", "her", "herself"}, {"he", "him", "himself"})
    lead = sum((w.lower() in female) - (w.lower() in male) for w in words)
    assert read(automaton, ", ".join(words) + ".")[0] == lead


def test_a_lead_of_more_than_three_counts_as_three() -> None:
    """Beyond it the count is lost, by design: one "he" after four "she" leaves a lead of two."""
    automaton = pronouns("female").automaton()
    leads = [read(automaton, "she " * n)[0] for n in range(6)]
    assert leads == [0, 1, 2, 3, 3, 3]
    assert read(automaton, "he " * 5)[0] == -3
    assert read(automaton, "she she she she he ")[0] == 2


def test_words_are_counted_up_to_a_bound() -> None:
    automaton = WordCount(max_count=3)
    assert [read(automaton, "ab\n " * n)[0] for n in range(6)] == [0, 1, 2, 3, 3, 3]
    assert read(WordCount(), "a " * 150) == (100, False)
    assert read(WordCount(), " a\u00a0b\n\nc") == (3, True)


def test_what_has_fired_stays() -> None:
    automaton = contains("new york").automaton()
    assert automaton.counts == (0, 1)
    assert read(automaton, "new york ") == (1, "")
    assert read(automaton, "in new york, he and new york.")[0] == 1
    assert read(automaton, "new york") == (0, "new york")


@pytest.mark.parametrize("name", FEATURES)
def test_a_text_ends_with_the_count_that_a_space_would_bring(name: str) -> None:
    automaton = FEATURES[name].automaton()
    assert automaton is not None
    for text in TRICKY:
        ended = automaton.final_count(read(automaton, text))
        assert ended == read(automaton, text + " ")[0]
        assert ended in automaton.counts


@pytest.mark.parametrize("name", FEATURES)
def test_the_place_and_the_change_are_the_same_whatever_was_counted(name: str) -> None:
    automaton = FEATURES[name].automaton()
    assert automaton is not None
    for text in TRICKY:
        state = read(automaton, text)
        for character in "e. ":
            place, change = automaton.move(state[1], character)
            for count in automaton.counts[:50]:
                after = count if change is None else automaton.add(count, change)
                assert automaton.step((count, state[1]), character) == (after, place)
                assert after in automaton.counts


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ""),
        ("ne", "ne"),
        ("nex", None),
        ("nex ", ""),
        ("new ", "new "),
        ("new \n", "new "),
        ("new ne", "ne"),
        ("new york", "new york"),
        ("new york c", "new york c"),
        ("new york m", "york m"),
        ("new york mx", None),
        ("anew", None),
        ("a-new", "new"),
    ],
)
def test_the_place_is_the_longest_prefix_of_a_phrase(text: str, place: str | None) -> None:
    automaton = Phrases((("new york city", 1), ("york minster", 1)), ignore_case=True)
    assert read(automaton, text) == (0, place)


@pytest.mark.parametrize("name", FEATURES)
def test_to_make_a_state_coarse_twice_is_to_do_it_once(name: str) -> None:
    automaton = FEATURES[name].automaton()
    assert automaton is not None
    changed = 0
    for text in TRICKY:
        state = read(automaton, text)
        coarse = automaton.coarse(state)
        assert automaton.coarse(coarse) == coarse
        changed += coarse != state
    assert changed > 0 or "words" in name


def test_a_coarse_state_keeps_what_was_counted_and_forgets_the_unfinished_word() -> None:
    automaton = Phrases((("new york", 1), ("c++ code", 1), ("old", -1)), ignore_case=True, max_count=3)
    for text, place in {"": "", "ne": None, "nex": None, "new ": "", "new yo": None, "c++": "", "x.": ""}.items():
        assert automaton.coarse(read(automaton, text)) == (0, place)
        assert automaton.coarse(read(automaton, "old old " + text)) == (-2, place)
    assert WordCount().coarse((7, True)) == (7, True)


def test_features_of_the_same_words_share_one_automaton() -> None:
    female, male, neither = (pronouns(group).automaton() for group in ("female", "male", "neither"))
    assert female == male == neither
    assert len({female, male, neither}) == 1
    assert product_automaton([female, None, male]) == female
    assert female != pronouns("female", possessives=True).automaton()
    assert contains("a").automaton() != contains("a", ignore_case=False).automaton()
    assert contains("a").automaton() != contains("b").automaton()
    assert contains("a b").automaton() == wordlist(["a b"]).automaton()


def test_different_automata_have_a_product() -> None:
    parts = [contains("he").automaton(), None, length("words").automaton(), contains("he").automaton()]
    both = product_automaton(parts)
    assert isinstance(both, ProductAutomaton)
    assert both.parts == (parts[0], parts[2])
    assert both == product_automaton(parts[:3])
    assert hash(both) == hash(product_automaton(parts[:3]))
    for text in TRICKY:
        counts, places = zip(read(parts[0], text), read(parts[2], text), strict=True)
        assert read(both, text) == (counts, places)
    assert both.coarse(read(both, "in h")) == ((0, 2), (None, True))
    assert product_automaton([]) is None
    assert product_automaton([None, None]) is None


@pytest.mark.parametrize("spec", ["regex:he", "length:tokens", "length:characters"])
def test_some_features_have_none(spec: str) -> None:
    assert build_feature(spec).automaton() is None
    assert negation(regex("he")).automaton() is None
    part: Any = all_of(contains("he"), regex("he")).automaton()
    assert part == contains("he").automaton()


@pytest.mark.parametrize("name", builtin_wordlists())
def test_every_entry_of_a_list_that_ships_is_found_between_others(name: str) -> None:
    feature = wordlist(name)
    automaton = feature.automaton()
    assert automaton is not None
    for entry in feature.phrases:
        text = f"Pre-{entry.upper()}, so"
        assert feature([text]).item() == 1
        assert read(automaton, text)[0] == 1, entry
        assert read(automaton, f"x{entry}")[0] == 0 or " " in entry or "-" in entry
