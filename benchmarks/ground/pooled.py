"""Methods that train on the samples of all their proposals so far, with the library's objectives and mixture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ground.distilled import keep_guide
from ground.runs import Budget, Drawn, Falls, Runs, Scored
from tiltlm.estimation import log_partition
from tiltlm.objectives import Objective
from tiltlm.training.proposal_rules import proposal_rule
from tiltlm.training.replay.weights import BASE_INDEX, mixture_logprob


@dataclass(frozen=True)
class FromPool:
    """``objective`` with ``steps`` updates a batch, the fit samples first: one on the batch and the others on a pool.

    The pool keeps every sequence, and each of its updates is on as many as a batch has. ``rule`` and ``check_steps``
    say when the policy becomes the proposal. The library's stop on a rising KL(p‖π) looks at forty batches, and so
    comes after a budget of 10,000 sequences. ``falls`` and ``keeps_guide`` are as in ``Sampled``.
    """

    objective: Objective
    steps: int = 4
    rule: str = "interval"
    check_steps: int = 4
    batch: int = 250
    falls: Falls = ""
    keeps_guide: bool = False

    def train(self, runs: Runs, budget: Budget) -> None:
        """Until the budget is spent."""
        if self.keeps_guide:
            keep_guide(runs)
        loop = Loop(self, runs)
        while not runs.spent(budget):
            runs.lower_rates(budget, self.falls)
            loop.turn()


class Kept:
    """N sequences of each of R runs, log q under K laws [R, N, K], and the law that drew each sequence [N]."""

    def __init__(self, runs: Runs) -> None:
        self.runs, self.laws = runs, [runs.base]
        self.scored: Scored | None = None
        self.under = torch.empty(runs.count, 0, 1, dtype=torch.float64)
        self.origin = torch.empty(0, dtype=torch.long)

    def add(self, scored: Scored, law: int) -> None:
        """A batch from that law: the other laws read it, and a law of which it is the first reads all others."""
        parts = [scored] if self.scored is None else [self.scored, scored]
        if law == self.under.shape[-1]:
            assert self.scored is not None
            column = self.scored.drawn.under(self.laws[law]).double().sum(-1)
            self.under = torch.cat([self.under, column[..., None]], -1)
            self.runs.passes += len(self.origin)
        # log a is known, and so is what the batch's own law says of it.
        self.runs.passes += len(scored.drawn) * sum(k not in (BASE_INDEX, law) for k in range(len(self.laws)))
        rows = torch.stack([scored.drawn.under(table).double().sum(-1) for table in self.laws], -1)
        self.under = torch.cat([self.under, rows], 1)
        self.origin = torch.cat([self.origin, torch.full((len(scored.drawn),), law)])
        tables = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("base", "score", "proposal"))
        self.scored = Scored(Drawn.joined([part.drawn for part in parts]), *tables)

    def mixed(self) -> Scored:
        """All of them, as drawn from the mixture."""
        assert self.scored is not None
        mixture = torch.stack([mixture_logprob(under, self.origin) for under in self.under])
        return Scored(self.scored.drawn, self.scored.base, self.scored.score, mixture)


class Loop:
    """The method on its runs: draw, pull, keep, and pull on what is kept, as the library's trainer does."""

    def __init__(self, method: FromPool, runs: Runs) -> None:
        self.method, self.runs, self.rule = method, runs, proposal_rule(method.rule, method.check_steps)
        self.objectives = [method.objective] * runs.count
        self.generator = torch.Generator().manual_seed(0)
        self.kept = Kept(runs)
        # A law that the next fresh batch will be the first of.
        self.next_law: Tensor | None = None
        self.turns = 0

    def turn(self) -> None:
        """One batch."""
        runs, n = self.runs, self.method.batch
        self.turns += 1
        batch, law = self._next()
        log_z = runs.log_z(batch)
        if law is not None:
            runs.learn_log_z(batch)
        self.kept.add(batch, law or BASE_INDEX)
        if self.rule.due(self.turns):
            self.next_law = runs.policy.log_table().detach()
        self._update(batch, log_z)
        mixed = self.kept.mixed()
        if self.method.objective.normalized_by_replay:
            own = [log_partition(weights).value for weights in mixed.log_weights]
            log_z = torch.where(mixed.possible.any(1), torch.tensor(own, dtype=torch.float64), log_z)
        for _ in range(self.method.steps - 1):
            rows = torch.randperm(len(mixed.drawn), generator=self.generator)[:n]
            tables = (getattr(mixed, name)[:, rows] for name in ("base", "score", "proposal"))
            self._update(Scored(mixed.drawn.rows(rows), *tables), log_z)
        runs.note()

    def _next(self) -> tuple[Scored, int | None]:
        """The next batch and the law that drew it; None for fit samples."""
        runs, n, kept = self.runs, self.method.batch, self.kept
        assert runs.fit_sample is not None, "the pool begins with fit samples"
        if self.turns * n <= len(runs.fit_sample):
            return runs.score(runs.fit_sample.rows(slice((self.turns - 1) * n, self.turns * n))), None
        if self.rule.first == "policy":
            self.next_law = runs.policy.log_table().detach()
        if self.next_law is not None:
            kept.laws.append(self.next_law)
            self.next_law = None
        law = len(kept.laws) - 1
        batch = runs.score(runs.draw(kept.laws[law], n))
        runs.passes += n * (law != BASE_INDEX)
        return batch, law

    def _update(self, batch: Scored, log_z: Tensor) -> None:
        runs, table = self.runs, self.runs.policy.log_table()
        runs.passes += len(batch.drawn)
        records = runs.records(batch, batch.drawn.under(table.detach()), log_z)
        pairs = list(zip(self.objectives, records, strict=True))
        coefficients = torch.stack([objective.coefficients(record) for objective, record in pairs])
        runs.optimizer.step(runs.gradients(table, runs.pull(batch.drawn, runs.checked(coefficients))))
        self.objectives = [o.adapted(record) for o, record in pairs]
