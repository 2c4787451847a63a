"""Automata: what a prefix of a text already says of a feature, as a small state that reads one character at a time.

Guided sampling looks these states up. It stays exact whatever they are, so an automaton may leave out rare subtleties
of the feature that it stands for; the more it tells of the value to come, the closer the guided law is to the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

# Any hashable values; automata agree on nothing else.
Place = Any
Count = Any
Change = Any
State = tuple[Count, Place]


class Automaton(ABC):
    """A deterministic automaton over characters. Its state is what has been counted and the place within a word.

    The place says where reading goes on, whatever has been counted; so a table of places serves all counts. The text's
    last word counts as if a space came after it.
    """

    @property
    @abstractmethod
    def start(self) -> State:
        """The state before the first character."""

    @property
    @abstractmethod
    def counts(self) -> tuple[Count, ...]:
        """All counts that there are."""

    @abstractmethod
    def move(self, place: Place, character: str) -> tuple[Place, Change]:
        """The place after one more character, and what changes in the count, or None."""

    @abstractmethod
    def forget(self, place: Place) -> tuple[Place, Change]:
        """A place that stands in for one seen too seldom, without what is half read; and a change, or None."""

    @abstractmethod
    def add(self, count: Count, change: Change) -> Count:
        """The count after a change."""

    def step(self, state: State, character: str) -> State:
        """The state after one more character."""
        return self._after(state[0], self.move(state[1], character))

    def coarse(self, state: State) -> State:
        """A state that stands in for one seen too seldom."""
        return self._after(state[0], self.forget(state[1]))

    def ended(self, state: State) -> Count:
        """What has been counted of a text that ends in the state."""
        return self.step(state, " ")[0]

    def _after(self, count: Count, moved: tuple[Place, Change]) -> State:
        place, change = moved
        return (count if change is None else self.add(count, change)), place


@dataclass(frozen=True)
class Phrases(Automaton):
    """Counts whole words and phrases: ``weights`` pairs each with what it adds; the sum is kept within ±``most``.

    The place in the tree of beginnings is the beginning itself, "" between words and None within a word that no phrase
    begins like.
    """

    weights: tuple[tuple[str, int], ...]
    ignore_case: bool
    most: int = 1
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

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(-self.most if min(self._values.values()) < 0 else 0, self.most + 1))

    def move(self, place: str | None, character: str) -> tuple[str | None, int | None]:
        character = self._plain(" " if character.isspace() else character)
        inside = _inside(character)
        value = None if inside or place is None else self._values.get(place)
        return self._place(place, character, inside), value

    def forget(self, place: str | None) -> tuple[str | None, None]:
        return (None if place is None or _inside(place[-1:]) else ""), None

    def add(self, count: int, change: int) -> int:
        return max(self.counts[0], min(self.most, count + change))

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


# How many words a negation still reaches, and where among the beginnings of words.
WordPlace = tuple[int, int | None]


@dataclass(frozen=True, eq=False)
class WordSum(Automaton):
    """Adds up what single words are worth, in whatever case; the sum is kept within ±``most``.

    Each of the ``reach`` words after one of ``negations`` counts the other way, ``negated`` times as much. A hyphen or
    an apostrophe ends no word. A place is (words that a negation still reaches, place among the beginnings of words:
    ``start``'s between words, None within a word that none begins like). Beginnings that go on alike are one.
    """

    values: Mapping[str, int]
    negations: frozenset[str]
    most: int
    reach: int = 3
    negated: float = 1.0
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
        return 0, (0, len(self._places) - 1)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(-self.most, self.most + 1))

    def move(self, place: WordPlace, character: str) -> tuple[WordPlace, int | None]:
        reached, within = place
        between = len(self._places) - 1
        if _inside(character) or (character in "-'\u2019" and within != between):
            return (reached, None if within is None else self._places[within].get(character.lower())), None
        if within == between:
            return place, None
        negates = within is not None and self._ends[within][1]
        return (self.reach if negates else max(0, reached - 1), between), self._value(place)

    def forget(self, place: WordPlace) -> tuple[WordPlace, int | None]:
        """A word that may end here counts; what is half read and the negation are forgotten."""
        within = place[1]
        if within is None or within == len(self._places) - 1:
            return (0, within), None
        return (0, None), self._value(place)

    def add(self, count: int, change: int) -> int:
        return max(-self.most, min(self.most, count + change))

    def _value(self, place: WordPlace) -> int | None:
        """What the word counts that ends in the place."""
        reached, within = place
        value = 0 if within is None else self._ends[within][0]
        if not value or not reached:
            return value or None
        size = round(self.negated * abs(value)) or 1
        return -size if value > 0 else size


@dataclass(frozen=True)
class WordCount(Automaton):
    """Counts words, up to ``most``; the place is whether one is within a word."""

    most: int = 100

    @property
    def start(self) -> State:
        return 0, False

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(self.most + 1))

    def move(self, place: bool, character: str) -> tuple[bool, int | None]:
        if character.isspace():
            return False, None
        return True, None if place else 1

    def forget(self, place: bool) -> tuple[bool, None]:
        return place, None

    def add(self, count: int, change: int) -> int:
        return min(self.most, count + change)


@dataclass(frozen=True)
class Together(Automaton):
    """Several automata side by side: their counts, and their places."""

    parts: tuple[Automaton, ...]

    @cached_property
    def start(self) -> State:
        starts = [part.start for part in self.parts]
        return tuple(count for count, _ in starts), tuple(place for _, place in starts)

    @cached_property
    def counts(self) -> tuple[Count, ...]:
        return tuple(product(*(part.counts for part in self.parts)))

    def move(self, place: Place, character: str) -> tuple[Place, Change]:
        return self._all(part.move(p, character) for part, p in zip(self.parts, place, strict=True))

    def forget(self, place: Place) -> tuple[Place, Change]:
        return self._all(part.forget(p) for part, p in zip(self.parts, place, strict=True))

    def add(self, count: Count, change: Change) -> Count:
        each = zip(self.parts, count, change, strict=True)
        return tuple(c if one is None else part.add(c, one) for part, c, one in each)

    def _all(self, moved: Iterable[tuple[Place, Change]]) -> tuple[Place, Change]:
        places, changes = zip(*moved, strict=True)
        return places, None if all(change is None for change in changes) else changes


def together(automata: Iterable[Automaton | None]) -> Automaton | None:
    """One automaton for all that are there; None where none is."""
    parts = tuple(dict.fromkeys(part for part in automata if part is not None))
    return None if not parts else parts[0] if len(parts) == 1 else Together(parts)
