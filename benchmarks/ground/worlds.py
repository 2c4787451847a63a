"""The worlds: a base, a target on it, and everything about both known exactly."""

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

    ``base`` [M, V] log a(v|node), the law of ``network``; ``state`` [M + L] the automaton's state; ``terms`` the
    target's, one for each of the automaton's values.
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
        """Which features have a moment, so that a coefficient must be fitted."""
        return [k for k, term in enumerate(self.terms) if term.kind == "moment"]

    def fitted(self, values: Tensor, log_weights: Tensor | None = None) -> TiltedTarget:
        """The target with coefficients fitted on samples of the base [N, K], or on others with weights a/q."""
        if not self.moments:
            return TiltedTarget(self.terms)
        neutral = TiltedTarget(tuple(_with(term, 0.0) for term in self.terms))
        weights = neutral.log_tilt(values) + (0.0 if log_weights is None else log_weights)
        wanted = [self.terms[k] for k in self.moments]
        goals, names = [term.goal or 0.0 for term in wanted], [term.feature.name for term in wanted]
        fit = fit_moments(values[:, self.moments], weights, goals, names)
        found = dict(zip(self.moments, fit.coefficients.tolist(), strict=True))
        return TiltedTarget(tuple(_with(term, found.get(k, 0.0)) for k, term in enumerate(self.terms)))

    @cached_property
    def target(self) -> TiltedTarget:
        """The target with its exact coefficients."""
        reached = self.graph.occupancy(self.base)[len(self.base) :]
        return self.fitted(self.values, reached.log())

    @cached_property
    def promise(self) -> Tensor:
        """log ψ [M + L] of the exact target."""
        return self.graph.promise(self.base, self.target.log_tilt(self.values))

    @property
    def log_z(self) -> float:
        return float(self.promise[0])

    @cached_property
    def law(self) -> Tensor:
        """log p(v|node) [M, V]."""
        return self.graph.tilted(self.base, self.promise)

    @cached_property
    def mass(self) -> Tensor:
        """How often p is at each node and goes on with each token [M, V]; the sum is T."""
        return self.graph.occupancy(self.law)[: len(self.base), None] * self.law.exp()

    @cached_property
    def negative_entropy(self) -> float:
        """Σ_x p log p."""
        return float(torch.where(self.mass > 0, self.mass * self.law, 0.0).sum())

    def kl(self, log_policy: Tensor) -> Tensor:
        """KL(p‖π) [R], exactly, from log π(v|node) [R, M, V]."""
        inside = torch.where(self.mass > 0, log_policy.double(), 0.0)
        return self.negative_entropy - (self.mass * inside).sum((-1, -2))


def _with(term: Term, coefficient: float) -> Term:
    return Term(term.feature, term.kind, term.goal, coefficient if term.kind == "moment" else term.coefficient)


def named(name: str) -> Feature:
    """A feature for reports; its values come from an automaton."""
    return contains(name).renamed(name)


def enumerable(name: str, seed: int = 0) -> World:
    """15,625 sequences of 6 tokens of a vocabulary of 5, whose base and policies are one small network.

    Of all phrases or pairs of tokens the target takes that with the rate nearest to the one wanted: ``pointwise-2`` and
    ``pointwise-3`` a phrase with Z = 1e-2 and 1e-3, ``moment`` more of one token than of another, from 0.08 to 0.5,
    ``hybrid`` a rarer such moment under a phrase of rate 0.1.
    """
    graph = prefix_tree(VOCABULARY, LENGTH)
    network = PrefixNetwork.random(VOCABULARY, LENGTH, HIDDEN, torch.Generator().manual_seed(seed))
    base = network.log_table()[0].double().log_softmax(-1)
    reached = graph.occupancy(base)[len(base) :]
    tokens = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)

    def nearest(
        rate: float, candidates: Iterable[tuple[str, TokenAutomaton]], among: Tensor
    ) -> tuple[str, TokenAutomaton]:
        """The candidate that holds with this rate in the part ``among`` [L] of the sequences."""

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
    """Sequences of ``length`` tokens of a Markov base, of which those with a phrase of three tokens are wanted.

    Of all phrases of three different tokens it is that with the rate nearest to the one wanted. A node tells the last
    token, how much of the phrase has been read, and the position. Policies see all three, and begin as the base, which
    uses the token alone; what p does with them is the sum of log a and the log of a promise, and not of their form.
    """
    generator = torch.Generator().manual_seed(seed)
    network = NodeNetwork.random(vocabulary, 4, length, HIDDEN, generator)
    law = network.log_table()[0].double().log_softmax(-1)
    began, passed = torch.zeros(vocabulary, dtype=torch.float64), torch.eye(vocabulary, dtype=torch.float64)[0]
    for _ in range(length - 2):
        passed = passed @ law.exp()
        began += passed
    # How often each phrase is to be expected; one of different tokens so rare is hardly ever there twice.
    expected = (began.log()[:, None] + law)[..., None] + law
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
    return World("pointwise-5", graph, law[inner[:, 0]], automaton, state, terms, network)
