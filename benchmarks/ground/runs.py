"""Many runs of one method in lockstep, each with its counts of sequences and passes."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from ground.policies import Adam, Policy
from ground.worlds import World
from tiltlm.estimation import Partition
from tiltlm.objectives import Record, TokenRecord
from tiltlm.targets import TiltedTarget

# The budget with which learning rates fall to 0; "" for constant rates.
Falls = Literal["", "sequences", "passes"]


@dataclass(frozen=True)
class Drawn:
    """N sequences of each of R runs: the node before each token and the token [R, N, T], the leaf [R, N].

    ``logprob`` [R, N, T] is that of each token under its proposal.
    """

    nodes: Tensor
    tokens: Tensor
    leaf: Tensor
    logprob: Tensor

    @staticmethod
    def joined(parts: list[Drawn]) -> Drawn:
        """All sequences of the parts."""
        return Drawn(*(torch.cat([getattr(part, field.name) for part in parts], 1) for field in fields(Drawn)))

    def rows(self, chosen: slice | Tensor) -> Drawn:
        """The sequences at these indices, the same in all runs."""
        return Drawn(*(getattr(self, field.name)[:, chosen] for field in fields(Drawn)))

    def __len__(self) -> int:
        return self.tokens.shape[1]

    def under(self, table: Tensor) -> Tensor:
        """Log-probabilities of the tokens [R, N, T] under a distribution [R or 1, M, V]."""
        places = (self.nodes * table.shape[-1] + self.tokens).flatten(1)
        return table.flatten(1).expand(len(places), -1).gather(1, places).reshape(self.tokens.shape)


@dataclass(frozen=True)
class Scored:
    """Drawn sequences with log a of their tokens [R, N, T], log P and log q [R, N], float64."""

    drawn: Drawn
    base: Tensor
    score: Tensor
    proposal: Tensor

    @property
    def log_weights(self) -> Tensor:
        """log P − log q [R, N]."""
        return self.score - self.proposal

    @property
    def possible(self) -> Tensor:
        """Whether P > 0 [R, N]."""
        return self.score > -math.inf


@dataclass(frozen=True)
class Budget:
    """Sequences drawn and forward passes; a run continues until both are spent."""

    sequences: int
    passes: int


@dataclass(frozen=True)
class CurvePoint:
    """A point of the curves: sequences drawn in every run, forward passes [R] and KL(p‖π) [R]."""

    sequences: int
    passes: Tensor
    kl: Tensor


class Runs:
    """R = seeds × learning rates runs of one method on a world; runs of one seed draw with the same random numbers.

    ``fit`` samples of the base are drawn first, for the coefficients of moments and for the method; 0 for none. Every
    drawn sequence is counted, these too. ``passes`` counts as the library does: each sample, and each score of a
    sequence under base or policy, is one.
    """

    def __init__(self, world: World, seeds: int, rates: list[float], fit: int) -> None:
        self.world, self.seeds, self.count = world, seeds, seeds * len(rates)
        self.policy: Policy = world.network.copies(self.count)
        self.optimizer = Adam(self.policy.parameters, torch.tensor(rates).repeat(seeds))
        self.generator = torch.Generator().manual_seed(1000)
        self.sequences, self.passes = 0, torch.zeros(self.count)
        self.curve: list[CurvePoint] = []
        self.failed = torch.zeros(self.count, dtype=torch.bool)
        self.base = world.base.float()[None]
        self.partitions = [Partition.empty()] * self.count
        self.targets: list[TiltedTarget] = [world.target] * self.count
        self.fit_sample = self.draw(self.base, fit) if fit else None
        if self.fit_sample is not None:
            self.targets = [world.fitted(values) for values in world.values[self.fit_sample.leaf]]
        self.log_tilt = torch.stack([target.log_tilt(world.values) for target in self.targets])
        if self.fit_sample is not None:
            self.learn_log_z(self.score(self.fit_sample))
        self.note()

    def spent(self, budget: Budget) -> bool:
        """Whether all runs have spent both."""
        return self.sequences >= budget.sequences and bool((self.passes >= budget.passes).all())

    def lower_rates(self, budget: Budget, by: Falls) -> None:
        """Set learning rates in proportion to the remaining sequences or passes."""
        if by == "passes":
            self.optimizer.rate_scale = (1 - self.passes / budget.passes).clamp_min(0)
        elif by == "sequences":
            self.optimizer.rate_scale = torch.full_like(self.passes, max(0.0, 1 - self.sequences / budget.sequences))

    def draw(self, table: Tensor, n: int) -> Drawn:
        """``n`` sequences of a distribution [R or 1, M, V]; each counts as one pass."""
        runs, graph = self.count, self.world.graph
        reach = table.exp().cumsum(-1).flatten(1)
        nodes = torch.zeros(runs, n, dtype=torch.long)
        passed, tokens, vocabulary = [], [], graph.vocabulary
        for _ in range(graph.length):
            places = nodes[..., None] * vocabulary + torch.arange(vocabulary)
            steps = reach.expand(runs, -1).gather(1, places.flatten(1)).reshape(runs, n, vocabulary)
            chance = torch.rand(self.seeds, 1, n, 1, generator=self.generator)
            chance = chance.expand(-1, runs // self.seeds, -1, -1).reshape(runs, n, 1)
            tokens.append((chance * steps[..., -1:] >= steps).sum(-1).clamp_max(vocabulary - 1))
            passed.append(nodes)
            nodes = graph.child.flatten()[nodes * vocabulary + tokens[-1]]
        self.sequences += n
        self.passes += n
        drawn = Drawn(torch.stack(passed, -1), torch.stack(tokens, -1), nodes - len(graph.child), torch.empty(0))
        return replace(drawn, logprob=drawn.under(table))

    def score(self, drawn: Drawn) -> Scored:
        """Scores of the sequences under base and target; counts no passes."""
        base = drawn.under(self.base)
        score = base.double().sum(-1) + self.log_tilt.gather(1, drawn.leaf)
        return Scored(drawn, base, score, drawn.logprob.double().sum(-1))

    def learn_log_z(self, batch: Scored) -> None:
        """Add a batch to each run's estimate of log Z."""
        self.partitions = [p.updated(w) for p, w in zip(self.partitions, batch.log_weights, strict=True)]

    def log_z(self, batch: Scored) -> Tensor:
        """The estimates [R] from earlier batches; before the first hit, from this batch; 0 without any hit."""
        known = [p if p.known else p.updated(w) for p, w in zip(self.partitions, batch.log_weights, strict=True)]
        return torch.tensor([p.log_z.value if p.known else 0.0 for p in known], dtype=torch.float64)

    def records(self, batch: Scored, policy: Tensor, log_z: Tensor) -> list[Record]:
        """The record of each run for an objective, from log π of the tokens [R, N, T] and log Z [R]."""
        drawn, values = batch.drawn, self.world.values[batch.drawn.leaf]
        return [
            Record(
                policy_logprob=policy[r].double().sum(-1),
                base_logprob=batch.base[r].double().sum(-1),
                proposal_logprob=batch.proposal[r],
                target_logscore=batch.score[r],
                log_z=float(log_z[r]),
                reward=self.targets[r].reward(values[r]),
                tokens=TokenRecord(policy[r], batch.base[r], drawn.logprob[r], torch.ones_like(policy[r]).bool()),
            )
            for r in range(self.count)
        ]

    def total_coefficients(self, drawn: Drawn, coefficients: Tensor) -> Tensor:
        """Σ c / N over the samples at each node and token [R, M, V], from coefficients [R, N] or [R, N, T]."""
        weights = coefficients.float().reshape(*drawn.leaf.shape, -1).expand(drawn.tokens.shape)
        vocabulary = self.world.graph.vocabulary
        places = (drawn.nodes * vocabulary + drawn.tokens).flatten(1)
        total = torch.zeros(self.count, self.world.base.numel())
        return total.scatter_add_(1, places, weights.flatten(1)).reshape(self.count, -1, vocabulary) / len(drawn)

    def gradients(self, log_policy: Tensor, coefficients: Tensor) -> list[Tensor]:
        """The gradient of −Σ c log π by each parameter, from c [R, M, V] and log π [R, M, V] with its graph."""
        return list(torch.autograd.grad(-(coefficients * log_policy).sum(), self.policy.parameters))

    def checked(self, coefficients: Tensor) -> Tensor:
        """The coefficients [R, ...]. A run with one that is not finite has failed, as in the library; it gets zeros."""
        self.failed |= ~coefficients.flatten(1).isfinite().all(1)
        return torch.where(self.failed.reshape(-1, *[1] * (coefficients.ndim - 1)), 0.0, coefficients)

    def note(self) -> None:
        """Add a point to the curves."""
        with torch.no_grad():
            kl = self.world.kl(self.policy.log_table())
        self.curve.append(CurvePoint(self.sequences, self.passes.clone(), torch.where(self.failed, math.inf, kl)))
