"""The replay schedule: what the further updates of a step train on, and when replay stops."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tiltlm.config.training import TrainingArguments
from tiltlm.errors import UsageError
from tiltlm.estimation import Partition, PromptPartition
from tiltlm.lm import Samples
from tiltlm.objectives import Objective
from tiltlm.rollouts.proposal import GUIDED, MIXTURE
from tiltlm.training.guidance import Guidance
from tiltlm.training.proposal_rules import ProposalRule
from tiltlm.training.replay.buffer import ReplayBuffer
from tiltlm.training.replay.guided_pool import GuidedPool
from tiltlm.training.replay.mixture_pool import MixturePool
from tiltlm.training.replay.proposals import PastProposals
from tiltlm.training.replay.weights import PoolMetrics
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.scoring import Scorer

# Batches in each of the two windows that are compared, and the standard errors that a rise must exceed.
WINDOW, ERRORS = 20, 2.0


class ReplaySchedule:
    """Gives each step ``iterations`` − 1 further batches: the step's own batch, or as many sequences of a buffer.

    Replay stops once KL(p‖π) on fresh batches has risen significantly.
    """

    def __init__(self, iterations: int, buffer: ReplayBuffer | None) -> None:
        self.iterations, self.buffer = iterations, buffer
        self.early_stopping = EarlyStopping()

    def add(self, batch: RolloutBatch) -> None:
        """Keep a batch in the buffer, before the policy or the proposal changes.

        Fit samples that guides drew are left out: their distribution cannot score other sequences.
        """
        if self.buffer is not None and not self.early_stopping.stopped and batch.proposal != MIXTURE:
            self.buffer.add(batch)

    @property
    def metrics(self) -> PoolMetrics | None:
        """The ``pool`` entry of a step that trained on the buffer; None without one."""
        if self.buffer is None or not len(self.buffer) or self.early_stopping.stopped:
            return None
        return self.buffer.metrics

    def after(
        self, batch: RolloutBatch, kl: float, before: Partition | PromptPartition, objective: Objective
    ) -> Iterator[tuple[RolloutBatch, float | Tensor]]:
        """The batches after the first update on ``batch``, each with the log Z to use.

        ``kl`` is the batch's estimate of KL(p‖π) before any update, ``before`` the estimate of log Z from earlier
        batches.
        """
        if self.buffer is not None:
            self.early_stopping.note(kl)
        for _ in range(0 if self.early_stopping.stopped else self.iterations - 1):
            # The buffer is empty while fit samples that guides drew are trained on.
            if self.buffer is None or not len(self.buffer):
                yield batch.after_update(), before.at(batch.samples.prompt_ids)
            else:
                again = self.buffer.draw(len(batch.samples))
                own = self.buffer.partition if objective.normalized_by_replay else None
                partition = own if own is not None and own.known else before
                yield again, partition.at(again.samples.prompt_ids)

    def state_dict(self) -> dict[str, Any]:
        """The buffer and the state of early stopping, for a checkpoint."""
        buffer = self.buffer.state_dict() if self.buffer is not None else None
        return {"buffer": buffer, "early_stopping": self.early_stopping.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        if self.buffer is not None and state["buffer"]:
            self.buffer.load_state_dict(state["buffer"])
        self.early_stopping.load_state_dict(state["early_stopping"])


class EarlyStopping:
    """Stops replay once KL(p‖π), on sequences that the policy has not trained on, rises significantly.

    Replay overfits in the end: forty tokens multiply every error. The rise is that of the last ``WINDOW`` fresh batches
    over those before them, and must exceed ``ERRORS`` standard errors.
    """

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=2 * WINDOW)
        self.stopped = False

    def note(self, kl: float) -> None:
        """Take one fresh batch's estimate, made before the policy trains on it."""
        if math.isfinite(kl):
            self.seen.append(kl)
        if len(self.seen) == 2 * WINDOW:
            before, after = torch.tensor([*self.seen], dtype=torch.float64).reshape(2, WINDOW).unbind()
            error = ((before.var() + after.var()) / WINDOW).sqrt()
            self.stopped = self.stopped or not float(after.mean() - before.mean()) <= ERRORS * float(error)

    def state_dict(self) -> dict[str, Any]:
        """The estimates in the two windows, for a checkpoint."""
        return {"seen": [*self.seen], "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.seen.clear()
        self.seen.extend(state["seen"])
        self.stopped = state["stopped"]


def build_replay(
    args: TrainingArguments, iterations: int, seed: int, like: Samples, scorer: Scorer, guidance: Guidance | None
) -> ReplaySchedule:
    """The schedule with the buffer that fits the objective; ``like`` are samples of the run with all its prompts."""
    if not args.pool:
        return ReplaySchedule(iterations, None)
    if scorer.objective.distills:
        return ReplaySchedule(iterations, GuidedPool(args.pool, seed, like))
    past = PastProposals(scorer.passes, guidance)
    return ReplaySchedule(iterations, MixturePool(args.pool, seed, like, scorer.target, past))


def check_pool(args: TrainingArguments, iterations: int, objective: Objective, rule: ProposalRule) -> None:
    """Raises UsageError where a buffer would have no effect, or where the method cannot train on a mixture."""
    if not args.pool:
        return
    if iterations < 2:
        raise UsageError("training.pool: nothing trains on it; set training.num_iterations to 2 or more")
    if args.pool <= args.batch_size:
        raise UsageError(
            f"training.pool: {args.pool} sequences are no more than training.batch_size {args.batch_size}; keep "
            f"several batches, e.g. {20 * args.batch_size}"
        )
    if objective.distills:
        if rule.first != GUIDED:
            raise UsageError(
                "training.pool: the buffer of a guided method mixes samples of the base and of the guided base, which "
                "one pass scores; take method guided with its own proposal, or leave pool out"
            )
    elif objective.batchwise:
        raise UsageError(
            f"training.pool: {objective.name} compares the samples of one batch with each other, and a buffer mixes "
            f"those of many; use pooled, gdc++ or another method of distribution matching, or leave pool out"
        )
    elif rule.extra_batches:
        raise UsageError(
            "training.pool: proposal published draws further batches and discards them, where a buffer would keep "
            "all; set method.proposal to interval or kl, or leave pool out"
        )
