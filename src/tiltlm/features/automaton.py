"""Automata: states of a prefix that predict a feature's value, updated character by character.

Guides look these states up. Sampling stays exact whatever they are, so an automaton may ignore rare details of its
feature. The better its states predict the final value, the nearer the guided base is to the target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

# Any hashable values.
Place = Any
Count = Any
Change = Any
State = tuple[Count, Place]


class Automaton(ABC):
    """A deterministic automaton over characters. A state is (count, place).

    The count is what the feature has counted so far. The place is the position within a word or phrase; where the next
    character leads depends on the place alone, so one table of places serves all counts. A subclass defines ``start``,
    ``counts`` and ``move``. The defaults of ``forget`` and ``add`` fit whole numbers in ascending order.
    """

    @property
    @abstractmethod
    def start(self) -> State:
        """The state before the first character."""

    @property
    @abstractmethod
    def counts(self) -> tuple[Count, ...]:
        """All counts."""

    @abstractmethod
    def move(self, place: Place, character: str) -> tuple[Place, Change]:
        """The place after one more character, and the change of the count, None for no change."""

    def forget(self, place: Place) -> tuple[Place, Change]:
        """A common place that replaces a rare one, and a change or None; by default the place of ``start``."""
        return self.start[1], None

    def add(self, count: Count, change: Change) -> Count:
        """The count after a change; by default the sum, kept within ``counts``."""
        return max(self.counts[0], min(self.counts[-1], count + change))

    def step(self, state: State, character: str) -> State:
        """The state after one more character."""
        return self._after(state[0], self.move(state[1], character))

    def coarse(self, state: State) -> State:
        """A common state that replaces a rare one."""
        return self._after(state[0], self.forget(state[1]))

    def final_count(self, state: State) -> Count:
        """The count of a text that ends in the state. A space is added, so that a last word counts."""
        return self.step(state, " ")[0]

    def _after(self, count: Count, moved: tuple[Place, Change]) -> State:
        place, change = moved
        return (count if change is None else self.add(count, change)), place


@dataclass(frozen=True)
class Phrases(Automaton):
    """The sum of the ``weights`` of whole words and phrases in the text, kept within ±``max_count``.

    A place is a prefix of a phrase: the longest that the text ends with. It is "" between words, and None within a word
    that starts no phrase.
    """

    weights: tuple[tuple[str, int], ...]
    ignore_case: bool
    max_count: int = 1
    _prefixes: frozenset[str] = field(init=False, repr=False, compare=False)
    _values: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = {self._plain(" ".join(phrase.split())): value for phrase, value in self.weights}
        prefixes = {phrase[:i] for phrase in values for i in range(len(phrase) + 1)}
        # A prefix may end with a shorter phrase: "new york", a prefix of "new york city", ends with "york".
        phrases = {prefix: next((end for end in _suffixes(prefix) if end in values), None) for prefix in prefixes}
        ended = {prefix: values[phrase] for prefix, phrase in phrases.items() if phrase is not None}
        object.__setattr__(self, "_values", ended)
        object.__setattr__(self, "_prefixes", frozenset(prefixes))

    @property
    def start(self) -> State:
        return 0, ""

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(-self.max_count if min(self._values.values()) < 0 else 0, self.max_count + 1))

    def move(self, place: str | None, character: str) -> tuple[str | None, int | None]:
        character = self._plain(" " if character.isspace() else character)
        in_word = _in_word(character)
        value = None if in_word or place is None else self._values.get(place)
        return self._place(place, character, in_word), value

    def forget(self, place: str | None) -> tuple[str | None, None]:
        return (None if place is None or _in_word(place[-1:]) else ""), None

    def _place(self, place: str | None, character: str, in_word: bool) -> str | None:
        """The longest suffix of the text that starts at a word boundary and is a prefix of a phrase."""
        if place is not None:
            # White space of any length counts as one space.
            text = place if character == " " and place.endswith(" ") else place + character
            for suffix in _suffixes(text):
                if suffix in self._prefixes:
                    return suffix
        return None if in_word else ""

    def _plain(self, text: str) -> str:
        text = text.replace("\u2019", "'")
        return text.lower() if self.ignore_case else text


def _in_word(character: str) -> bool:
    """Whether the character is part of a word: \\w in a regular expression."""
    return character.isalnum() or character == "_"


def _suffixes(text: str) -> Iterator[str]:
    """The text and its suffixes that start at a word boundary, the longest first."""
    return (text[i:] for i in range(len(text)) if i == 0 or not _in_word(text[i - 1]))


# The number of words that a negation still applies to, and the index of the node of the current word's prefix.
WordPlace = tuple[int, int | None]


@dataclass(frozen=True, eq=False)
class WordSum(Automaton):
    """The sum of the ``values`` of single words, ignoring case, kept within ±``max_count``.

    Each of the ``reach`` words after one of ``negations`` counts with the opposite sign, times ``negated``. Hyphens and
    apostrophes are parts of words. A place is (number of words that a negation still applies to, node). The node is a
    prefix of a word: the root between words, None if no word has this prefix. Prefixes with equal continuations share
    a node.
    """

    values: Mapping[str, int]
    negations: frozenset[str]
    max_count: int
    reach: int = 3
    negated: float = 1.0
    # For each node: the next node by character, and (value, whether it negates) of the word that ends there.
    _nodes: list[dict[str, int]] = field(init=False, repr=False)
    _words: list[tuple[int, bool]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = {word: (self.values.get(word, 0), word in self.negations) for word in (*self.values, *self.negations)}
        known: dict[Any, int] = {}
        self._node(words, known)
        object.__setattr__(self, "_nodes", [dict(after) for _, after in known])
        object.__setattr__(self, "_words", [word for word, _ in known])

    def _node(self, suffixes: dict[str, tuple[int, bool]], known: dict[Any, int]) -> int:
        """The index of the node with these suffixes of words; ``known`` collects all nodes. The root comes last."""
        branches: dict[str, dict[str, tuple[int, bool]]] = {}
        for suffix, word in suffixes.items():
            if suffix:
                branches.setdefault(suffix[0], {})[suffix[1:]] = word
        after = tuple((letter, self._node(branch, known)) for letter, branch in sorted(branches.items()))
        return known.setdefault((suffixes.get("", (0, False)), after), len(known))

    @property
    def start(self) -> State:
        return 0, (0, self._root)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(-self.max_count, self.max_count + 1))

    def move(self, place: WordPlace, character: str) -> tuple[WordPlace, int | None]:
        negated_words, node = place
        if _in_word(character) or (character in "-'\u2019" and node != self._root):
            return (negated_words, None if node is None else self._nodes[node].get(character.lower())), None
        if node == self._root:
            return place, None
        negates = node is not None and self._words[node][1]
        return (self.reach if negates else max(0, negated_words - 1), self._root), self._value(place)

    def forget(self, place: WordPlace) -> tuple[WordPlace, int | None]:
        """The node outside of all words, without negation. A word that ends here counts."""
        node = place[1]
        if node is None or node == self._root:
            return (0, node), None
        return (0, None), self._value(place)

    @property
    def _root(self) -> int:
        return len(self._nodes) - 1

    def _value(self, place: WordPlace) -> int | None:
        """The value of the word that ends at this place, None for 0."""
        negated_words, node = place
        value = 0 if node is None else self._words[node][0]
        if not value or not negated_words:
            return value or None
        size = round(self.negated * abs(value)) or 1
        return -size if value > 0 else size


@dataclass(frozen=True)
class WordCount(Automaton):
    """Counts words, up to ``max_count``; the place is True within a word."""

    max_count: int = 100

    @property
    def start(self) -> State:
        return 0, False

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(range(self.max_count + 1))

    def move(self, place: bool, character: str) -> tuple[bool, int | None]:
        if character.isspace():
            return False, None
        return True, None if place else 1

    def forget(self, place: bool) -> tuple[bool, None]:
        return place, None


@dataclass(frozen=True)
class ProductAutomaton(Automaton):
    """Several automata in parallel: tuples of their counts and of their places."""

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


def product_automaton(automata: Iterable[Automaton | None]) -> Automaton | None:
    """One automaton for all that are not None; None if there is none."""
    parts = tuple(dict.fromkeys(part for part in automata if part is not None))
    return None if not parts else parts[0] if len(parts) == 1 else ProductAutomaton(parts)
