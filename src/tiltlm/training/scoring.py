"""Scoring: one pass of the base and one of the policy over a batch, and the gradient of the surrogate loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from tiltlm.estimation import mixture
from tiltlm.evaluation.scores import Scores
from tiltlm.lm import ForwardPass, Guide, NextToken, Samples, next_token
from tiltlm.objectives import MinimumVariance, Objective, Record
from tiltlm.rollouts.proposal import BASE, GUIDED, POLICY, Proposal
from tiltlm.targets import Target, target_reward
from tiltlm.training.critic import Critic
from tiltlm.training.forward_passes import ForwardPasses
from tiltlm.training.ranks import Ranks
from tiltlm.training.rollout_batch import Assessment, RolloutBatch
from tiltlm.training.surrogate import finite, guide_record, token_record

# Practically −∞ for a log-probability in nats.
LEAST_LOGPROB = -1e4
# Called with the record of each chunk and its coefficients.
ChunkListener = Callable[[Record, Tensor], None]


class Scorer:
    """Scores batches in chunks of bounded memory, which do not change the result, and holds the run's objective.

    A row whose coefficient is known to be 0, as a row with P = 0 in GDC, changes no gradient. It gets no base pass and
    no backward pass, and on-policy, where the sampler has its log-probability, no pass at all. With ``keeps_base`` the
    base reads a batch once even if there are several updates on it.
    """

    def __init__(
        self,
        passes: ForwardPasses,
        target: Target,
        objective: Objective,
        ranks: Ranks,
        critic: Critic | None = None,
        *,
        keeps_base: bool = False,
    ) -> None:
        self.passes, self.target, self.objective, self.ranks, self.critic = passes, target, objective, ranks, critic
        self.roles, self.accelerator, self.timer = passes.roles, passes.accelerator, passes.timer
        self.keeps_base = keeps_base
        self.minimum_variance = MinimumVariance()
        # Whether rows that cannot change the gradient are left out; a critic learns from every row.
        self.skips_outside_support = objective.zero_outside_support
        self.skips_zero_advantage = objective.batchwise and objective.zero_without_advantage and critic is None

    def assess(self, batch: RolloutBatch, log_z: float | Tensor) -> tuple[RolloutBatch, Record | None]:
        """What must be known of the whole batch before its first update, and the record that advantages came from.

        Where they are needed, the base, and off-policy or for a critic the policy, read the batch without gradient.
        ``log_z`` is one number or one per row [N].
        """
        objective = self.objective
        # A target without a reward of its own is read as log P − log a.
        base_is_read = objective.advantages_read_base or not hasattr(self.target, "reward")
        wanted_base = self.keeps_base or (objective.batchwise and base_is_read)
        tables: dict[str, Tensor] = {}
        with self.roles.cast_once() if wanted_base or objective.batchwise else nullcontext():
            for rows in self.passes.chunks(batch.samples, torch.ones(len(batch.samples), dtype=torch.bool)):
                chunk = batch.samples.select(rows).trimmed()
                found = self._assess_chunk(batch, chunk, rows, base=wanted_base, policy=objective.batchwise)
                for name, values in found.items():
                    table = tables.setdefault(name, torch.zeros_like(batch.samples.proposal_logprob))
                    table[rows, : values.shape[1]] = values.to(table)
        if not objective.batchwise:
            return replace(batch, assessment=Assessment(**tables)) if tables else batch, None
        record = self.ranks.gather_record(self._whole_record(batch, tables, log_z))
        advantage = self.ranks.own(finite(objective, objective.advantages(record), record))
        returns = self.ranks.own(objective.returns(record)) if objective.has_critic else None
        return replace(batch, assessment=Assessment(advantage, returns=returns, **tables)), record

    def accumulate(
        self,
        batch: RolloutBatch,
        log_z: float | Tensor,
        guide: Guide | None = None,
        *,
        listener: ChunkListener | None = None,
    ) -> Scores:
        """Score the batch and add the gradient of its surrogate loss; ``guide`` is distilled if given."""
        with self.roles.cast_once():
            idle = self._idle(batch) if guide is None else None
            return self._walk(batch, idle, log_z, guide, backward=True, listener=listener)

    def adapt(self, record: Record | None) -> None:
        """Let the objective adapt to a record of the whole batch, if there is one."""
        if record is not None:
            self.objective = self.objective.adapted(record)

    def score(self, batch: RolloutBatch) -> Scores:
        """Score every row of the batch, without gradient."""
        with self.roles.cast_once():
            return self._walk(batch, None, 0.0, None, backward=False)

    def score_in_support(self, batch: RolloutBatch) -> Scores:
        """The same, but the base does not read rows with P = 0, which take no part in a distance to the target."""
        with self.roles.cast_once():
            return self._walk(batch, self._outside_support(batch), 0.0, None, backward=False)

    def _walk(
        self,
        batch: RolloutBatch,
        idle: Tensor | None,
        log_z: float | Tensor,
        guide: Guide | None,
        *,
        backward: bool,
        listener: ChunkListener | None = None,
    ) -> Scores:
        """Score the rows in chunks, those that are ``idle`` [N] last and without gradient."""
        parts, order = [], []
        idle = torch.zeros(len(batch.samples), dtype=torch.bool) if idle is None else idle
        for rows in self.passes.chunks(batch.samples, ~idle):
            chunk = batch.samples.select(rows).trimmed()
            known = rows_of(batch.base_logprob, rows, chunk)
            base = self.passes.base(chunk) if known is None or guide is not None else None
            with self.timer("policy"), torch.set_grad_enabled(backward):
                policy = self.passes.policy(chunk)
                scored = next_token(chunk, policy, base, guide)
            chunk = _as_from_mixture(chunk, scored, batch.base_share)
            scores = self._with_target(batch, rows, _scores(batch, rows, chunk, scored, known))
            if backward:
                with self.timer("policy"):
                    chunk_log_z = log_z[rows.cpu()] if isinstance(log_z, Tensor) else log_z
                    base_tokens = scored.base if scored.base is not None else known
                    assert base_tokens is not None
                    weights = self.minimum_variance.weights(chunk.tokens.shape[1])
                    record = token_record(
                        chunk,
                        scores,
                        chunk_log_z,
                        scored.policy,
                        base_tokens,
                        guide=guide_record(chunk, scored, guide, log_z, weights),
                        advantage=rows_of(batch.assessment.advantage if batch.assessment else None, rows, chunk),
                    )
                    loss = self._loss(record, scored, listener)
                    if self.critic is not None:
                        loss = loss + self._critic_loss(self.critic, batch, rows, chunk, policy)
                    self.accelerator.backward(loss / len(batch.samples))
            parts.append(scores)
            order.append(rows)
        if backward and not parts:
            # Gradients of zero, as without skipping: an optimizer with momentum changes weights even so.
            zero = torch.stack([0.0 * p.sum() for p in self.roles.trainable().values()]).sum()
            self.accelerator.backward(zero)
        for rows in self.passes.chunks(batch.samples, idle):
            parts.append(self._score_idle(batch, rows))
            order.append(rows)
        return Scores.concatenate(parts, torch.cat(order).argsort())

    def _loss(self, record: Record, scored: NextToken, listener: ChunkListener | None) -> Tensor:
        """The surrogate loss of a chunk, with gradient."""
        coefficients = finite(self.objective, self.objective.coefficients(record), record)
        if listener is not None:
            listener(record, coefficients)
        taught = scored.taught if record.guide is not None else None
        loss = self.objective.token_loss(record, coefficients.to(scored.policy), scored.policy, taught).sum()
        estimators = self.objective.estimators(record) if scored.gram is not None else None
        if estimators is not None and scored.gram is not None:
            self.minimum_variance.add(estimators, scored.gram)
        return loss

    def _idle(self, batch: RolloutBatch) -> Tensor | None:
        """Which rows [N] are known to have coefficient 0; None: none."""
        advantage = batch.assessment.advantage if batch.assessment is not None else None
        if advantage is None:
            return self._outside_support(batch) if self.skips_outside_support else None
        if not self.skips_zero_advantage:
            return None
        silent = (advantage.cpu().reshape(len(advantage), -1) == 0).all(-1)
        # Metrics need log a of a row in the support, so without it the row is not idle.
        return silent if batch.base_logprob is not None else silent & self._outside_support(batch)

    def _outside_support(self, batch: RolloutBatch) -> Tensor:
        """Which rows [N] have P = 0."""
        with self.timer("features"):
            features = batch.features
        # log a is not known yet: P must be 0 whatever it is.
        sampled = batch.samples.sequence_logprob.cpu()
        values = sampled, torch.zeros_like(sampled), torch.full_like(sampled, LEAST_LOGPROB)
        scores = torch.stack([self.target.log_score(value, features) for value in values])
        return (scores == -math.inf).all(0)

    def _whole_record(self, batch: RolloutBatch, tables: dict[str, Tensor], log_z: float | Tensor) -> Record:
        """The record of the whole batch, from log-probabilities of tokens [N, T]."""
        policy = tables["policy"]
        base = tables.get("base", torch.full_like(policy, math.nan))
        scores = self._with_target(batch, torch.arange(len(policy)), Scores.of(batch.samples, NextToken(policy, base)))
        reward = target_reward(self.target, scores.base_logprob, batch.features)
        return token_record(batch.samples, scores, log_z, policy, base, reward=reward, values=tables.get("values"))

    @torch.no_grad()
    def _assess_chunk(
        self, batch: RolloutBatch, chunk: Samples, rows: Tensor, *, base: bool, policy: bool
    ) -> dict[str, Tensor]:
        """Log-probabilities of base and policy, where wanted, and the critic's values, each [n, t]."""
        found: dict[str, Tensor] = {}
        if base:
            known = rows_of(batch.base_logprob, rows, chunk)
            found["base"] = known if known is not None else next_token(chunk, self.passes.base(chunk)).policy
        known = rows_of(batch.policy_logprob, rows, chunk)
        if policy and known is not None:
            found["policy"] = known
        if policy and (known is None or self.critic is not None):
            with self.timer("policy"):
                read = self.passes.policy(chunk)
                found.setdefault("policy", next_token(chunk, read).policy)
                if self.critic is not None:
                    found["values"] = self.critic.values(chunk, read)
        return found

    def _critic_loss(
        self, critic: Critic, batch: RolloutBatch, rows: Tensor, chunk: Samples, policy: ForwardPass
    ) -> Tensor:
        assert batch.assessment is not None
        before, returns = (rows_of(x, rows, chunk) for x in (batch.assessment.values, batch.assessment.returns))
        assert before is not None
        assert returns is not None
        loss = self.objective.value_loss(critic.values(chunk, policy), before, returns.to(before))
        return (loss * chunk.mask).sum()

    def _with_target(self, batch: RolloutBatch, rows: Tensor, scores: Scores) -> Scores:
        with self.timer("features"):
            features = batch.features[rows.cpu()]
        return scores.with_target(self.target.log_score(scores.base_logprob, features))

    def _score_idle(self, batch: RolloutBatch, rows: Tensor) -> Scores:
        chunk = batch.samples.select(rows).trimmed()
        base, policy = rows_of(batch.base_logprob, rows, chunk), rows_of(batch.policy_logprob, rows, chunk)
        if policy is None:
            with self.timer("policy"), torch.no_grad():
                policy = next_token(chunk, self.passes.policy(chunk)).policy
        unknown = torch.full_like(chunk.proposal_logprob, math.nan)
        scores = Scores.of(chunk, NextToken(policy, base if base is not None else unknown))
        if base is not None:
            return self._with_target(batch, rows, scores)
        return scores.with_target(torch.full((len(chunk),), -math.inf))


def _as_from_mixture(chunk: Samples, scored: NextToken, base_share: float | None) -> Samples:
    """The samples with log-probabilities of the mixture of base and guided base, where they count as drawn from it."""
    if base_share is None:
        return chunk
    assert scored.base is not None
    assert scored.guide is not None
    return replace(chunk, proposal_logprob=mixture([scored.base, scored.guide], [base_share, 1 - base_share]))


def rows_of(table: Tensor | None, rows: Tensor, chunk: Samples) -> Tensor | None:
    """These rows of a table [N] or [N, T], as wide as the chunk that they make."""
    if table is None:
        return None
    found = table[rows.to(table.device)]
    return found[:, : chunk.tokens.shape[1]] if found.ndim == 2 else found


def _scores(batch: RolloutBatch, rows: Tensor, chunk: Samples, scored: NextToken, base: Tensor | None) -> Scores:
    by_proposal: dict[Proposal, Tensor | None] = {POLICY: scored.policy, BASE: scored.base, GUIDED: scored.guide}
    rescored = by_proposal.get(batch.proposal)
    scores = Scores.of(chunk, scored, base)
    if batch.mixture is not None:
        scores = replace(scores, proposal_logprob=batch.mixture[rows.cpu()])
    return scores if rescored is None else scores.with_rescored(rescored)
