"""Automata: what a prefix of a text already says of a feature, as a small state that reads one character at a time.

Guided sampling looks these states up. It stays exact whatever they are, so an automaton may leave out rare subtleties
of the feature that it stands for; the more it tells of the value to come, the closer the guided law is to the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

# Any hashable value; automata agree on nothing else.
State = Any


class Automaton(Protocol):
    """A deterministic automaton over characters, with states that are equal where they mean the same."""

    @property
    def start(self) -> State:
        """The state before the first character."""

    def step(self, state: State, character: str) -> State:
        """The state after one more character."""

    def coarse(self, state: State) -> State:
        """A state that stands in for one seen too seldom: what has been counted, without what is half read."""


@dataclass(frozen=True)
class Phrases:
    """Counts whole words and phrases: ``weights`` pairs each with what it adds; the sum is kept within ±``most``.

    A state is (sum so far, place in the tree of beginnings); the place is the beginning itself, "" between words and
    None within a word that no phrase begins like. With ``absorbing`` nothing is read once the sum has reached ``most``.
    """

    weights: tuple[tuple[str, int], ...]
    ignore_case: bool
    most: int = 1
    absorbing: bool = False
    _beginnings: frozenset[str] = field(init=False, repr=False, compare=False)
    _values: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = {self._plain(" ".join(phrase.split())): value for phrase, value in self.weights}
        beginnings = {phrase[:i] for phrase in values for i in range(len(phrase) + 1)}
        # A beginning may end with a shorter phrase: "new york", on the way to "new york city", with "york".
        ends = {read: next((end for end in _ends(read) if end in values), None) for read in beginnings}
        object.__setattr__(self, "_values", {read: values[end] for read, end in ends.items() if end is not None})
        object.__setattr__(self, "_beginnings", frozenset(beginnings))

    @property
    def start(self) -> State:
        return 0, ""

    def step(self, state: State, character: str) -> State:
        total, place = state
        if self.absorbing and total == self.most:
            return state
        character = self._plain(" " if character.isspace() else character)
        inside = _inside(character)
        if not inside and place in self._values:
            total = max(-self.most, min(self.most, total + self._values[place]))
            if self.absorbing and total == self.most:
                return total, ""
        return total, self._place(place, character, inside)

    def coarse(self, state: State) -> State:
        total, place = state
        return total, None if place is None or _inside(place[-1:]) else ""

    def _place(self, place: str | None, character: str, inside: bool) -> str | None:
        """The longest end of what was read, from a word's first letter on, that begins a phrase."""
        if place is not None:
            # White space may be as long as it likes.
            read = place if character == " " and place.endswith(" ") else place + character
            for end in _ends(read):
                if end in self._beginnings:
                    return end
        return None if inside else ""

    def _plain(self, text: str) -> str:
        text = text.replace("\u2019", "'")
        return text.lower() if self.ignore_case else text


def _inside(character: str) -> bool:
    """Whether a word goes on with it; \\w in a regular expression."""
    return character.isalnum() or character == "_"


def _ends(read: str) -> Iterator[str]:
    """What was read, and each end of it before which no word is cut, the longest first."""
    return (read[i:] for i in range(len(read)) if i == 0 or not _inside(read[i - 1]))


@dataclass(frozen=True, eq=False)
class WordSum:
    """Adds up what single words are worth, in whatever case; the sum is kept within ±``most``.

    Each of the ``reach`` words after one of ``negations`` counts the other way. A hyphen or an apostrophe ends no word.
    A state is (sum so far, words that a negation still reaches, place among the beginnings of words: ``start``'s
    between words, None within a word that none begins like). Beginnings that go on alike are one place.
    """

    values: Mapping[str, int]
    negations: frozenset[str]
    most: int
    reach: int = 3
    _places: list[dict[str, int]] = field(init=False, repr=False)
    _ends: list[tuple[int, bool]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = {word: (self.values.get(word, 0), word in self.negations) for word in (*self.values, *self.negations)}
        known: dict[Any, int] = {}
        self._place(words, known)
        object.__setattr__(self, "_places", [dict(after) for _, after in known])
        object.__setattr__(self, "_ends", [end for end, _ in known])

    def _place(self, endings: dict[str, tuple[int, bool]], known: dict[Any, int]) -> int:
        """The place from which words go on with these ``endings``; ``known`` holds those that there are."""
        branches: dict[str, dict[str, tuple[int, bool]]] = {}
        for ending, end in endings.items():
            if ending:
                branches.setdefault(ending[0], {})[ending[1:]] = end
        after = tuple((letter, self._place(branch, known)) for letter, branch in sorted(branches.items()))
        return known.setdefault((endings.get("", (0, False)), after), len(known))

    @property
    def start(self) -> State:
        return 0, 0, len(self._places) - 1

    def step(self, state: State, character: str) -> State:
        total, reached, place = state
        between = len(self._places) - 1
        if _inside(character) or (character in "-'\u2019" and place != between):
            return total, reached, None if place is None else self._places[place].get(character.lower())
        if place == between:
            return state
        value, negates = (0, False) if place is None else self._ends[place]
        return self._sum(total, value, reached), self.reach if negates else max(0, reached - 1), between

    def coarse(self, state: State) -> State:
        """A word that may end here counts; what is half read and the negation are forgotten."""
        total, reached, place = state
        between = len(self._places) - 1
        if place is None or place == between:
            return total, 0, place
        return self._sum(total, self._ends[place][0], reached), 0, None

    def _sum(self, total: int, value: int, reached: int) -> int:
        return max(-self.most, min(self.most, total + (-value if reached else value)))


@dataclass(frozen=True)
class WordCount:
    """Counts words, up to ``most``: a state is (words begun, whether within one)."""

    most: int = 100

    @property
    def start(self) -> State:
        return 0, False

    def step(self, state: State, character: str) -> State:
        words, within = state
        if character.isspace():
            return words, False
        return (words if within else min(self.most, words + 1)), True

    def coarse(self, state: State) -> State:
        return state


@dataclass(frozen=True)
class Together:
    """Several automata side by side."""

    parts: tuple[Automaton, ...]

    @cached_property
    def start(self) -> State:
        return tuple(part.start for part in self.parts)

    def step(self, state: State, character: str) -> State:
        return tuple(part.step(s, character) for part, s in zip(self.parts, state, strict=True))

    def coarse(self, state: State) -> State:
        return tuple(part.coarse(s) for part, s in zip(self.parts, state, strict=True))


def together(automata: Iterable[Automaton | None]) -> Automaton | None:
    """One automaton for all that are there; None where none is."""
    parts = tuple(dict.fromkeys(part for part in automata if part is not None))
    return None if not parts else parts[0] if len(parts) == 1 else Together(parts)
