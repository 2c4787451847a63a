"""From characters to tokens: the states that a target's automata reach on the tokens of a model."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.features import Feature, measure
from tiltlm.features.automaton import Automaton, Change, Count, Place, State, product_automaton
from tiltlm.lm import Guide, LanguageModel, Samples, Transitions

# Further places are merged into coarser ones, because each place costs a row of the vocabulary.
MAX_PLACES = 5000
# Entries of all these rows.
MAX_TRANSITIONS = 2**25
# Places times counts; each costs a number for every position.
MAX_STATES = 2**17


@dataclass(frozen=True)
class TokenStates:
    """Where ``transitions`` [S, V] lead on the tokens of a model; S + s where a token ends the text in state s.

    ``values`` [S, K] are the features of a text that ends in each state, None where a feature has no automaton.
    ``parent`` [F] is the place that each place was split from, or itself; None where no place was split.
    ``final_count`` [S] is the index of the count of a text that ends in the state.
    """

    transitions: Transitions
    start: int = 0
    values: Tensor | None = None
    parent: Tensor | None = None
    final_count: Tensor | None = None

    @staticmethod
    def of(table: Tensor, start: int = 0, values: Tensor | None = None) -> TokenStates:
        """The states of a full table [S, V]."""
        return TokenStates(Transitions.of(table), start, values)

    def passing(self) -> Tensor:
        """1 where a text that ends in the state passes all features, else 0 [S], float64."""
        assert self.values is not None
        return (self.values > 0).all(1).double()

    def guide(self, log_value_table: Tensor) -> Guide:
        """A guide over these states, from log ψ [T + 1, 2S]."""
        table = self.transitions
        return Guide(table[:] if table.counts.shape[1] == 1 else table, log_value_table, self.start)


def prefix_automaton(features: Sequence[Feature]) -> Automaton:
    """The automata of all features that have one. Raises UsageError where none has."""
    automaton = product_automaton(feature.automaton() for feature in features)
    if automaton is None:
        names = ", ".join(f"'{feature.name}'" for feature in features)
        raise UsageError(
            f"method: a guide needs a feature that can be computed from a prefix (words, phrases, pronouns, "
            f"word counts, and combinations of them), and {names} cannot; choose another method, e.g. gdc++"
        )
    return automaton


def build_token_states(model: LanguageModel, features: Sequence[Feature], samples: Samples) -> TokenStates:
    """The most important places of the features' automata, each with all counts. Coarser places replace the others.

    Places that ``samples`` visit come first, ordered by how often the coarser place would reach different states. Then
    come the places that random tokens reach most often, because most words of a list are in no sample. Raises
    UsageError where no feature has an automaton.
    """
    automaton = prefix_automaton(features)
    vocabulary = TokenTrie(token_texts(model))
    stepped: dict[tuple[State, int], State] = {}

    def step(state: State, token: int) -> State:
        key = state, token
        if key not in stepped:
            stepped[key] = read_text(automaton, state, vocabulary.texts[token])
        return stepped[key]

    visits, needed = Counter[Place](), Counter[Place]()
    coarse = dict[Place, None]()
    for ids in samples.completion_ids:
        path = list(accumulate(ids, step, initial=automaton.start))
        for t, state in enumerate(path):
            coarse_state = automaton.coarse(state)
            coarse[coarse_state[1]] = None
            visits[state[1]] += 1
            needed[state[1]] += coarse_state == state or _diverges(coarse_state, path[t + 1 :], ids[t:], step)
    most = min(MAX_PLACES, MAX_STATES // len(automaton.counts), MAX_TRANSITIONS // model.vocab_size)
    first = [automaton.start[1], *(p for p, times in needed.most_common(max(1, most)) if times), *coarse]
    rates = _token_rates(model.vocab_size, samples.completion_ids)
    reached = _expand_places(automaton, vocabulary, list(dict.fromkeys(first)), visits, rates, most)
    number = {n: i for i, n in enumerate(automaton.counts)}
    start = number[automaton.start[0]]
    transitions = token_transitions(model, automaton, list(reached), reached.values())
    final_count = torch.tensor([number[automaton.final_count((n, place))] for place in reached for n in number])
    values = None
    if all(feature.automaton() is not None for feature in features):
        texts = _shortest_texts(transitions, final_count, start)
        by_count = measure(features, [model.tokenizer.decode(texts.get(n, [])) for n in range(len(number))])
        values = by_count[final_count]
    return TokenStates(transitions, start, values, final_count=final_count)


def _expand_places(
    automaton: Automaton,
    vocabulary: TokenTrie,
    first: Sequence[Place],
    visits: Mapping[Place, int],
    token_rates: Sequence[float],
    most: int,
) -> dict[Place, list[PlaceChanges]]:
    """The ``first`` places and, up to ``most`` in all, those reached most often; with the place after each token.

    ``visits`` are the samples' visits to each place, ``token_rates`` [V] the probability of each token.
    """
    recorder = ChangeRecorder(automaton)
    memo: dict[tuple[PlaceChanges, int], list[tuple[int, PlaceChanges]]] = {}
    reached: dict[Place, list[PlaceChanges]] = {}
    rate = {place: float(visits.get(place, 0)) for place in first}
    # The most frequent place is next; ties go to the place that was found first.
    waiting, found = list[tuple[float, int, Place]](), count()
    todo = list(reversed(first))
    while todo or (waiting and len(reached) < most):
        place = todo.pop() if todo else heapq.heappop(waiting)[2]
        if place in reached:
            continue
        reached[place] = vocabulary.read_all(recorder, (place, ()), memo)
        added: dict[Place, float] = {}
        for token, (after, _) in enumerate(reached[place]):
            if after not in reached:
                added[after] = added.get(after, 0.0) + token_rates[token]
        for after, probability in added.items():
            rate[after] = rate.get(after, 0.0) + rate[place] * probability
            heapq.heappush(waiting, (-rate[after], next(found), after))
    return reached


def _shortest_texts(transitions: Transitions, final_count: Tensor, start: int) -> dict[int, list[int]]:
    """The tokens of a shortest text for each final count [S], where there is one."""
    wanted, s = set(final_count.tolist()), len(transitions)
    found, seen = dict[int, list[int]](), {start}
    waiting = deque([(start, list[int]())])
    while waiting and len(found) < len(wanted):
        state, tokens = waiting.popleft()
        found.setdefault(int(final_count[state]), tokens)
        after, first = _first_of_each(transitions[state] % s)
        for one, token in zip(after, first, strict=True):
            if one not in seen:
                seen.add(one)
                waiting.append((one, [*tokens, token]))
    return found


def _first_of_each(values: Tensor) -> tuple[list[int], list[int]]:
    """The distinct values and the index of each one's first occurrence, in the order of these."""
    distinct, inverse = torch.unique(values, return_inverse=True)
    place = torch.arange(len(values)).flip(0)
    first = torch.empty_like(distinct).scatter_(0, inverse.flip(0), place).sort()
    return distinct[first.indices].tolist(), first.values.tolist()


def _token_rates(vocab_size: int, texts: Sequence[Sequence[int]]) -> list[float]:
    """The relative frequency of each token [V], with one added to each count."""
    counts = Counter(token for ids in texts for token in ids)
    total = counts.total() + vocab_size
    return [(counts[token] + 1) / total for token in range(vocab_size)]


def single_state(model: LanguageModel) -> TokenStates:
    """One state for all prefixes, and its end."""
    table = torch.zeros(1, model.vocab_size, dtype=torch.long)
    table[:, model.eos_ids] = 1
    return TokenStates.of(table)


def _diverges(coarse: State, path: Sequence[State], tokens: Sequence[int], step: Callable[[State, int], State]) -> bool:
    """Whether the following ``tokens`` never bring the coarse state back to ``path``."""
    for state, token in zip(path, tokens, strict=True):
        coarse = step(coarse, token)
        if coarse == state:
            return False
    return True


def token_transitions(
    model: LanguageModel, automaton: Automaton, places: Sequence[Place], reached: Iterable[Sequence[PlaceChanges]]
) -> Transitions:
    """Where each token leads from the F ``places``, given the place and the changes after each token from each place.

    A place outside of ``places`` is replaced by its coarser one. If that is missing too, the place stays as it is.
    """
    index = {place: i for i, place in enumerate(places)}
    number = {n: i for i, n in enumerate(automaton.counts)}
    counts = {tuple(number.values()): 0}
    row_of_changes: dict[tuple[Change, ...], int] = {}

    def resolve(place: Place, changes: tuple[Change, ...], otherwise: int) -> tuple[int, int]:
        if place not in index:
            place, change = automaton.forget(place)
            changes = changes if change is None else (*changes, change)
        if changes not in row_of_changes:
            after = tuple(number[_apply_changes(automaton, n, changes)] for n in number)
            row_of_changes[changes] = counts.setdefault(after, len(counts))
        return index.get(place, otherwise), row_of_changes[changes]

    rows = list[Tensor]()
    for i, after in enumerate(reached):
        memo = {one: resolve(*one, i) for one in dict.fromkeys(after)}
        rows.append(torch.tensor([memo[one] for one in after]))
    next_places, changes = torch.stack(rows).unbind(-1)
    next_places = next_places.int()
    next_places[:, model.eos_ids] += len(places)
    narrow = torch.uint8 if len(counts) <= 256 else torch.int16
    return Transitions(next_places, changes.to(narrow), torch.tensor(list(counts)))


def _apply_changes(automaton: Automaton, counted: Count, changes: Iterable[Change]) -> Count:
    for change in changes:
        counted = automaton.add(counted, change)
    return counted


def token_texts(model: LanguageModel) -> list[str]:
    """The characters that each token of the vocabulary adds to a text; "" for special ones."""
    decode, special = model.tokenizer.decode, set(model.tokenizer.all_special_ids)
    # After another token, because some tokenizers drop the space before the first.
    anchor = next(i for i in range(model.vocab_size) if i not in special and decode([i]).strip())
    before = decode([anchor])
    known = min(model.vocab_size, len(model.tokenizer))
    texts = [decode([anchor, i]).removeprefix(before) if i not in special else "" for i in range(known)]
    return texts + [""] * (model.vocab_size - known)


# The place after some characters, and the changes of the count on the way.
PlaceChanges = tuple[Place, tuple[Change, ...]]


@dataclass(frozen=True)
class ChangeRecorder:
    """An automaton that starts at a place without a count and records the changes of the count."""

    automaton: Automaton

    def step(self, state: PlaceChanges, character: str) -> PlaceChanges:
        """The state after one more character."""
        place, change = self.automaton.move(state[0], character)
        return place, state[1] if change is None else (*state[1], change)


def read_text(automaton: Automaton, state: State, text: str) -> State:
    """The state after all characters of ``text``."""
    for character in text:
        state = automaton.step(state, character)
    return state


class TokenTrie:
    """All tokens of a vocabulary as a trie of characters, so that shared beginnings are read once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.children: list[dict[str, int]] = [{}]
        self.tokens: list[list[int]] = [[]]
        for token, text in enumerate(texts):
            node = 0
            for character in text:
                if character not in self.children[node]:
                    self.children[node][character] = len(self.children)
                    self.children.append({})
                    self.tokens.append([])
                node = self.children[node][character]
            self.tokens[node].append(token)

    def read_all(
        self,
        recorder: ChangeRecorder,
        state: PlaceChanges,
        memo: dict[tuple[PlaceChanges, int], list[tuple[int, PlaceChanges]]],
    ) -> list[PlaceChanges]:
        """The state after each token, from ``state``; ``memo`` keeps the results of each subtree and state."""
        reached: list[PlaceChanges] = [state] * len(self.texts)
        for token, after in self._read_subtree(recorder, state, 0, memo):
            reached[token] = after
        return reached

    def _read_subtree(
        self,
        recorder: ChangeRecorder,
        state: PlaceChanges,
        node: int,
        memo: dict[tuple[PlaceChanges, int], list[tuple[int, PlaceChanges]]],
    ) -> list[tuple[int, PlaceChanges]]:
        key = state, node
        if key not in memo:
            found = [(token, state) for token in self.tokens[node]]
            for character, child in self.children[node].items():
                found += self._read_subtree(recorder, recorder.step(state, character), child, memo)
            memo[key] = found
        return memo[key]
