"""Worlds: a base and a target, with exact values of log Z, p and KL(p‖π)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ground.graph import Graph, last_tokens, prefix_tree
from ground.policies import NodeNetwork, PrefixNetwork
from tiltlm.exact import TokenAutomaton, count_difference, phrase
from tiltlm.features import Feature, contains
from tiltlm.targets import Term, TiltedTarget
from tiltlm.targets.moments import fit_moments

VOCABULARY, LENGTH, HIDDEN = 5, 6, 64
MOMENT = 0.5


@dataclass(frozen=True)
class World:
    """A base on a graph, and a target that an automaton over the tokens recognizes.

    ``base`` [M, V] is log a(v|node), given by ``network``; ``state`` [M + L] is the automaton's state; ``terms`` are
    those of the target, one per value of the automaton.
    """

    name: str
    graph: Graph
    base: Tensor
    automaton: TokenAutomaton
    state: Tensor
    terms: tuple[Term, ...]
    network: PrefixNetwork | NodeNetwork

    @cached_property
    def values(self) -> Tensor:
        """Features of the leaves [L, K]."""
        return self.automaton.values[self.state[len(self.base) :]]

    @property
    def moments(self) -> list[int]:
        """Indices of the features with a moment; their coefficients are fitted."""
        return [k for k, term in enumerate(self.terms) if term.kind == "moment"]

    def fitted(self, values: Tensor, log_weights: Tensor | None = None) -> TiltedTarget:
        """The target with coefficients fitted on samples of the base [N, K], or on others with weights a/q."""
        if not self.moments:
            return TiltedTarget(self.terms)
        neutral = TiltedTarget(tuple(_with(term, 0.0) for term in self.terms))
        weights = neutral.log_tilt(values) + (0.0 if log_weights is None else log_weights)
        moment_terms = [self.terms[k] for k in self.moments]
        goals, names = [term.goal or 0.0 for term in moment_terms], [term.feature.name for term in moment_terms]
        fit = fit_moments(values[:, self.moments], weights, goals, names)
        found = dict(zip(self.moments, fit.coefficients.tolist(), strict=True))
        return TiltedTarget(tuple(_with(term, found.get(k, 0.0)) for k, term in enumerate(self.terms)))

    @cached_property
    def target(self) -> TiltedTarget:
        """The target with its exact coefficients."""
        reached = self.graph.occupancy(self.base)[len(self.base) :]
        return self.fitted(self.values, reached.log())

    @cached_property
    def log_values(self) -> Tensor:
        """log ψ [M + L] of the exact target."""
        return self.graph.log_values(self.base, self.target.log_tilt(self.values))

    @property
    def log_z(self) -> float:
        return float(self.log_values[0])

    @cached_property
    def target_logprobs(self) -> Tensor:
        """log p(v|node) [M, V]."""
        return self.graph.tilted(self.base, self.log_values)

    @cached_property
    def mass(self) -> Tensor:
        """The probability under p of each node and next token [M, V]; the sum is T."""
        return self.graph.occupancy(self.target_logprobs)[: len(self.base), None] * self.target_logprobs.exp()

    @cached_property
    def negative_entropy(self) -> float:
        """Σ_x p log p."""
        return float(torch.where(self.mass > 0, self.mass * self.target_logprobs, 0.0).sum())

    def kl(self, log_policy: Tensor) -> Tensor:
        """KL(p‖π) [R], exactly, from log π(v|node) [R, M, V]."""
        inside = torch.where(self.mass > 0, log_policy.double(), 0.0)
        return self.negative_entropy - (self.mass * inside).sum((-1, -2))


def _with(term: Term, coefficient: float) -> Term:
    return Term(term.feature, term.kind, term.goal, coefficient if term.kind == "moment" else term.coefficient)


def named(name: str) -> Feature:
    """A feature that only has a name; its values come from an automaton."""
    return contains(name).renamed(name)


def enumerable(name: str, seed: int = 0) -> World:
    """All 15,625 sequences of 6 tokens of a vocabulary of 5; base and policies are a small network.

    The target uses the phrase or pair of tokens with the base rate nearest to the one required. ``pointwise-2`` and
    ``pointwise-3``: a phrase with Z = 1e-2 and 1e-3. ``moment``: more of one token than of another, from 0.08 to 0.5.
    ``hybrid``: such a moment, rarer, under a phrase of rate 0.1.
    """
    graph = prefix_tree(VOCABULARY, LENGTH)
    network = PrefixNetwork.random(VOCABULARY, LENGTH, HIDDEN, torch.Generator().manual_seed(seed))
    base = network.log_table()[0].double().log_softmax(-1)
    reached = graph.occupancy(base)[len(base) :]
    tokens = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)

    def nearest(
        rate: float, candidates: Iterable[tuple[str, TokenAutomaton]], among: Tensor
    ) -> tuple[str, TokenAutomaton]:
        """The candidate with the rate nearest to ``rate`` in the part ``among`` [L] of the sequences."""

        def distance(candidate: tuple[str, TokenAutomaton]) -> float:
            values = candidate[1].values[candidate[1].read(tokens)[:, -1], 0]
            return abs(math.log(max(float((reached * among) @ values / (reached @ among)), 1e-300) / rate))

        return min(candidates, key=distance)

    phrases = [
        ("phrase " + "".join(map(str, ids)), phrase(ids, VOCABULARY))
        for n in (2, 3, 4)
        for ids in itertools.product(range(VOCABULARY), repeat=n)
    ]
    differences = [
        (f"more {i} than {j}", count_difference([i], [j], VOCABULARY, most=LENGTH))
        for i, j in itertools.permutations(range(VOCABULARY), 2)
    ]
    everywhere = torch.ones_like(reached)
    if name in ("pointwise-2", "pointwise-3"):
        title, automaton = nearest(10.0 ** -int(name[-1]), phrases, everywhere)
        terms = [Term(named(title), "filter", 1.0)]
    elif name == "moment":
        title, automaton = nearest(0.08, differences, everywhere)
        terms = [Term(named(title), "moment", MOMENT)]
    else:
        first, filtering = nearest(0.1, phrases, everywhere)
        kept = filtering.values[filtering.read(tokens)[:, -1], 0]
        second, counting = nearest(0.08, differences, kept)
        title, automaton = f"{first}, {second}", filtering & counting
        terms = [Term(named(first), "filter", 1.0), Term(named(second), "moment", MOMENT)]
    states = automaton.read(tokens)
    inner = [states[:: VOCABULARY ** (LENGTH - t), t] for t in range(LENGTH + 1)]
    return World(name, graph, base, automaton, torch.cat(inner), tuple(terms), network)


def rare_phrase(rate: float = 1e-5, vocabulary: int = 50, length: int = 40, seed: int = 0) -> World:
    """Sequences of ``length`` tokens of a Markov base; the target is the filter of a phrase of three tokens.

    Of all phrases of three different tokens, it is the one with the rate nearest to ``rate``. A node is the last token,
    the state within the phrase, and the position. Policies see all three. They start as the base, which depends on the
    token alone. log p is log a plus a log value, which policies of this form cannot represent exactly.
    """
    generator = torch.Generator().manual_seed(seed)
    network = NodeNetwork.random(vocabulary, 4, length, HIDDEN, generator)
    logprobs = network.log_table()[0].double().log_softmax(-1)
    visits, reached_now = torch.zeros(vocabulary, dtype=torch.float64), torch.eye(vocabulary, dtype=torch.float64)[0]
    for _ in range(length - 2):
        reached_now = reached_now @ logprobs.exp()
        visits += reached_now
    # The expected number of occurrences of each phrase. Two in one sequence are so rare that this is the rate.
    expected = (visits.log()[:, None] + logprobs)[..., None] + logprobs
    i, j, k = torch.meshgrid(*[torch.arange(vocabulary)] * 3, indexing="ij")
    distance = (expected - math.log(rate)).abs().where((i != j) & (j != k) & (i != k), math.inf)
    ids = [int(x) for x in torch.unravel_index(distance.argmin(), distance.shape)]
    automaton = phrase(ids, vocabulary)
    graph, token, state = last_tokens(automaton.transitions, length)
    inner = torch.stack([token, state], -1)[: len(graph.child)]
    position = torch.arange(length).repeat_interleave(torch.tensor(graph.layers))
    network = replace(network, node=torch.cat([inner, position[:, None]], -1))
    title = "phrase " + "-".join(map(str, ids))
    terms = (Term(named(title), "filter", 1.0),)
    return World("pointwise-5", graph, logprobs[inner[:, 0]], automaton, state, terms, network)
