"""Methods with coefficients of whole samples: the library's objectives and proposal rules, on many runs at once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ground.distilled import keep_guide
from ground.runs import Budget, Falls, Runs, Scored
from tiltlm.estimation import kl_difference, tv_difference
from tiltlm.objectives import Objective
from tiltlm.rollouts.proposal import POLICY
from tiltlm.training.proposal_rules import Distances, proposal_rule


@dataclass(frozen=True)
class Sampled:
    """``objective`` under the proposal ``rule``, with ``steps`` updates per batch.

    With ``reuse`` it trains on the fit samples first. ``falls`` is the budget with which the learning rate falls. With
    ``keeps_guide`` the policy keeps the guide estimated from the fit samples.
    """

    objective: Objective
    rule: str = "on_policy"
    steps: int = 1
    reuse: bool = False
    batch: int = 250
    falls: Falls = ""
    keeps_guide: bool = False

    def train(self, runs: Runs, budget: Budget) -> None:
        """Train until the budget is spent."""
        if self.keeps_guide:
            keep_guide(runs)
        loop = SampledLoop(self, runs)
        while not runs.spent(budget):
            runs.lower_rates(budget, self.falls)
            loop.turn()


class SampledLoop:
    """The training loop: draw, update the proposal, update the policy, as the library's trainer does."""

    def __init__(self, method: Sampled, runs: Runs) -> None:
        self.method, self.runs, self.rule = method, runs, proposal_rule(method.rule)
        self.skips = method.objective.zero_outside_support
        self.proposal = runs.base.repeat(runs.count, 1, 1)
        self.on_policy = self.rule.first == POLICY
        self.from_base = torch.full((runs.count,), not self.on_policy)
        self.turns = self.reused = 0

    def turn(self) -> None:
        """Train on one batch."""
        runs, objective = self.runs, self.method.objective
        self.turns += 1
        batch, fresh, from_base = self._next()
        log_z = runs.log_z(batch)
        if fresh:
            runs.learn_log_z(batch)
        # A row with coefficient 0 needs no pass of the base, nor of the policy if the sampler gave log π.
        idle = ~batch.possible & self.skips
        runs.passes += (~idle).sum(1) * ~from_base
        if not (self.on_policy and fresh):
            runs.passes += idle.sum(1)
        advantages: list[Tensor | None] = [None] * runs.count
        for step in range(self.method.steps):
            table = runs.policy.log_table()
            policy = batch.drawn.under(table.detach())
            runs.passes += (~idle).sum(1)
            records = runs.records(batch, policy, log_z)
            if step == 0:
                if objective.batchwise:
                    advantages = [objective.advantages(record) for record in records]
                self._update_proposal(batch, table.detach(), policy)
            records = [replace(record, advantage=a) for record, a in zip(records, advantages, strict=True)]
            coefficients = torch.stack([objective.coefficients(record) for record in records])
            totals = runs.total_coefficients(batch.drawn, runs.checked(coefficients))
            runs.optimizer.step(runs.gradients(table, totals))
        runs.note()

    def _next(self) -> tuple[Scored, bool, Tensor]:
        """The next batch, whether it is fresh, and in which runs the base drew it [R]."""
        runs, n = self.runs, self.method.batch
        if self.method.reuse and runs.fit_sample is not None and self.reused + n <= len(runs.fit_sample):
            self.reused += n
            batch = runs.score(runs.fit_sample.rows(slice(self.reused - n, self.reused)))
            return batch, False, torch.ones(runs.count, dtype=torch.bool)
        return self._fresh(n), True, self.from_base

    def _fresh(self, n: int) -> Scored:
        runs = self.runs
        if self.on_policy:
            with torch.no_grad():
                self.proposal = runs.policy.log_table()
        return runs.score(runs.draw(self.proposal, n))

    def _update_proposal(self, batch: Scored, before: Tensor, policy: Tensor) -> None:
        """Set q to π as it was ``before`` the update, in the runs where the rule replaces it."""
        runs = self.runs
        if not self.rule.due(self.turns):
            return
        if self.rule.extra_batches:
            batch = self._fresh(self.rule.extra_batches * self.method.batch)
            policy = batch.drawn.under(before)
            runs.learn_log_z(batch)
            runs.passes += len(batch.drawn) + batch.possible.sum(1) * ~self.from_base
        chosen = []
        for r in range(runs.count):
            arguments = batch.score[r], batch.proposal[r], policy[r].double().sum(-1)
            gains = kl_difference(*arguments), tv_difference(*arguments, runs.partitions[r].log_z)
            chosen.append(self.rule.replaces(Distances(*gains)))
        replaced = torch.tensor(chosen)
        self.proposal = torch.where(replaced[:, None, None], before, self.proposal)
        self.from_base = self.from_base & ~replaced
