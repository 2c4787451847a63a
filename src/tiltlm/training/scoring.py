"""Scoring: one pass of the base and one of the policy over a batch, and the pull of its samples on the policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.estimation import mixture
from tiltlm.evaluation.scores import Scores
from tiltlm.lm import ForwardPass, Guide, NextToken, Roles, Samples, next_token
from tiltlm.objectives import (
    AdaptiveObjective,
    Balance,
    BatchObjective,
    CriticObjective,
    Guided,
    GuideRecord,
    Objective,
    Record,
    forms,
)
from tiltlm.targets import Target, target_reward
from tiltlm.training.critic import Critic
from tiltlm.training.pass_counter import Passes
from tiltlm.training.rollout_batch import Assessment, Batch
from tiltlm.training.surrogate import (
    finite,
    follows_its_advantage,
    ignores_the_impossible,
    needs_the_base,
    pull_chunk,
    record_of,
    sequence_record,
)

if TYPE_CHECKING:
    from accelerate import Accelerator


# As good as −∞, for a log-probability in nats.
LEAST_LOGPROB = -1e4


class Scorer:
    """Scores batches in chunks of bounded memory, which do not change the result.

    A row that gets no coefficient, as one with P = 0 in GDC, matters to no gradient: it takes no base pass and no
    backward, and on-policy, where the sampler has told its log-probability, no pass at all. ``keeps_base`` is for
    batches that are pulled more than once: the base then reads each once.
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
        critic: Critic | None = None,
        keeps_base: bool = False,
    ) -> None:
        self.roles, self.target, self.objective, self.accelerator = roles, target, objective, accelerator
        self.rows_at_once, self.passes, self.timed, self.critic = rows_at_once, passes, timed, critic
        # The reward of a target that has none of its own is read off log P − log a.
        self.keeps_base = keeps_base
        self.needs_base = needs_the_base(objective) or not hasattr(target, "reward")
        self.skips = ignores_the_impossible(objective)
        self.balance, self.mixes = Balance(), isinstance(objective, Guided) and objective.correction > 0
        self.follows_advantage = follows_its_advantage(objective) and critic is None

    def assess(self, batch: Batch, log_z: float | Tensor) -> tuple[Batch, Record | None]:
        """The batch with what must be known of it as a whole, and the record that the objective judged it by.

        The base, and off-policy or for a critic the policy, reads all of it where that is needed; no gradient.
        """
        objective = self.objective
        whole = isinstance(objective, BatchObjective)
        wanted = {"base": self.keeps_base or (whole and self.needs_base), "policy": whole}
        tables: dict[str, Tensor] = {}
        with self.roles.cast_once() if any(wanted.values()) else nullcontext():
            for rows in self._chunks(batch.samples, torch.ones(len(batch.samples), dtype=torch.bool)):
                chunk = batch.samples.select(rows).trimmed()
                for name, found in self._assess_chunk(batch, chunk, rows, **wanted).items():
                    table = tables.setdefault(name, torch.zeros_like(batch.samples.proposal_logprob))
                    table[rows, : found.shape[1]] = found.to(table)
        assessment = Assessment(**tables)
        if not isinstance(objective, BatchObjective):
            return replace(batch, assessment=assessment) if tables else batch, None
        policy = tables["policy"]
        base = tables.get("base", torch.full_like(policy, math.nan))
        scores = self._with_target(batch, torch.arange(len(policy)), Scores.of(batch.samples, NextToken(policy, base)))
        reward = target_reward(self.target, scores.base_logprob, batch.features)
        record = record_of(batch.samples, scores, log_z, policy, base, reward=reward, values=tables.get("values"))
        advantage = finite(objective, objective.advantages(record), record)
        returns = objective.returns(record) if isinstance(objective, CriticObjective) else None
        return replace(batch, assessment=replace(assessment, advantage=advantage, returns=returns)), record

    def pull(self, batch: Batch, log_z: float | Tensor, guide: Guide | None = None) -> Scores:
        """Score the batch and accumulate the gradient of −mean(c · log π); ``guide`` teaches beside that."""
        with self.roles.cast_once():
            scores = self._walk(batch, self._idle(batch) if guide is None else None, log_z, guide, backward=True)
        # One that looks at whole batches moves after all updates on one; others with what they have just seen.
        if not isinstance(self.objective, BatchObjective):
            self.adapt(sequence_record(scores, log_z))
        return scores

    def adapt(self, record: Record | None) -> None:
        """Let the objective move by what a record says, where there is one and the objective is one that moves."""
        if record is not None and isinstance(self.objective, AdaptiveObjective):
            self.objective = self.objective.adapted(record)

    def score(self, batch: Batch) -> Scores:
        """Score every row of the batch, without a gradient."""
        with self.roles.cast_once():
            return self._walk(batch, None, 0.0, None, backward=False)

    def score_possible(self, batch: Batch) -> Scores:
        """The same, but the base reads no row with P = 0, as it takes no part in any distance to the target."""
        with self.roles.cast_once():
            return self._walk(batch, self._impossible(batch), 0.0, None, backward=False)

    def _walk(
        self, batch: Batch, idle: Tensor | None, log_z: float | Tensor, guide: Guide | None, *, backward: bool
    ) -> Scores:
        parts, order = [], []
        idle = torch.zeros(len(batch.samples), dtype=torch.bool) if idle is None else idle
        for rows in self._chunks(batch.samples, ~idle):
            chunk = batch.samples.select(rows).trimmed()
            known = _rows(batch.base_logprob, rows, chunk)
            base = self._read_base(chunk) if known is None or guide is not None else None
            with self.timed("policy"), torch.set_grad_enabled(backward):
                reading = self._read_policy(chunk)
                laws = next_token(chunk, reading, base, guide)
            chunk = _as_from_mixture(chunk, laws, batch.base_share)
            scores = self._with_target(batch, rows, _scores(batch, rows, chunk, laws, known))
            if backward:
                with self.timed("policy"):
                    base_tokens = laws.base if laws.base is not None else known
                    assert base_tokens is not None
                    record = record_of(
                        chunk,
                        scores,
                        log_z[rows.cpu()] if isinstance(log_z, Tensor) else log_z,
                        laws.policy,
                        base_tokens,
                        guide=self._guide_record(chunk, laws, guide, log_z),
                        advantage=_rows(batch.assessment.advantage if batch.assessment else None, rows, chunk),
                    )
                    loss = -pull_chunk(self.objective, chunk, record, laws).sum()
                    if self.mixes and laws.gram is not None:
                        self.balance.note(forms(record), laws.gram)
                    if self.critic is not None:
                        loss = loss + self._critic_loss(batch, rows, chunk, reading)
                    self.accelerator.backward(loss / len(batch.samples))
            parts.append(scores)
            order.append(rows)
        if backward and not parts:
            # Gradients of zero, as without skipping: an optimizer with momentum moves on them.
            nothing = torch.stack([0.0 * p.sum() for p in self.roles.trainable().values()]).sum()
            self.accelerator.backward(nothing)
        for rows in self._chunks(batch.samples, idle):
            parts.append(self._score_idle(batch, rows))
            order.append(rows)
        return Scores.concatenate(parts, torch.cat(order).argsort())

    def _idle(self, batch: Batch) -> Tensor | None:
        """Which rows [N] get no coefficient, as far as that is known beforehand."""
        advantage = batch.assessment.advantage if batch.assessment is not None else None
        if advantage is None:
            return self._impossible(batch) if self.skips else None
        if not self.follows_advantage:
            return None
        silent = (advantage.cpu().reshape(len(advantage), -1) == 0).all(-1)
        # What the base makes of a text that can be is measured, if nobody has asked it yet.
        return silent if batch.base_logprob is not None else silent & self._impossible(batch)

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

    @torch.no_grad()
    def _assess_chunk(
        self, batch: Batch, chunk: Samples, rows: Tensor, *, base: bool, policy: bool
    ) -> dict[str, Tensor]:
        """Log-probabilities of base and policy, where wanted, and the critic's values, each [n, t]."""
        found: dict[str, Tensor] = {}
        if base:
            known = _rows(batch.base_logprob, rows, chunk)
            found["base"] = known if known is not None else next_token(chunk, self._read_base(chunk)).policy
        known = _rows(batch.policy_logprob, rows, chunk)
        if policy and known is not None:
            found["policy"] = known
        if policy and (known is None or self.critic is not None):
            with self.timed("policy"):
                reading = self._read_policy(chunk)
                found.setdefault("policy", next_token(chunk, reading).policy)
                if self.critic is not None:
                    found["values"] = self.critic.values(chunk, reading)
        return found

    def _critic_loss(self, batch: Batch, rows: Tensor, chunk: Samples, reading: ForwardPass) -> Tensor:
        assert isinstance(self.objective, CriticObjective)
        assert self.critic is not None
        assert batch.assessment is not None
        before, returns = (_rows(x, rows, chunk) for x in (batch.assessment.values, batch.assessment.returns))
        assert before is not None
        assert returns is not None
        loss = self.objective.value_loss(self.critic.values(chunk, reading), before, returns.to(before))
        return (loss * chunk.mask).sum()

    def _guide_record(
        self, chunk: Samples, laws: NextToken, guide: Guide | None, log_z: float | Tensor
    ) -> GuideRecord | None:
        """What an objective reads of a guide; with several prompts its promises are over each one's Z already."""
        if guide is None or laws.guide is None or laws.expected is None:
            return None
        promises = guide.promises(chunk.tokens, chunk.mask).double()
        expected = laws.expected.double() + guide.log_scale
        if not isinstance(log_z, Tensor):
            promises, expected = promises - log_z, expected - log_z
        return GuideRecord(laws.guide.double(), promises, expected, self.balance.shares(chunk.tokens.shape[1]))

    def _read_base(self, chunk: Samples) -> ForwardPass:
        self.passes.read(chunk)
        with self.timed("base"), torch.no_grad(), self.roles.use("base") as model, self.accelerator.autocast():
            return model.read(chunk)

    def _read_policy(self, chunk: Samples) -> ForwardPass:
        self.passes.read(chunk)
        with self.accelerator.autocast():
            return self.roles.policy.read(chunk)

    def _with_target(self, batch: Batch, rows: Tensor, scores: Scores) -> Scores:
        with self.timed("features"):
            features = batch.features[rows.cpu()]
        return scores.with_target(self.target.log_score(scores.base_logprob, features))

    def _score_idle(self, batch: Batch, rows: Tensor) -> Scores:
        chunk = batch.samples.select(rows).trimmed()
        base, policy = _rows(batch.base_logprob, rows, chunk), _rows(batch.policy_logprob, rows, chunk)
        if policy is None:
            with self.timed("policy"), torch.no_grad():
                policy = next_token(chunk, self._read_policy(chunk)).policy
        unknown = torch.full_like(chunk.proposal_logprob, math.nan)
        scores = Scores.of(chunk, NextToken(policy, base if base is not None else unknown))
        if base is not None:
            return self._with_target(batch, rows, scores)
        return scores.with_target(torch.full((len(chunk),), -math.inf))


def _as_from_mixture(chunk: Samples, laws: NextToken, base_share: float | None) -> Samples:
    """The same samples with the log-probabilities of the mixture that they count as drawn from, if any."""
    if base_share is None:
        return chunk
    assert laws.base is not None
    assert laws.guide is not None
    return replace(chunk, proposal_logprob=mixture([laws.base, laws.guide], [base_share, 1 - base_share]))


def _rows(table: Tensor | None, rows: Tensor, chunk: Samples) -> Tensor | None:
    """These rows of a value per sequence [N] or token [N, T], as wide as the chunk that they make."""
    if table is None:
        return None
    found = table[rows.to(table.device)]
    return found[:, : chunk.tokens.shape[1]] if found.ndim == 2 else found


def _scores(batch: Batch, rows: Tensor, chunk: Samples, laws: NextToken, base: Tensor | None) -> Scores:
    again = {"policy": laws.policy, "base": laws.base, "guided": laws.guide}.get(batch.source)
    scores = Scores.of(chunk, laws, base)
    if batch.mixture is not None:
        scores = replace(scores, proposal_logprob=batch.mixture[rows.cpu()])
    return scores if again is None else scores.with_rescored(again)
