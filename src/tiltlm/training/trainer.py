"""The one loop: sample, score, pull, step, learn."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from tiltlm.config.training import TrainingArguments
from tiltlm.errors import CheckpointError, NumericalError
from tiltlm.estimation import Partition, PromptPartition, partition_for
from tiltlm.evaluation.scores import Scores
from tiltlm.guides import ValueFunction
from tiltlm.lm import Guide, Roles
from tiltlm.objectives import CriticObjective, Guided, Objective
from tiltlm.targets import Target
from tiltlm.targets.base_sample import BaseSample
from tiltlm.training.acceleration import build_accelerator
from tiltlm.training.callbacks import Callback
from tiltlm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from tiltlm.training.critic import Critic
from tiltlm.training.drawing import Drawer
from tiltlm.training.gradient_noise import measure_spread
from tiltlm.training.guidance import Guidance
from tiltlm.training.interrupt import stop_requests
from tiltlm.training.metrics import StepMetrics, distances, step_metrics
from tiltlm.training.optimizers import build_optimizer, build_scheduler
from tiltlm.training.pass_counter import Passes
from tiltlm.training.progress import Progress
from tiltlm.training.proposal_rules import UNKNOWN_DISTANCES, ProposalRule
from tiltlm.training.replay.schedule import build_reuse
from tiltlm.training.rollout_batch import Batch
from tiltlm.training.scoring import Scorer
from tiltlm.training.state import pack, unpack
from tiltlm.training.surrogate import updates_per_batch

# Seconds of waiting for features in the last step.
WORTH_DRAWING_AHEAD = 0.05


@dataclass(frozen=True)
class Outcome:
    """How training ended: ``done``, or ``interrupted`` by a signal after its checkpoint was written."""

    status: Literal["done", "interrupted"]
    progress: Progress


class Trainer:
    """Tunes the policy of ``roles`` toward ``target``.

    ``base_sample`` holds the samples that the target was fitted on: they set prompts and length, start the estimate of
    log Z and, with ``reuse_fit_samples``, are the first batches. Every drawn sequence counts, these included.
    """

    def __init__(
        self,
        roles: Roles,
        target: Target,
        objective: Objective,
        rule: ProposalRule,
        args: TrainingArguments,
        *,
        base_sample: BaseSample,
        seed: int = 0,
        checkpoint_dir: Path | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.target, self.rule, self.source, self.args = target, rule, rule.first, args
        self.callbacks, self.checkpoint_dir = tuple(callbacks), checkpoint_dir
        self.accelerator = build_accelerator(args, roles.policy.device)
        # An objective that distills needs the guide's law on every batch, whatever proposal the batch came from.
        self.distills = isinstance(objective, Guided)
        # A policy that keeps a guide: by its method, or because the user says so.
        self.keeps = args.keep_guide or getattr(objective, "keeps_guide", False)
        iterations = updates_per_batch(objective, args.num_iterations)
        self.critic = Critic(roles.policy) if isinstance(objective, CriticObjective) else None
        self.roles = roles
        self.parameters = {**roles.trainable(), **(self.critic.parameters() if self.critic else {})}
        optimizer = build_optimizer(self.parameters.values(), args)
        self.scheduler = build_scheduler(optimizer, args)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.passes = Passes()
        self.passes.found(base_sample)
        self.drawer = Drawer(
            roles,
            target,
            base_sample,
            args.batch_size,
            args.reuse_fit_samples,
            seed,
            self.accelerator.autocast,
            args.samples_per_prompt or 1,
        )
        rows_at_once, keep = args.per_device_train_batch_size, iterations > 1 and not self.distills
        self.scorer = Scorer(
            roles, target, objective, self.accelerator, rows_at_once, self.passes, self._timed, self.critic, keep
        )
        # Of every prompt its own, also of those that the fit did not come to.
        self.partition = partition_for(len(base_sample.samples.prompts)).updated(
            base_sample.log_weights(target), base_sample.samples.prompt_ids
        )
        self.guidance: Guidance | None = None
        if self.distills or self.source == "guided" or self.keeps:
            with roles.use("base") as base:
                twist = ValueFunction.of(base, target, base_sample)
                if self.distills or self.source == "guided":
                    log_z = self.partition.at(base_sample.samples.prompt_ids)
                    feedback = getattr(objective, "feedback", 0.0)
                    self.guidance = Guidance(base, target, base_sample, twist, feedback, log_z)
            if self.keeps and self.guidance is None:
                roles.policy.keep(twist.toward(target, base_sample))
            self.keep_guide()
            for _ in range(twist.forward_passes):
                self.passes.read(base_sample.samples)
        self.reuse = build_reuse(args, iterations, rule, seed, base_sample.samples, self.scorer, self.guidance)
        self.step = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.spent = self.waited = 0.0

    def train(self) -> Outcome:
        """Run to ``max_steps``, from the latest checkpoint if ``resume`` loaded one; stop early on a signal."""
        began, before = time.monotonic(), self.spent
        with stop_requests() as requested:
            while self.step < self.args.max_steps:
                metrics = self.train_step()
                self.spent = before + time.monotonic() - began
                self._report(metrics)
                stop = requested() is not None
                if stop or (self.args.save_steps and self.step % self.args.save_steps == 0):
                    self.save()
                if stop:
                    return Outcome("interrupted", self.progress)
        return Outcome("done", self.progress)

    def train_step(self) -> StepMetrics:
        """The optimizer steps on one batch, and what the batch says of policy and target before them."""
        self.waited = self.seconds["features"]
        self.seconds.clear()
        self.step += 1
        try:
            return self._train_on(self.draw())
        except NumericalError as error:
            raise NumericalError(f"step {self.step}: {error}") from error

    def _train_on(self, batch: Batch) -> StepMetrics:
        # A batch must not normalize itself: that would correlate Z with the weights that it divides.
        before = self.partition
        log_z = before.at(batch.samples.prompt_ids)
        batch, record = self.scorer.assess(batch, log_z)
        few = self.args.gradient_samples
        spread = measure_spread(self.scorer, batch, log_z, self._teacher, few) if few else None
        scores = self.pull(batch, log_z)
        if not batch.reused:
            self.partition = self._with(scores)
        self.reuse.add(batch)
        metrics = replace(step_metrics(scores, batch.features, self.target, self.partition), spread=spread)
        moved = self._follow(batch, scores)
        if self.guidance:
            self.guidance.follow(scores, batch.features)
            self.keep_guide()
        rate = float(self.scheduler.get_last_lr()[0])
        norm = self.update()
        for again, log_z in self.reuse.after(batch, metrics.kl_p_pi.value, before, self.scorer.objective):
            self.pull(again, log_z)
            self.update(schedule=False)
        self.scorer.adapt(record)
        return metrics.completed(self.progress, norm, rate, batch.source, moved, self.seconds, self.reuse.metrics)

    def keep_guide(self) -> None:
        """Let a policy that keeps a guide have the method's own, as it leans now."""
        if self.keeps and self.guidance:
            self.roles.policy.keep(self.guidance.guide)

    def draw(self) -> Batch:
        """The next batch: fit samples while they last, then fresh samples of the proposal, with their features."""
        with self._timed("sample"):
            batch = self.drawer.next(self.source, self._guide)
            # Ahead only where features take their time, and where nothing in this step can change the proposal.
            steady = self.source != "policy" and not (self.guidance and self.guidance.feedback)
            if self.waited > WORTH_DRAWING_AHEAD and steady and not self.rule.due(self.step) and not self.is_last_step:
                self.drawer.look_ahead(batch, self.source, self._guide)
        if not batch.reused:
            self.passes.drew(batch.samples)
        return batch

    @property
    def _guide(self) -> Guide | None:
        return self.guidance.guide if self.guidance and self.source == "guided" else None

    @property
    def _teacher(self) -> Guide | None:
        return self.guidance.guide if self.guidance and self.distills else None

    def _with(self, scores: Scores) -> Partition | PromptPartition:
        """What is known of log Z with these samples."""
        assert scores.prompt_ids is not None
        return self.partition.updated(scores.target_logscore - scores.proposal_logprob, scores.prompt_ids)

    def pull(self, batch: Batch, log_z: float | Tensor) -> Scores:
        """Score the batch and accumulate the gradient of −mean(c · log π); ``log_z`` is one number or one a row [N]."""
        self.passes.train(batch.samples)
        scores = self.scorer.pull(batch, log_z, self._teacher)
        self.scorer.balance.settle()
        return scores

    def update(self, *, schedule: bool = True) -> float:
        """Clip, step the optimizer and the schedule, clear the gradient; returns its norm before clipping."""
        with self._timed("step"):
            return self._update(schedule)

    def _update(self, schedule: bool) -> float:
        limit = self.args.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))
        scaler = self.accelerator.scaler
        # Loss scaling skips steps that overflow and lowers the scale; below 1 it is not the scale that overflows.
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise NumericalError("the gradient is not finite; lower training.learning_rate")
        self.optimizer.step()
        if schedule and not self.accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _follow(self, batch: Batch, scores: Scores) -> bool:
        """Ask the rule whether q becomes π as it is before this step's update."""
        if not self.rule.due(self.step):
            return False
        # While fit samples last, q may be another law than theirs, and they do not tell how far it is from the target.
        pieces = [scores] if batch.source == self.source else []
        if self.rule.extra_batches:
            pieces = [self.scorer.score_possible(self._extra_batch()) for _ in range(self.rule.extra_batches)]
            for piece in pieces:
                self.partition = self._with(piece)
        known = distances(Scores.concatenate(pieces), self.partition) if pieces else UNKNOWN_DISTANCES
        if not self.rule.replaces(known):
            return False
        self.roles.keep_proposal()
        self.source = f"step {self.step}"
        return True

    def _extra_batch(self) -> Batch:
        with self._timed("sample"):
            batch = self.drawer.fresh(self.source, self._guide)
        self.passes.drew(batch.samples)
        return batch

    @property
    def is_last_step(self) -> bool:
        return self.step >= self.args.max_steps

    @property
    def progress(self) -> Progress:
        passes = self.passes
        spent = passes.sequences, passes.forward_passes, self.spent, passes.per_trained_token
        return Progress(self.step, self.args.max_steps, *spent)

    def _report(self, metrics: StepMetrics) -> None:
        for callback in self.callbacks:
            callback.on_step_end(self.progress, metrics)
            if self.step % self.args.logging_steps == 0 or self.step == self.args.max_steps:
                callback.on_log(self.progress, metrics)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        if self.checkpoint_dir is None:
            return
        path = save_checkpoint(self.checkpoint_dir, self.step, *pack(self))
        for callback in self.callbacks:
            callback.on_save(self.progress, path)

    def resume(self) -> bool:
        """Load the latest checkpoint, if there is one, and say whether there was."""
        path = latest_checkpoint(self.checkpoint_dir) if self.checkpoint_dir is not None else None
        if path is None:
            return False
        try:
            unpack(self, *load_checkpoint(path))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run: {error!r}. Delete that folder to resume from the one before "
                f"it, or start anew in another output directory."
            ) from error
        return True
