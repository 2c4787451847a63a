"""Ground truth at any length: a Markov model times a finite automaton, by dynamic programming in log space.

A prefix is summarized by its context c (the last one or two tokens) and the automaton's state s, so Z, next-token
distributions of p, samples of p and KL(p‖π) all take O(T · C · S · V). All is float64, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tiltlm.errors import UnreachableTargetError, UsageError
from tiltlm.targets import TiltedTarget
from tiltlm.targets.moments import fit_moments
from tiltlm.targets.target import Term


@dataclass(frozen=True)
class MarkovModel:
    """log a(v|c) [C, V] of sequences of exactly ``length`` tokens, the first drawn in context ``start``.

    A context is the last ``order`` tokens, written as digits of base V, so C = V^order; a model that ends texts has a
    token that only itself can follow. Raises UsageError for another shape, or rows that do not sum to 1.
    """

    logprob: Tensor
    length: int
    order: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        contexts, vocabulary = self.logprob.shape
        if contexts != vocabulary**self.order:
            raise UsageError(f"logprob: {contexts} contexts of {vocabulary} tokens are not of order {self.order}")
        if not torch.allclose(self.logprob.double().logsumexp(-1), torch.zeros((), dtype=torch.float64), atol=1e-6):
            raise UsageError("logprob: a row does not sum to 1 in probability; give log-probabilities")
        object.__setattr__(self, "logprob", self.logprob.double().log_softmax(-1))

    @cached_property
    def following(self) -> Tensor:
        """The context after each token [C, V]."""
        contexts, vocabulary = self.logprob.shape
        return (torch.arange(contexts)[:, None] * vocabulary + torch.arange(vocabulary)) % contexts


@dataclass(frozen=True)
class TokenAutomaton:
    """A deterministic automaton over tokens: ``transitions`` [S, V], and the features' ``values`` [S, K] at the end."""

    transitions: Tensor
    values: Tensor
    start: int = 0

    def __and__(self, other: TokenAutomaton) -> TokenAutomaton:
        """Both side by side: states (s, s′) as s · S′ + s′, and all values in one row. Unreachable pairs stay in."""
        ours, theirs = len(self.transitions), len(other.transitions)
        pairs = self.transitions[:, None] * theirs + other.transitions[None]
        values = torch.cat([self.values.repeat_interleave(theirs, 0), other.values.repeat(ours, 1)], 1)
        return TokenAutomaton(pairs.reshape(ours * theirs, -1), values, self.start * theirs + other.start)

    def read(self, tokens: Tensor) -> Tensor:
        """The states [..., T + 1] that tokens [..., T] pass."""
        states = [torch.full(tokens.shape[:-1], self.start)]
        for column in tokens.unbind(-1):
            states.append(self.transitions[states[-1], column])
        return torch.stack(states, -1)


def phrase(tokens: Sequence[int], vocabulary: int) -> TokenAutomaton:
    """1 where these tokens occur in a row anywhere: the state is how many of them the prefix ends with."""
    wanted, full = list(tokens), len(tokens)
    transitions = torch.full((full + 1, vocabulary), full)
    for state in range(full):
        for token in range(vocabulary):
            read = [*wanted[:state], token]
            transitions[state, token] = max(n for n in range(len(read) + 1) if read[len(read) - n :] == wanted[:n])
    return TokenAutomaton(transitions, (torch.arange(full + 1)[:, None] == full).double())


def count_difference(more: Sequence[int], fewer: Sequence[int], vocabulary: int, most: int) -> TokenAutomaton:
    """1 where more tokens come from the first list than from the second; the difference is kept within ±``most``."""
    change = torch.zeros(vocabulary, dtype=torch.long)
    change[list(more)], change[list(fewer)] = 1, -1
    difference = torch.arange(-most, most + 1)[:, None]
    return TokenAutomaton((difference + change).clamp(-most, most) + most, (difference > 0).double(), start=most)


def final_states(model: MarkovModel, automaton: TokenAutomaton) -> Tensor:
    """log a(s) [S] of the automaton's state after the last token."""
    neutral = torch.zeros(len(automaton.transitions), dtype=torch.float64)
    reached = MarkovTarget(model, automaton, neutral).occupancy[-1]
    return reached.logsumexp(0)


def markov_target(model: MarkovModel, automaton: TokenAutomaton, terms: Sequence[Term]) -> MarkovTarget:
    """The target with these terms, one for each of the automaton's values; coefficients of moments are found exactly.

    Raises UnreachableTargetError for moments and filters that the model cannot have.
    """
    fixed = [replace(term, coefficient=0.0) if term.kind == "moment" else term for term in terms]
    moments = [k for k, term in enumerate(terms) if term.kind == "moment"]
    if moments:
        log_weights = final_states(model, automaton) + TiltedTarget(tuple(fixed)).log_tilt(automaton.values)
        goals, names = [float(terms[k].goal or 0.0) for k in moments], [terms[k].feature.name for k in moments]
        fit = fit_moments(automaton.values[:, moments], log_weights, goals, names)
        for k, coefficient in zip(moments, fit.coefficients.tolist(), strict=True):
            fixed[k] = replace(fixed[k], coefficient=coefficient)
    target = MarkovTarget(model, automaton, TiltedTarget(tuple(fixed)).log_tilt(automaton.values))
    if target.log_z == -math.inf:
        raise UnreachableTargetError("no sequence of the model has a target score above 0")
    return target


@dataclass(frozen=True)
class MarkovTarget:
    """P(x) = a(x) exp(tilt of the automaton's last state): ``log_tilt`` [S], −inf outside of the support."""

    model: MarkovModel
    automaton: TokenAutomaton
    log_tilt: Tensor

    @cached_property
    def log_value_table(self) -> Tensor:
        """log ψ_t(c, s) = log E_a[P/a | context c, state s after t tokens] [T + 1, C, S]."""
        contexts = len(self.model.logprob)
        tables = [self.log_tilt.double().expand(contexts, -1)]
        for _ in range(self.model.length):
            tables.append((self.model.logprob[:, None] + self._after(tables[-1])).logsumexp(-1))
        return torch.stack(tables[::-1])

    @property
    def log_z(self) -> float:
        """log Z = log ψ of the empty prefix."""
        return float(self.log_value_table[0, self.model.start, self.automaton.start])

    def next_token(self, t: int) -> Tensor:
        """log p(v|c, s) [C, S, V] after ``t`` tokens; the base's own where the target has probability 0."""
        value = self.log_value_table[t][..., None]
        logprob = self.model.logprob[:, None] + self._after(self.log_value_table[t + 1]) - value
        return torch.where(value > -math.inf, logprob, self.model.logprob[:, None])

    @cached_property
    def occupancy(self) -> Tensor:
        """log p(c, s) [T + 1, C, S] after t tokens."""
        contexts, states = len(self.model.logprob), len(self.automaton.transitions)
        places = self.model.following[:, None] * states + self.automaton.transitions[None]
        mass = torch.zeros(contexts * states, dtype=torch.float64)
        mass[self.model.start * states + self.automaton.start] = 1.0
        passed = [mass]
        for t in range(self.model.length):
            mass_after = passed[-1].reshape(contexts, states, 1) * self.next_token(t).exp()
            passed.append(torch.zeros_like(mass).index_add_(0, places.reshape(-1), mass_after.reshape(-1)))
        return torch.stack(passed).reshape(-1, contexts, states).log()

    @property
    def moments(self) -> Tensor:
        """E_p[φ] [K]."""
        return self.occupancy[-1].logsumexp(0).exp() @ self.automaton.values

    def sample(self, n: int, seed: int) -> Tensor:
        """``n`` exact samples of p: tokens [n, T]."""
        generator = torch.Generator().manual_seed(seed)
        context, state = torch.full((n,), self.model.start), torch.full((n,), self.automaton.start)
        tokens = []
        for t in range(self.model.length):
            probabilities = self.next_token(t)[context, state].exp()
            tokens.append(probabilities.multinomial(1, generator=generator).squeeze(-1))
            context = self.model.following[context, tokens[-1]]
            state = self.automaton.transitions[state, tokens[-1]]
        return torch.stack(tokens, -1)

    def score(self, tokens: Tensor) -> Tensor:
        """log P(x) [N] of tokens [N, T]."""
        context, total = torch.full((len(tokens),), self.model.start), torch.zeros(len(tokens), dtype=torch.float64)
        for column in tokens.unbind(-1):
            total = total + self.model.logprob[context, column]
            context = self.model.following[context, column]
        return total + self.log_tilt.double()[self.automaton.read(tokens)[:, -1]]

    def kl(self, policy_logprob: Tensor) -> float:
        """KL(p‖π) of a policy with log-probabilities by context and state [C, S, V], or also by position [T, ...]."""
        total = 0.0
        for t in range(self.model.length):
            p = self.next_token(t)
            policy = (policy_logprob[t] if policy_logprob.ndim == 4 else policy_logprob).double()
            gap = torch.where(p > -math.inf, p - policy, 0.0)
            divergence = (p.exp() * gap).sum(-1)
            here = self.occupancy[t].exp()
            total += float((here * torch.where(here > 0, divergence, 0.0)).sum())
        return total

    def _after(self, log_value_table: Tensor) -> Tensor:
        """log ψ(c, s) [C, S] as it stands after each next token [C, S, V]."""
        return log_value_table[self.model.following[:, None], self.automaton.transitions[None]]
