"""Reuse: what the further updates of a step train on, and when past sequences are left alone."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.config.training import TrainingArguments
from tiltlm.errors import UsageError
from tiltlm.estimation import Partition, PromptPartition
from tiltlm.lm import Samples
from tiltlm.objectives import BatchObjective, Guided, Objective
from tiltlm.training.guidance import Guidance
from tiltlm.training.proposal_rules import ProposalRule
from tiltlm.training.replay.guided_pool import Pool
from tiltlm.training.replay.mixture_pool import MixedPool
from tiltlm.training.replay.proposals import Laws
from tiltlm.training.replay.weights import PoolMetrics
from tiltlm.training.rollout_batch import MIXTURE, Batch

if TYPE_CHECKING:
    from tiltlm.training.scoring import Scorer

# Batches in each of the two stretches that are compared, and how many standard errors tell them apart.
STRETCH, ERRORS = 20, 2.0


class Reuse:
    """What the further updates of a step train on: the batch itself, or as many sequences of a pool that has some.

    The pool is left alone once KL(p‖π) on fresh batches has risen for certain.
    """

    def __init__(self, iterations: int, pool: Pool | MixedPool | None) -> None:
        self.iterations, self.pool = iterations, pool
        self.falling = Falling()

    def add(self, batch: Batch) -> None:
        """Let the pool keep a batch, before the policy or the proposal changes.

        It cannot ask other sequences of the law that fit samples have where a guide drew some of them.
        """
        if self.pool is not None and self.falling.holds and batch.source != MIXTURE:
            self.pool.add(batch)

    @property
    def metrics(self) -> PoolMetrics | None:
        """What a step reports of the pool that it trained on; None where it knows no mixture."""
        pool = self.pool
        return pool.metrics if isinstance(pool, MixedPool) and len(pool) and self.falling.holds else None

    def after(
        self, batch: Batch, kl: float, before: Partition | PromptPartition, objective: Objective
    ) -> Iterator[tuple[Batch, float | Tensor]]:
        """The batches after the first update on ``batch``, each with the log Z to use.

        The batch gave this estimate ``kl`` of KL(p‖π) before any update, and ``before`` is log Z from those before it.
        """
        if self.pool is not None:
            self.falling.note(kl)
        for _ in range(self.iterations - 1 if self.falling.holds else 0):
            # It is empty while fit samples of several laws are trained on.
            if self.pool is None or not len(self.pool):
                yield batch.after_update(), before.at(batch.samples.prompt_ids)
            else:
                again = self.pool.draw(len(batch.samples))
                yield again, self._partition(before, objective).at(again.samples.prompt_ids)

    def _partition(self, before: Partition | PromptPartition, objective: Objective) -> Partition | PromptPartition:
        """What earlier batches say of log Z, or what the pool says, for an objective that is normalized by it."""
        if isinstance(self.pool, MixedPool) and getattr(objective, "self_normalized", False):
            own = self.pool.partition
            return own if own.known else before
        return before

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Tensors and numbers for a checkpoint."""
        return self.pool.state() if self.pool else None, {"seen": [*self.falling.seen], "holds": self.falling.holds}

    def restore(self, tensors: dict[str, Any] | None, numbers: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        if self.pool is not None and tensors:
            self.pool.restore(tensors)
        self.falling.seen.extend(numbers["seen"])
        self.falling.holds = numbers["holds"]


class Falling:
    """Whether KL(p‖π) on sequences that the policy has not trained on still falls, or has begun to rise for certain.

    Reuse overfits at last: forty tokens multiply every error. So a rise between the last ``STRETCH`` fresh batches and
    those before them, by more than ``ERRORS`` standard errors, ends it.
    """

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=2 * STRETCH)
        self.holds = True

    def note(self, kl: float) -> None:
        """One fresh batch's estimate, before the policy trains on it."""
        if math.isfinite(kl):
            self.seen.append(kl)
        if len(self.seen) == 2 * STRETCH:
            before, after = torch.tensor([*self.seen], dtype=torch.float64).reshape(2, STRETCH).unbind()
            error = ((before.var() + after.var()) / STRETCH).sqrt()
            self.holds = self.holds and float(after.mean() - before.mean()) <= ERRORS * float(error)


def build_reuse(
    args: TrainingArguments,
    iterations: int,
    rule: ProposalRule,
    seed: int,
    like: Samples,
    scorer: Scorer,
    guidance: Guidance | None,
) -> Reuse:
    """With the pool that fits the objective, for sequences like these. Raises UsageError as ``check_pool`` does."""
    check_pool(args, iterations, scorer.objective, rule)
    if not args.pool:
        return Reuse(iterations, None)
    if isinstance(scorer.objective, Guided):
        return Reuse(iterations, Pool(args.pool, seed, like))
    guide = guidance.guide if guidance is not None else None
    laws = Laws(scorer.roles, guide, scorer.rows_at_once, scorer.accelerator.autocast, scorer.passes)
    return Reuse(iterations, MixedPool(args.pool, seed, like, scorer.target, laws))


def check_pool(args: TrainingArguments, iterations: int, objective: Objective, rule: ProposalRule) -> None:
    """Raises UsageError where a pool would do nothing, or where its samples come from laws that it does not mix."""
    if not args.pool:
        return
    if iterations < 2:
        raise UsageError("training.pool: nothing trains on it; set training.num_iterations to 2 or more")
    if args.pool <= args.batch_size:
        raise UsageError(
            f"training.pool: {args.pool} sequences are no more than training.batch_size {args.batch_size}; keep "
            f"several batches, e.g. {20 * args.batch_size}"
        )
    if isinstance(objective, Guided):
        if rule.first != "guided":
            raise UsageError(
                "training.pool: a guided method mixes samples of the base and of the guided base, whose laws one pass "
                "tells; take method guided with its own proposal, or leave pool out"
            )
    elif isinstance(objective, BatchObjective):
        raise UsageError(
            f"training.pool: {objective.name} compares the samples of one batch with each other, and a pool mixes "
            f"those of many; use pooled, gdc++ or another method of distribution matching, or leave pool out"
        )
    elif rule.extra_batches:
        raise UsageError(
            "training.pool: proposal published draws further batches and throws them away, where a pool would keep "
            "all; set method.proposal to interval or kl, or leave pool out"
        )
