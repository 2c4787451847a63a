"""Scoring: one pass of the base and one of the policy over a batch, and the pull of its samples on the policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.lm import Guide, NextToken, Reading, Roles, Samples, next_token
from tiltlm.objectives import Objective
from tiltlm.targets import Target
from tiltlm.training.batch import Batch
from tiltlm.training.metrics import Scores
from tiltlm.training.passes import Passes
from tiltlm.training.pulling import ignores_the_impossible, pull_chunk

if TYPE_CHECKING:
    from accelerate import Accelerator


# As good as −∞, for a log-probability in nats.
LEAST_LOGPROB = -1e4


class Scorer:
    """Scores batches in chunks of bounded memory, which do not change the result.

    A row with P = 0 that gets no coefficient matters to no gradient: it takes no base pass and no backward, and
    on-policy, where the sampler has told its log-probability, no pass at all.
    """

    def __init__(
        self,
        roles: Roles,
        target: Target,
        objective: Objective,
        accelerator: Accelerator,
        rows_at_once: int | None,
        passes: Passes,
        timed: Callable[[str], AbstractContextManager[Any]],
    ) -> None:
        self.roles, self.target, self.objective, self.accelerator = roles, target, objective, accelerator
        self.rows_at_once, self.passes, self.timed = rows_at_once, passes, timed
        self.skips = ignores_the_impossible(objective)

    def pull(self, batch: Batch, log_z: float, guide: Guide | None = None) -> Scores:
        """Score the batch and accumulate the gradient of −mean(c · log π); ``guide`` teaches beside that."""
        idle = self._impossible(batch) if self.skips and guide is None else None
        return self._walk(batch, idle, log_z, guide, backward=True)

    def score(self, batch: Batch) -> Scores:
        """Score every row of the batch, without a gradient."""
        return self._walk(batch, None, 0.0, None, backward=False)

    def score_possible(self, batch: Batch) -> Scores:
        """The same, but the base reads no row with P = 0, as it takes no part in any distance to the target."""
        return self._walk(batch, self._impossible(batch), 0.0, None, backward=False)

    def _walk(self, batch: Batch, idle: Tensor | None, log_z: float, guide: Guide | None, *, backward: bool) -> Scores:
        parts, order = [], []
        idle = torch.zeros(len(batch.samples), dtype=torch.bool) if idle is None else idle
        for rows in self._chunks(batch.samples, ~idle):
            chunk = batch.samples.select(rows).trimmed()
            base = self._read_base(batch, chunk, guide)
            with self.timed("policy"), torch.set_grad_enabled(backward):
                laws = self._read_policy(chunk, base, guide)
            scores = self._with_target(batch, rows, _scores(batch, chunk, laws))
            if backward:
                with self.timed("policy"):
                    pulled = pull_chunk(self.objective, chunk, scores, laws, log_z)
                    self.accelerator.backward(-pulled.sum() / len(batch.samples))
            parts.append(scores)
            order.append(rows)
        if backward and not parts:
            # Gradients of zero, as without skipping: an optimizer with momentum moves on them.
            nothing = torch.stack([0.0 * p.sum() for p in self.roles.trainable().values()]).sum()
            self.accelerator.backward(nothing)
        for rows in self._chunks(batch.samples, idle):
            parts.append(self._score_idle(batch, batch.samples.select(rows).trimmed()))
            order.append(rows)
        return Scores.concatenate(parts, torch.cat(order).argsort())

    def _impossible(self, batch: Batch) -> Tensor:
        """Which rows [N] have P = 0."""
        with self.timed("features"):
            features = batch.features
        # The base's value is not known yet: whatever it is, P must be 0.
        sampled = batch.samples.sequence_logprob.cpu()
        values = sampled, torch.zeros_like(sampled), torch.full_like(sampled, LEAST_LOGPROB)
        scores = torch.stack([self.target.log_score(value, features) for value in values])
        return (scores == -math.inf).all(0)

    def _chunks(self, samples: Samples, wanted: Tensor) -> list[Tensor]:
        rows = wanted.nonzero().squeeze(-1).to(samples.tokens.device)
        if not len(rows):
            return []
        return [rows[piece] for piece in self.roles.policy.chunks(samples.select(rows), self.rows_at_once)]

    def _read_base(self, batch: Batch, chunk: Samples, guide: Guide | None) -> Reading | None:
        if batch.from_base and guide is None:
            return None
        self.passes.read(chunk)
        with self.timed("base"), torch.no_grad(), self.roles.use("base") as model, self.accelerator.autocast():
            return model.read(chunk)

    def _read_policy(self, chunk: Samples, base: Reading | None, guide: Guide | None) -> NextToken:
        self.passes.read(chunk)
        with self.accelerator.autocast():
            reading = self.roles.policy.read(chunk)
        return next_token(chunk, reading, base, guide)

    def _with_target(self, batch: Batch, rows: Tensor, scores: Scores) -> Scores:
        with self.timed("features"):
            features = batch.features[rows.cpu()]
        return scores.with_target(self.target.log_score(scores.base_logprob, features))

    def _score_idle(self, batch: Batch, chunk: Samples) -> Scores:
        if batch.source == "policy":
            policy = chunk.proposal_logprob
        else:
            with self.timed("policy"), torch.no_grad():
                policy = self._read_policy(chunk, None, None).policy
        unknown = torch.full_like(chunk.proposal_logprob, math.nan)
        base = chunk.proposal_logprob if batch.from_base else unknown
        return Scores.of(chunk, NextToken(policy, base)).with_target(torch.full((len(chunk),), -math.inf))


def _scores(batch: Batch, chunk: Samples, laws: NextToken) -> Scores:
    again = {"policy": laws.policy, "base": laws.base, "guided": laws.guide}.get(batch.source)
    scores = Scores.of(chunk, laws, chunk.proposal_logprob if batch.from_base else None)
    return scores if again is None else scores.with_rescored(again)
