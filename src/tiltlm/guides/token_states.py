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
from tiltlm.features.automaton import Automaton, Change, Count, Place, State, together
from tiltlm.lm import Guide, LanguageModel, Samples, Transitions

# Places beyond these are merged with coarser ones: each costs a row of the vocabulary.
MOST_PLACES = 5000
# Of such rows, all together.
MOST_TRANSITIONS = 2**25
# Places times counts: each costs a number for every position.
MOST_STATES = 2**17


@dataclass(frozen=True)
class TokenStates:
    """Where ``transitions`` [S, V] lead on the tokens of a model; S + s where a token ends the text in state s.

    ``values`` [S, K] are the features of a text that ends in each state, where automata tell all of them; ``counted``
    [S] says which count it has then. Places of the same ``kin`` [F] are one place of the automata, split by what else
    is known. None where there are no such.
    """

    transitions: Transitions
    start: int = 0
    values: Tensor | None = None
    kin: Tensor | None = None
    counted: Tensor | None = None

    @staticmethod
    def of(table: Tensor, start: int = 0, values: Tensor | None = None) -> TokenStates:
        """Those of a table [S, V] that is written out."""
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
    automaton = together(feature.automaton() for feature in features)
    if automaton is None:
        names = ", ".join(f"'{feature.name}'" for feature in features)
        raise UsageError(
            f"method: a guide needs a feature that can be read off a prefix (words, phrases, pronouns, word counts, "
            f"and combinations of them), and {names} cannot; choose another method, e.g. gdc++"
        )
    return automaton


def build_token_states(model: LanguageModel, features: Sequence[Feature], samples: Samples) -> TokenStates:
    """The places that matter most, with all counts: all, if there are not too many, and coarser ones for the others.

    First come those of ``samples`` whose coarse stand-in would most often have gone another way; then those that would
    most often be reached from them by tokens drawn one by one: most words of a list are in no sample. Raises UsageError
    where there are none.
    """
    automaton = prefix_automaton(features)
    vocabulary = TokenTree(token_texts(model))
    stepped: dict[tuple[State, int], State] = {}

    def step(state: State, token: int) -> State:
        key = state, token
        if key not in stepped:
            stepped[key] = read(automaton, state, vocabulary.texts[token])
        return stepped[key]

    visits, matters = Counter[Place](), Counter[Place]()
    coarse = dict[Place, None]()
    for ids in samples.completion_ids:
        path = list(accumulate(ids, step, initial=automaton.start))
        for t, state in enumerate(path):
            stand_in = automaton.coarse(state)
            coarse[stand_in[1]] = None
            visits[state[1]] += 1
            matters[state[1]] += stand_in == state or _is_missed(stand_in, path[t + 1 :], ids[t:], step)
    most = min(MOST_PLACES, MOST_STATES // len(automaton.counts), MOST_TRANSITIONS // model.vocab_size)
    first = [automaton.start[1], *(p for p, times in matters.most_common(max(1, most)) if times), *coarse]
    often = _token_rates(model.vocab_size, samples.completion_ids)
    reached = _most_reached(automaton, vocabulary, list(dict.fromkeys(first)), visits, often, most)
    number = {n: i for i, n in enumerate(automaton.counts)}
    start = number[automaton.start[0]]
    transitions = token_transitions(model, automaton, list(reached), reached.values())
    counted = torch.tensor([number[automaton.ended((n, place))] for place in reached for n in number])
    values = None
    if all(feature.automaton() is not None for feature in features):
        texts = _shortest_texts(transitions, counted, start)
        tell = measure(features, [model.tokenizer.decode(texts.get(n, [])) for n in range(len(number))])
        values = tell[counted]
    return TokenStates(transitions, start, values, counted=counted)


def _most_reached(
    automaton: Automaton,
    vocabulary: TokenTree,
    first: Sequence[Place],
    visits: Mapping[Place, int],
    often: Sequence[float],
    most: int,
) -> dict[Place, list[Moved]]:
    """These places, and up to ``most`` with those most often reached; where each token leads from each.

    ``visits`` says how often samples came to a place, ``often`` how likely each token is [V].
    """
    moving = Moving(automaton)
    memo: dict[tuple[Moved, int], list[tuple[int, Moved]]] = {}
    reached: dict[Place, list[Moved]] = {}
    rate = {place: float(visits.get(place, 0)) for place in first}
    # The likeliest come first; of equal ones that which was found first.
    waiting, found = list[tuple[float, int, Place]](), count()
    todo = list(reversed(first))
    while todo or (waiting and len(reached) < most):
        place = todo.pop() if todo else heapq.heappop(waiting)[2]
        if place in reached:
            continue
        reached[place] = vocabulary.read_all(moving, (place, ()), memo)
        added: dict[Place, float] = {}
        for token, (after, _) in enumerate(reached[place]):
            if after not in reached:
                added[after] = added.get(after, 0.0) + often[token]
        for after, share in added.items():
            rate[after] = rate.get(after, 0.0) + rate[place] * share
            heapq.heappush(waiting, (-rate[after], next(found), after))
    return reached


def _shortest_texts(transitions: Transitions, counted: Tensor, start: int) -> dict[int, list[int]]:
    """The tokens of a shortest text that ends with each of the counts that states have [S], if there is one."""
    wanted, s = set(counted.tolist()), len(transitions)
    found, seen = dict[int, list[int]](), {start}
    waiting = deque([(start, list[int]())])
    while waiting and len(found) < len(wanted):
        state, tokens = waiting.popleft()
        found.setdefault(int(counted[state]), tokens)
        after, first = _first_of_each(transitions[state] % s)
        for one, token in zip(after, first, strict=True):
            if one not in seen:
                seen.add(one)
                waiting.append((one, [*tokens, token]))
    return found


def _first_of_each(values: Tensor) -> tuple[list[int], list[int]]:
    """The distinct values, in the order of their first places, and these places."""
    distinct, of = torch.unique(values, return_inverse=True)
    place = torch.arange(len(values)).flip(0)
    first = torch.empty_like(distinct).scatter_(0, of.flip(0), place).sort()
    return distinct[first.indices].tolist(), first.values.tolist()


def _token_rates(vocab_size: int, texts: Sequence[Sequence[int]]) -> list[float]:
    """How often each token is written [V], as if each had been once more."""
    counts = Counter(token for ids in texts for token in ids)
    total = counts.total() + vocab_size
    return [(counts[token] + 1) / total for token in range(vocab_size)]


def single_state(model: LanguageModel) -> TokenStates:
    """The single state of a text of which nothing is read, and its end."""
    table = torch.zeros(1, model.vocab_size, dtype=torch.long)
    table[:, model.eos_ids] = 1
    return TokenStates.of(table)


def _is_missed(
    stand_in: State, path: Sequence[State], tokens: Sequence[int], step: Callable[[State, int], State]
) -> bool:
    """Whether the ``tokens`` to come lead elsewhere from the coarse state than along ``path``."""
    for state, token in zip(path, tokens, strict=True):
        stand_in = step(stand_in, token)
        if stand_in == state:
            return False
    return True


def token_transitions(
    model: LanguageModel, automaton: Automaton, kept: Sequence[Place], reached: Iterable[Sequence[Moved]]
) -> Transitions:
    """Where each token leads from the F places ``kept``, given the place and the changes after each token from each.

    A place that is not kept is its coarse one; where that is not kept either, the place stays as it is.
    """
    index = {place: i for i, place in enumerate(kept)}
    number = {n: i for i, n in enumerate(automaton.counts)}
    counts = {tuple(number.values()): 0}
    rows_of: dict[tuple[Change, ...], int] = {}

    def known(place: Place, made: tuple[Change, ...], otherwise: int) -> tuple[int, int]:
        if place not in index:
            place, change = automaton.forget(place)
            made = made if change is None else (*made, change)
        if made not in rows_of:
            after = tuple(number[_changed(automaton, n, made)] for n in number)
            rows_of[made] = counts.setdefault(after, len(counts))
        return index.get(place, otherwise), rows_of[made]

    rows = list[Tensor]()
    for i, after in enumerate(reached):
        memo = {moved: known(*moved, i) for moved in dict.fromkeys(after)}
        rows.append(torch.tensor([memo[moved] for moved in after]))
    places, changes = torch.stack(rows).unbind(-1)
    places = places.int()
    places[:, model.eos_ids] += len(kept)
    narrow = torch.uint8 if len(counts) <= 256 else torch.int16
    return Transitions(places, changes.to(narrow), torch.tensor(list(counts)))


def _changed(automaton: Automaton, counted: Count, changes: Iterable[Change]) -> Count:
    for change in changes:
        counted = automaton.add(counted, change)
    return counted


def token_texts(model: LanguageModel) -> list[str]:
    """The characters that each token of the vocabulary adds to a text; "" for special ones."""
    decode, special = model.tokenizer.decode, set(model.tokenizer.all_special_ids)
    # After another token, because some tokenizers drop the space in front of the first.
    anchor = next(i for i in range(model.vocab_size) if i not in special and decode([i]).strip())
    before = decode([anchor])
    known = min(model.vocab_size, len(model.tokenizer))
    texts = [decode([anchor, i]).removeprefix(before) if i not in special else "" for i in range(known)]
    return texts + [""] * (model.vocab_size - known)


# The place after some characters, and what they changed in the count.
Moved = tuple[Place, tuple[Change, ...]]


@dataclass(frozen=True)
class Moving:
    """An automaton read from a place with any count: it notes what changes."""

    automaton: Automaton

    def step(self, state: Moved, character: str) -> Moved:
        """The state after one more character."""
        place, change = self.automaton.move(state[0], character)
        return place, state[1] if change is None else (*state[1], change)


def read(automaton: Automaton, state: State, text: str) -> State:
    """The state after all characters of ``text``."""
    for character in text:
        state = automaton.step(state, character)
    return state


class TokenTree:
    """All tokens of a vocabulary as one tree of their characters, so that shared beginnings are read once."""

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
        self, moving: Moving, state: Moved, memo: dict[tuple[Moved, int], list[tuple[int, Moved]]]
    ) -> list[Moved]:
        """The state after each token, from ``state``; ``memo`` keeps what one subtree gives from one state."""
        reached: list[Moved] = [state] * len(self.texts)
        for token, after in self._subtree(moving, state, 0, memo):
            reached[token] = after
        return reached

    def _subtree(
        self, moving: Moving, state: Moved, node: int, memo: dict[tuple[Moved, int], list[tuple[int, Moved]]]
    ) -> list[tuple[int, Moved]]:
        key = state, node
        if key not in memo:
            found = [(token, state) for token in self.tokens[node]]
            for character, child in self.children[node].items():
                found += self._subtree(moving, moving.step(state, character), child, memo)
            memo[key] = found
        return memo[key]
