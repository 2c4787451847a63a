"""Foresight: how rare a filter is, and a guide toward it, where no sample of the base has ever passed it.

The base's next-token laws tell the probability of every step of the features' automata, those never taken included. So
the automaton on the tokens becomes a Markov chain whose rows are averages of whole laws, and

    ψ_t(s) = Σ_s' P(s → s') ψ_{t+1}(s'),     ψ_T(s) = whether a text that ends in state s passes

is what each state promises. The guide that this makes is exact to sample from and to score, whatever the chain leaves
out; what it draws shows the states that were unknown, and the next guide is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.estimation import Estimate, effective_sample_size, log_partition
from tiltlm.features import Feature, measure
from tiltlm.features.automaton import State
from tiltlm.lm import Guide, LanguageModel, Law, Samples
from tiltlm.targets.constrain import BaseSample
from tiltlm.targets.prefix_states import MOST_STATES, TokenTree, prefix_automaton, token_texts, token_transitions
from tiltlm.targets.target import Term
from tiltlm.targets.twist import FLOOR

# Visits to a state that count as much as the guess that all states after it are equally likely.
GUESS = 0.5
# Below so many effective samples an estimate of Z is no estimate.
TRUSTED = 10.0


@dataclass(frozen=True)
class Foresight:
    """Guided ``samples`` with log a − log g [N], −inf where a filter fails: importance weights of the filters' law."""

    guide: Guide
    samples: Samples
    log_weights: Tensor

    @property
    def hits(self) -> int:
        """How many of the samples pass all filters."""
        return int((self.log_weights > -math.inf).sum())

    @property
    def ess(self) -> float:
        """The effective number of samples; 0 without a hit."""
        return effective_sample_size(self.log_weights).value if self.hits else 0.0

    @property
    def log_z(self) -> Estimate:
        """log of the share of the base's texts that pass; −inf without a hit."""
        return log_partition(self.log_weights) if self.hits else Estimate(-math.inf, math.nan)

    def advice(self) -> str:
        """What to do about it, in one sentence or two."""
        n = len(self.samples)
        if self.ess < TRUSTED:
            return (
                f"Guided toward it, {self.hits} of {n} texts pass, but their weights are too uneven for an estimate "
                f"(ESS {self.ess:.1f}): the base hardly ever writes it. Start from a looser feature, or from a prompt "
                f"that brings it about."
            )
        rate, error = math.exp(self.log_z.value), self.log_z.se
        return (
            f"Guided toward it, {self.hits} of {n} texts pass, and tell that the base passes at a rate of {rate:.2g} "
            f"(± {100 * error:.0f} %): about {math.ceil(30 / rate):,} samples would hold thirty. Raise target.samples "
            f"that far, or start from a looser feature, or from a prompt that brings it about."
        )


@dataclass
class Chain:
    """The automata of features on a model's tokens: S states, where each token leads, and the mean law in each state.

    ``mean_law`` [S, V] sums next-token laws over ``visits`` [S]; ``passes`` [S] is 1 where a text that ends there does.
    """

    transitions: Tensor
    passes: Tensor
    mean_law: Tensor
    visits: Tensor

    @staticmethod
    def of(model: LanguageModel, features: Sequence[Feature]) -> Chain:
        """All states within reach, up to a bound, each with a text that leads there, which the features judge.

        Raises UsageError where no feature has an automaton.
        """
        automaton = prefix_automaton(features)
        tree = TokenTree(token_texts(model))
        states, reached = [automaton.start], []
        paths: dict[State, tuple[int, ...]] = {automaton.start: ()}
        memo: dict[tuple[State, int], list[tuple[int, State]]] = {}
        for state in states:
            reached.append(tree.read_all(automaton, state, memo))
            for token, after in enumerate(reached[-1]):
                if after not in paths and len(states) < MOST_STATES:
                    states.append(after)
                    paths[after] = (*paths[state], token)
        transitions = token_transitions(model, automaton, states, reached)
        texts = [model.tokenizer.decode(list(path)) for path in paths.values()]
        passes = (measure(features, texts) > 0).all(1).double()
        empty = torch.zeros(len(states), model.vocab_size, dtype=torch.float64)
        return Chain(transitions, passes, empty, torch.zeros(len(states), dtype=torch.float64))

    @torch.no_grad()
    def learn(self, model: LanguageModel, samples: Samples, log_weights: Tensor | None = None) -> None:
        """Add the model's next-token laws at every prefix; ``log_weights`` [N, T] are those of the prefixes."""
        still = Guide(self.transitions, torch.zeros(1, 2 * len(self.visits)))
        for rows in model.chunks(samples):
            chunk = samples.select(rows).trimmed()
            reading = model.read(chunk).cast()
            places = chunk.flat_rows.cpu(), chunk.flat_columns.cpu()
            states = still.states(chunk.tokens.cpu())[places] % len(self.visits)
            weights = torch.ones(len(states), dtype=torch.float64)
            if log_weights is not None:
                weights = log_weights[rows.cpu()][places].exp()
            for piece in reading.pieces():
                law = reading.logits(piece).softmax(-1).double().cpu()
                self.mean_law.index_add_(0, states[piece], law * weights[piece, None])
            self.visits.index_add_(0, states, weights)

    def guide(self, length: int) -> Guide:
        """The guide toward texts of at most ``length`` tokens that pass."""
        promise, tables = self.passes, [self.passes]
        steps = self._steps()
        for _ in range(length):
            promise = steps @ torch.cat([promise, self.passes])
            tables.append(promise)
        table = torch.stack(tables[::-1])
        both = torch.cat([table, self.passes.expand_as(table)], 1)
        return Guide(self.transitions, both.clamp_min(max(FLOOR * float(table[0, 0]), 1e-300)).log())

    def _steps(self) -> Tensor:
        """Probabilities [S, 2S] of the next state, from the mean laws, and a guess where there are few visits."""
        count = len(self.visits)
        seen = torch.zeros(count, 2 * count, dtype=torch.float64).scatter_add_(1, self.transitions, self.mean_law)
        possible = torch.zeros_like(seen).scatter_(1, self.transitions, 1.0)
        possible[:, count:] = 0.0
        guess = possible / possible.sum(1, keepdim=True).clamp_min(1.0)
        return (seen + GUESS * guess) / (self.visits + GUESS)[:, None]


def unmet_filters(terms: Sequence[Term], sample: BaseSample) -> list[Feature]:
    """The filters of a target, where no sample passed all of them and one can be read off a prefix; else none."""
    filters = [k for k, term in enumerate(terms) if term.kind == "filter"]
    met = bool((sample.features[:, filters] > 0).all(1).any())
    features = [terms[k].feature for k in filters]
    return [] if met or all(feature.automaton() is None for feature in features) else features


def foresee(
    base: LanguageModel,
    filters: Sequence[Feature],
    samples: Samples,
    max_completion_length: int,
    *,
    n: int = 512,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Foresight:
    """How often the base passes all ``filters``, from its ``samples``, though none of them did.

    Draws ``rounds`` times ``n`` guided completions, each round with a guide that has learnt from those before. Raises
    UsageError where the filters cannot be read off a prefix.
    """
    chain = Chain.of(base, filters)
    chain.learn(base, samples)
    found: Foresight | None = None
    for i in range(rounds):
        guide = base.placed(chain.guide(max_completion_length))
        drawn = base.sample(n, samples.prompts, seed + i, max_completion_length=max_completion_length, guide=guide)
        with torch.no_grad():
            log_ratio = (base.logprob(drawn, law=Law()) - drawn.proposal_logprob).double().cpu()
        held = (measure(filters, drawn.texts) > 0).all(1)
        found = Foresight(guide, drawn, torch.where(held, log_ratio.sum(-1), -math.inf))
        if i + 1 < rounds:
            chain.learn(base, drawn, log_ratio.cumsum(-1) - log_ratio)
        if progress is not None:
            progress((i + 1) * n, rounds * n)
    assert found is not None
    return found
