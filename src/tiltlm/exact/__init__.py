"""Exact ground truth: models small enough to enumerate, and Markov models times a finite automaton."""

from tiltlm.exact.enumeration import (
    ExactConditional,
    ExactTarget,
    enumerate_completions,
    exact_conditional,
    exact_kl,
    exact_moments,
    exact_target,
    exact_tv,
    expected_gradient,
    kl_gradient,
    weighted_gradient,
)
from tiltlm.exact.markov import (
    MarkovModel,
    MarkovTarget,
    TokenAutomaton,
    count_difference,
    final_states,
    markov_target,
    phrase,
)

__all__ = [
    "ExactConditional",
    "ExactTarget",
    "MarkovModel",
    "MarkovTarget",
    "TokenAutomaton",
    "count_difference",
    "enumerate_completions",
    "exact_conditional",
    "exact_kl",
    "exact_moments",
    "exact_target",
    "exact_tv",
    "expected_gradient",
    "final_states",
    "kl_gradient",
    "markov_target",
    "phrase",
    "weighted_gradient",
]
