"""Lexical features: what counts as a word, and the evidence."""

from __future__ import annotations

import re
import time
import unicodedata
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlm.features import Feature, builtin_wordlists, contains, length, pronouns, regex, sentiment, wordlist
from tiltlm.features.batch import merged

REQUIRED_LISTS = ["art", "business", "computing", "cooking", "military", "music", "politics", "religion", "science"]


def fires(feature: Feature, text: str) -> bool:
    return bool(feature([text]).item())


@pytest.mark.parametrize(
    ("phrase", "text", "expected"),
    [
        ("amazing", "It was amazing.", True),
        ("amazing", "Amazing!", True),
        ("amazing", "amazingly good", False),
        ("amazing", "unamazing", False),
        ("amazing", "(amazing)", True),
        ("amazing", "amazing_thing", False),
        ("art", "state-of-the-art", True),
        ("prime minister", "the Prime\n  Minister said", True),
        ("prime minister", "prime ministers", False),
        ("prime  minister", "prime minister", True),
        ("C++", "written in C++, mostly", True),
        ("C++", "C++11", False),
        (".", "no full stop", False),
        ("o'clock", "at five o’clock", True),
        ("o’clock", "at five o'clock", True),
        ("café", "the CAFÉ there", True),
        ("café", "the cafe\u0301 there", True),
        ("cafe\u0301", "the café there", True),
        ("cafe", "the cafe\u0301 there", False),
        ("cole", "l'e\u0301cole", False),
        ("naïve", "a naïve view", True),
        ("na", "a naïve view", False),
        ("straße", "in der Straße", True),
        ("Ωμέγα", "το ωμέγα εδώ", True),
        ("東京", "東京 は", True),
        ("ह", "हिन्दी", False),
    ],
)
def test_contains_matches_whole_words_in_any_script(phrase: str, text: str, expected: bool) -> None:
    assert fires(contains(phrase), text) is expected


def test_contains_can_respect_case() -> None:
    assert fires(contains("us"), "in the US")
    assert not fires(contains("us", ignore_case=False), "in the US")
    assert fires(contains("US", ignore_case=False), "in the US")


def test_evidence_of_contains_is_every_occurrence() -> None:
    text = "War and wars; a war."
    assert [text[start:end] for start, end in contains("war").evidence(text)] == ["War", "war"]


def test_the_longest_entry_of_a_list_is_the_evidence() -> None:
    text = "the air force base and the air"
    found = [text[start:end] for start, end in wordlist(["air", "air force", "air force base"]).evidence(text)]
    assert found == ["air force base", "air"]


@given(
    words=st.lists(st.text(alphabet="abcé '-.", min_size=1, max_size=6).filter(lambda w: w.strip()), min_size=1),
    text=st.text(alphabet="abcé '-.", max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_a_word_list_fires_exactly_where_one_of_its_entries_is_contained(words: list[str], text: str) -> None:
    assert fires(wordlist(words), text) == any(fires(contains(word), text) for word in words)


@given(text=st.text(alphabet="ab c", max_size=30), word=st.text(alphabet="abc", min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_contains_agrees_with_splitting_plain_text(text: str, word: str) -> None:
    assert fires(contains(word), text) == (word in text.split())


def test_the_ten_lists_are_there_and_sports_too() -> None:
    assert builtin_wordlists() == sorted([*REQUIRED_LISTS, "sports"])


@pytest.mark.parametrize("name", builtin_wordlists())
def test_a_built_in_list_is_clean(name: str) -> None:
    text = (resources.files("tiltlm.features") / "wordlists" / f"{name}.txt").read_text(encoding="utf-8")
    entries = text.splitlines()
    assert text.endswith("\n")
    assert 80 <= len(entries) <= 150
    assert entries == sorted(set(entries))
    for entry in entries:
        assert entry == entry.strip().lower() == unicodedata.normalize("NFC", entry)
        assert re.fullmatch(r"[\w'-]+( [\w'-]+)*( \d+)?", entry), entry
        assert fires(wordlist(name), f"So {entry.upper()}, then.")


def test_few_words_are_on_two_built_in_lists() -> None:
    owners: dict[str, list[str]] = {}
    for name in builtin_wordlists():
        text = (resources.files("tiltlm.features") / "wordlists" / f"{name}.txt").read_text(encoding="utf-8")
        for entry in text.splitlines():
            owners.setdefault(entry, []).append(name)
    assert {entry: names for entry, names in owners.items() if len(names) > 1} == {}


def test_a_word_list_file_is_stripped_and_its_comments_skipped(tmp_path: Path) -> None:
    file = tmp_path / "gardening.txt"
    file.write_bytes("\ufeffSpade\r\n\r\n # tools\r\n  watering can \r\n# rake\r\n".encode())
    feature = wordlist(file)
    assert feature.name == "gardening"
    assert fires(feature, "a spade")
    assert fires(feature, "Watering  cans? No, a watering can.")
    assert not fires(feature, "# tools and a rake")
    assert wordlist(str(file)) == feature


def test_the_time_of_a_word_list_hardly_grows_with_its_length() -> None:
    texts = ["the quick brown fox jumps over the lazy dog and then it rests for a while " * 3] * 3000
    large = wordlist([f"{a}{b}{c}zq" for a in "abcdefghijklmnopqr" for b in "aeiouyxw" for c in "bcdfghjklmnprst"])
    start = time.process_time()
    large(texts)
    # Measured: 0.06 s; a flat alternation of these 2,160 words needs 2.3 s.
    assert time.process_time() - start < 0.8


@pytest.mark.parametrize(
    ("text", "possessives", "group"),
    [
        ("She sang.", False, "female"),
        ("HER song", False, "female"),
        ("He loves himself, and she too.", False, "male"),
        ("He met her.", False, "neither"),
        ("The hero's shed: sheer heresy, himalaya.", False, "neither"),
        ("", False, "neither"),
        ("His book", False, "neither"),
        ("His book", True, "male"),
        ("Hers", False, "neither"),
        ("Hers", True, "female"),
        ("She's here and he’ll see her.", False, "female"),
    ],
)
def test_pronouns_follow_the_majority(text: str, possessives: bool, group: str) -> None:
    fired = {name: fires(pronouns(name, possessives), text) for name in ("female", "male", "neither")}
    assert fired == {name: name == group for name in fired}


def test_pronouns_point_at_the_majority_only() -> None:
    text = "She herself saw him."
    assert [text[a:b] for a, b in pronouns("female").evidence(text)] == ["She", "herself"]
    assert pronouns("male").evidence(text) == []
    assert pronouns("neither").evidence("He met her.") == []


def test_regex_options_and_evidence() -> None:
    assert not fires(regex("^b"), "a\nb")
    assert fires(regex("^b", multiline=True), "a\nb")
    assert not fires(regex("a.b"), "a\nb")
    assert fires(regex("a.b", dot_all=True), "a\nb")
    assert not fires(regex("abc"), "ABC")
    assert fires(regex("abc", ignore_case=True), "ABC")
    assert regex(r"\d+").evidence("in 1948 and 7") == [(3, 7), (12, 13)]
    assert fires(regex("(?=.*b)"), "ab")
    assert regex("(?=.*b)").evidence("ab") == []


def test_lengths() -> None:
    text = " Two  words 🎼 "
    assert length()([text]).item() == 3
    assert length("characters")([text]).item() == len(text) == 14
    assert length("tokens")([text, ""], completion_ids=[[5, 6, 7, 0], [0]]).tolist() == [4, 1]


def test_sentiment_thresholds() -> None:
    # VADER's own scores: 0.0516 and -0.0516 just reach the threshold, 0.0258 and -0.0258 do not.
    texts = ["A wonderful, happy triumph.", "A horrible, cruel murder.", "affronted", "wag", "aboard", "amazons", ""]
    compound = sentiment("compound")(texts)
    assert compound[2:].tolist() == [0.0516, -0.0516, 0.0258, -0.0258, 0.0]
    assert 0.5 < compound[0] < 1
    assert -1 < compound[1] < -0.5
    assert sentiment("positive")(texts).tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert sentiment("negative")(texts).tolist() == [0, 1, 0, 1, 0, 0, 0]


def test_thresholds_compare_at_the_edge() -> None:
    texts = ["one", "one two", "one two three"]
    expected = {">=": [0, 1, 1], ">": [0, 0, 1], "<=": [1, 1, 0], "<": [1, 0, 0]}
    assert {op: length().threshold(2, op)(texts).tolist() for op in expected} == expected


def test_combined_evidence_is_merged() -> None:
    assert merged([(5, 9), (0, 3), (2, 6), (3, 4), (9, 10), (20, 21)]) == [(0, 9), (9, 10), (20, 21)]
    text = "she won the world cup"
    found = (contains("world cup") & contains("the world") & pronouns("female")).evidence(text)
    assert [text[start:end] for start, end in found] == ["she", "the world cup"]
    assert (~contains("war")).evidence(text) == []
