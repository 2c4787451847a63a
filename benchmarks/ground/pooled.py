"""Methods that also train on earlier samples, weighted by the mixture of all proposals, as in the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ground.distilled import keep_guide
from ground.runs import Budget, Drawn, Falls, Runs, Scored
from tiltlm.estimation import log_partition
from tiltlm.objectives import Objective
from tiltlm.rollouts.proposal import POLICY
from tiltlm.training.proposal_rules import proposal_rule
from tiltlm.training.replay.weights import BASE_INDEX, mixture_logprob


@dataclass(frozen=True)
class FromPool:
    """``objective`` with ``steps`` updates per batch: one on the batch, the others on samples of a pool.

    The fit samples come first. The pool keeps every sequence; each update on it uses as many as a batch has. ``rule``
    and ``check_steps`` define when the policy becomes the proposal. There is no early stopping: the library's looks at
    forty batches, which is more than a budget of 10,000 sequences has. ``falls`` and ``keeps_guide``: see ``Sampled``.
    """

    objective: Objective
    steps: int = 4
    rule: str = "interval"
    check_steps: int = 4
    batch: int = 250
    falls: Falls = ""
    keeps_guide: bool = False

    def train(self, runs: Runs, budget: Budget) -> None:
        """Train until the budget is spent."""
        if self.keeps_guide:
            keep_guide(runs)
        loop = PooledLoop(self, runs)
        while not runs.spent(budget):
            runs.lower_rates(budget, self.falls)
            loop.turn()


class SequencePool:
    """N sequences of each of R runs, log q under K proposals [R, N, K], and the proposal of each sequence [N]."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.proposals = runs, [runs.base]
        self.scored: Scored | None = None
        self.under = torch.empty(runs.count, 0, 1, dtype=torch.float64)
        self.origin = torch.empty(0, dtype=torch.long)

    def add(self, scored: Scored, proposal: int) -> None:
        """Add a batch: all proposals score it, and a proposal whose first batch it is scores all earlier sequences."""
        parts = [scored] if self.scored is None else [self.scored, scored]
        if proposal == self.under.shape[-1]:
            assert self.scored is not None
            column = self.scored.drawn.under(self.proposals[proposal]).double().sum(-1)
            self.under = torch.cat([self.under, column[..., None]], -1)
            self.runs.passes += len(self.origin)
        # The scores under the base and under the batch's own proposal are known.
        self.runs.passes += len(scored.drawn) * sum(k not in (BASE_INDEX, proposal) for k in range(len(self.proposals)))
        rows = torch.stack([scored.drawn.under(table).double().sum(-1) for table in self.proposals], -1)
        self.under = torch.cat([self.under, rows], 1)
        self.origin = torch.cat([self.origin, torch.full((len(scored.drawn),), proposal)])
        tables = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("base", "score", "proposal"))
        self.scored = Scored(Drawn.joined([part.drawn for part in parts]), *tables)

    def mixed(self) -> Scored:
        """All sequences, with the mixture as their proposal."""
        assert self.scored is not None
        mixture = torch.stack([mixture_logprob(under, self.origin) for under in self.under])
        return Scored(self.scored.drawn, self.scored.base, self.scored.score, mixture)


class PooledLoop:
    """The training loop: draw, update, add to the pool, update on the pool, as the library's trainer does."""

    def __init__(self, method: FromPool, runs: Runs) -> None:
        self.method, self.runs, self.rule = method, runs, proposal_rule(method.rule, method.check_steps)
        self.objectives = [method.objective] * runs.count
        self.generator = torch.Generator().manual_seed(0)
        self.pool = SequencePool(runs)
        # The proposal of the next fresh batch, if it is new.
        self.next_proposal: Tensor | None = None
        self.turns = 0

    def turn(self) -> None:
        """Train on one batch."""
        runs, n = self.runs, self.method.batch
        self.turns += 1
        batch, proposal = self._next()
        log_z = runs.log_z(batch)
        if proposal is not None:
            runs.learn_log_z(batch)
        self.pool.add(batch, proposal or BASE_INDEX)
        if self.rule.due(self.turns):
            self.next_proposal = runs.policy.log_table().detach()
        self._update(batch, log_z)
        mixed = self.pool.mixed()
        if self.method.objective.normalized_by_replay:
            own = [log_partition(weights).value for weights in mixed.log_weights]
            log_z = torch.where(mixed.possible.any(1), torch.tensor(own, dtype=torch.float64), log_z)
        for _ in range(self.method.steps - 1):
            rows = torch.randperm(len(mixed.drawn), generator=self.generator)[:n]
            tables = (getattr(mixed, name)[:, rows] for name in ("base", "score", "proposal"))
            self._update(Scored(mixed.drawn.rows(rows), *tables), log_z)
        runs.note()

    def _next(self) -> tuple[Scored, int | None]:
        """The next batch and the index of its proposal; None for fit samples."""
        runs, n, pool = self.runs, self.method.batch, self.pool
        assert runs.fit_sample is not None, "the pool begins with fit samples"
        if self.turns * n <= len(runs.fit_sample):
            return runs.score(runs.fit_sample.rows(slice((self.turns - 1) * n, self.turns * n))), None
        if self.rule.first == POLICY:
            self.next_proposal = runs.policy.log_table().detach()
        if self.next_proposal is not None:
            pool.proposals.append(self.next_proposal)
            self.next_proposal = None
        proposal = len(pool.proposals) - 1
        batch = runs.score(runs.draw(pool.proposals[proposal], n))
        runs.passes += n * (proposal != BASE_INDEX)
        return batch, proposal

    def _update(self, batch: Scored, log_z: Tensor) -> None:
        runs, table = self.runs, self.runs.policy.log_table()
        runs.passes += len(batch.drawn)
        records = runs.records(batch, batch.drawn.under(table.detach()), log_z)
        pairs = list(zip(self.objectives, records, strict=True))
        coefficients = torch.stack([objective.coefficients(record) for objective, record in pairs])
        runs.optimizer.step(runs.gradients(table, runs.total_coefficients(batch.drawn, runs.checked(coefficients))))
        self.objectives = [o.adapted(record) for o, record in pairs]
