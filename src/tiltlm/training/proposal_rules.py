"""Proposal rules: when the proposal q becomes the policy π."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tiltlm.errors import UsageError, nearest
from tiltlm.estimation import Estimate
from tiltlm.rollouts.proposal import BASE, GUIDED, POLICY, Proposal


@dataclass(frozen=True)
class Distances:
    """How much nearer to the target the policy is than the proposal, on samples that the policy has not trained on.

    ``kl_gain`` is KL(p‖q) − KL(p‖π) and ``tv_gain`` TV(p, q) − TV(p, π), paired on the same samples.
    """

    kl_gain: Estimate
    tv_gain: Estimate


# Where the batch holds no samples of the proposal: no gain is above 0.
UNKNOWN_DISTANCES = Distances(Estimate(math.nan, math.nan), Estimate(math.nan, math.nan))


class ProposalRule(Protocol):
    """Decides, before each step's update, whether q ← π."""

    @property
    def first(self) -> Proposal:
        """The proposal that a run begins with: the policy as it is at each step, the base, or the guided base."""

    @property
    def extra_batches(self) -> int:
        """Batches drawn from q at each check, for that check alone."""

    def due(self, step: int) -> bool:
        """Whether this step (counted from 1) is one at which the proposal may change."""

    def replaces(self, distances: Distances) -> bool:
        """Whether the policy is to become the proposal, given the distances at a step that is due."""


@dataclass(frozen=True)
class Constant:
    """Samples are always drawn from the policy as it is, or from the guided base; no policy is kept."""

    first: Proposal = POLICY
    extra_batches: int = 0

    def due(self, step: int) -> bool:
        return False

    def replaces(self, distances: Distances) -> bool:
        return False


@dataclass(frozen=True)
class Interval:
    """q ← π every ``check_steps`` steps, unconditionally."""

    check_steps: int = 10
    first: Proposal = BASE
    extra_batches: int = 0

    def due(self, step: int) -> bool:
        return step % self.check_steps == 0

    def replaces(self, distances: Distances) -> bool:
        return True


@dataclass(frozen=True)
class Closer:
    """q ← π when π is closer to p by ``metric`` (``kl`` or ``tv``), asked every ``check_steps`` steps.

    Source: 2012.11635, algorithm 1.
    ``extra_batches`` are drawn from q at each check for that purpose alone, as the published algorithm does; with 0
    the batch of the step itself is used, before the policy trains on it.
    """

    metric: str = "kl"
    check_steps: int = 10
    extra_batches: int = 0
    first: Proposal = BASE

    def due(self, step: int) -> bool:
        return step % self.check_steps == 0

    def replaces(self, distances: Distances) -> bool:
        gain = distances.kl_gain if self.metric == "kl" else distances.tv_gain
        return gain.value > 0


# The published algorithm estimates both distances on this many further batches of q.
PUBLISHED_EXTRA_BATCHES = 10
# The rules of ``method.proposal``, made with ``method.check_steps``.
RULES: dict[str, Callable[[int], ProposalRule]] = {
    "on_policy": lambda check_steps: Constant(POLICY),
    "interval": Interval,
    "kl": lambda check_steps: Closer("kl", check_steps),
    "tv": lambda check_steps: Closer("tv", check_steps),
    "published": lambda check_steps: Closer("kl", check_steps, PUBLISHED_EXTRA_BATCHES),
    "guided": lambda check_steps: Constant(GUIDED),
}


def proposal_rule(name: str, check_steps: int = 10) -> ProposalRule:
    """The rule of this name. Raises UsageError for an unknown one."""
    if name not in RULES:
        raise UsageError(f"method.proposal: '{name}' is not known; {nearest(name, RULES)}")
    return RULES[name](check_steps)
