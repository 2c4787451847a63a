"""From characters to tokens: the states that a target's automata reach on the tokens of a model."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.features import Feature, measure
from tiltlm.features.automaton import Automaton, State, together
from tiltlm.lm import Guide, LanguageModel, Samples

# States beyond these are merged with coarser ones: each costs a row of the vocabulary.
MOST_STATES = 5000
# Of such rows, all together.
MOST_TRANSITIONS = 2**25


@dataclass(frozen=True)
class PrefixStates:
    """Where ``transitions`` [S, V] lead on the tokens of a model; S + s where a token ends the text in state s.

    ``values`` [S, K] are the features of a text that ends in each state, where automata tell all of them. States of the
    same ``kin`` [S] are one state of the automata, split by what else is known; None where there are no such.
    """

    transitions: Tensor
    start: int = 0
    values: Tensor | None = None
    kin: Tensor | None = None

    def passing(self) -> Tensor:
        """1 where a text that ends in the state passes all features, else 0 [S], float64."""
        assert self.values is not None
        return (self.values > 0).all(1).double()

    def guide(self, log_twist: Tensor) -> Guide:
        """A guide over these states, from log ψ [T + 1, 2S]."""
        return Guide(self.transitions, log_twist, self.start)


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


def prefix_states(model: LanguageModel, features: Sequence[Feature], samples: Samples) -> PrefixStates:
    """The states that matter most: all, if there are not too many, and coarser ones in place of the others.

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

    visits, matters = Counter[State](), Counter[State]()
    coarse = dict[State, None]()
    texts: dict[State, tuple[int, ...]] = {automaton.start: ()}
    for ids in samples.completion_ids:
        path = list(accumulate(ids, step, initial=automaton.start))
        for t, state in enumerate(path):
            stand_in = automaton.coarse(state)
            coarse[stand_in] = None
            for one in (state, stand_in):
                if one not in texts:
                    texts[one] = tuple(ids[:t])
            visits[state] += 1
            matters[state] += stand_in == state or _is_missed(stand_in, path[t + 1 :], ids[t:], step)
    most = min(MOST_STATES, max(1, MOST_TRANSITIONS // model.vocab_size))
    first = [automaton.start, *(state for state, times in matters.most_common(most) if times), *coarse]
    often = _token_rates(model.vocab_size, samples.completion_ids)
    reached = _most_reached(automaton, vocabulary, list(dict.fromkeys(first)), visits, often, texts, most)
    kept = list(reached)
    values = None
    if all(feature.automaton() is not None for feature in features):
        values = measure(features, [model.tokenizer.decode(list(texts[state])) for state in kept])
    return PrefixStates(token_transitions(model, automaton, kept, reached.values()), 0, values)


def _most_reached(
    automaton: Automaton,
    vocabulary: TokenTree,
    first: Sequence[State],
    visits: Mapping[State, int],
    often: Sequence[float],
    texts: dict[State, tuple[int, ...]],
    most: int,
) -> dict[State, list[State]]:
    """These states, and up to ``most`` with those most often reached; the state after each token from each.

    ``visits`` says how often samples came to a state, ``often`` how likely each token is [V]; ``texts`` gets the tokens
    that lead to each state.
    """
    memo: dict[tuple[State, int], list[tuple[int, State]]] = {}
    reached: dict[State, list[State]] = {}
    rate = {state: float(visits.get(state, 0)) for state in first}
    # The likeliest come first; of equal ones that which was found first.
    waiting, found = list[tuple[float, int, State]](), count()
    todo = list(reversed(first))
    while todo or (waiting and len(reached) < most):
        state = todo.pop() if todo else heapq.heappop(waiting)[2]
        if state in reached:
            continue
        reached[state] = vocabulary.read_all(automaton, state, memo)
        added: dict[State, float] = {}
        for token, after in enumerate(reached[state]):
            if after not in reached:
                added[after] = added.get(after, 0.0) + often[token]
                if after not in texts:
                    texts[after] = (*texts[state], token)
        for after, share in added.items():
            rate[after] = rate.get(after, 0.0) + rate[state] * share
            heapq.heappush(waiting, (-rate[after], next(found), after))
    return reached


def _token_rates(vocab_size: int, texts: Sequence[Sequence[int]]) -> list[float]:
    """How often each token is written [V], as if each had been once more."""
    counts = Counter(token for ids in texts for token in ids)
    total = counts.total() + vocab_size
    return [(counts[token] + 1) / total for token in range(vocab_size)]


def one_state(model: LanguageModel) -> PrefixStates:
    """The single state of a text of which nothing is read, and its end."""
    transitions = torch.zeros(1, model.vocab_size, dtype=torch.long)
    transitions[:, model.eos_ids] = 1
    return PrefixStates(transitions)


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
    model: LanguageModel, automaton: Automaton, kept: Sequence[State], reached: Iterable[Sequence[State]]
) -> Tensor:
    """Where each token leads [S, V] among the S states ``kept``, given the state that each token reaches from each.

    A state that is not kept is its coarse one; where that is not kept either, the state stays as it is.
    """
    index = {state: i for i, state in enumerate(kept)}
    rows: list[list[int]] = []
    for i, after in enumerate(reached):
        known = {s: index.get(s, index.get(automaton.coarse(s), i)) for s in dict.fromkeys(after)}
        rows.append([known[s] for s in after])
    transitions = torch.tensor(rows)
    transitions[:, model.eos_ids] += len(kept)
    return transitions


def token_texts(model: LanguageModel) -> list[str]:
    """The characters that each token of the vocabulary adds to a text; "" for special ones."""
    decode, special = model.tokenizer.decode, set(model.tokenizer.all_special_ids)
    # After another token, because some tokenizers drop the space in front of the first.
    anchor = next(i for i in range(model.vocab_size) if i not in special and decode([i]).strip())
    before = decode([anchor])
    known = min(model.vocab_size, len(model.tokenizer))
    texts = [decode([anchor, i]).removeprefix(before) if i not in special else "" for i in range(known)]
    return texts + [""] * (model.vocab_size - known)


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
        self, automaton: Automaton, state: State, memo: dict[tuple[State, int], list[tuple[int, State]]]
    ) -> list[State]:
        """The state after each token, from ``state``; ``memo`` keeps what one subtree gives from one state."""
        reached: list[State] = [state] * len(self.texts)
        for token, after in self._subtree(automaton, state, 0, memo):
            reached[token] = after
        return reached

    def _subtree(
        self, automaton: Automaton, state: State, node: int, memo: dict[tuple[State, int], list[tuple[int, State]]]
    ) -> list[tuple[int, State]]:
        key = state, node
        if key not in memo:
            found = [(token, state) for token in self.tokens[node]]
            for character, child in self.children[node].items():
                found += self._subtree(automaton, automaton.step(state, character), child, memo)
            memo[key] = found
        return memo[key]
