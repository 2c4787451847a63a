"""The one loop: sample, score, pull, step, learn."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm.errors import CheckpointError, NumericalError
from tiltlm.estimation import Partition
from tiltlm.lm import Law, Roles, Samples, token_logprob
from tiltlm.objectives import Guided, Objective
from tiltlm.targets import Target
from tiltlm.targets.constrain import BaseSample, measure_samples
from tiltlm.training.acceleration import build_accelerator
from tiltlm.training.arguments import TrainingArguments
from tiltlm.training.batch import Batch, FitSampleQueue, in_turn
from tiltlm.training.callbacks import Callback, Progress
from tiltlm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from tiltlm.training.guidance import Guidance
from tiltlm.training.interrupt import stop_requests
from tiltlm.training.metrics import Scores, StepMetrics, distances, step_metrics
from tiltlm.training.optimizers import build_optimizer, build_scheduler
from tiltlm.training.proposal import UNKNOWN_DISTANCES, ProposalRule
from tiltlm.training.pulling import pull_chunk
from tiltlm.training.state import pack, unpack


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
        self.target, self.objective, self.rule, self.args = target, objective, rule, args
        self.callbacks, self.checkpoint_dir = tuple(callbacks), checkpoint_dir
        self.prompts, self.max_completion_length = base_sample.samples.prompts, base_sample.max_completion_length
        self.accelerator = build_accelerator(args, roles.policy.device)
        self.roles, self.parameters = roles, roles.trainable()
        optimizer = build_optimizer(self.parameters.values(), args)
        self.scheduler = build_scheduler(optimizer, args)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.generator = torch.Generator(roles.policy.device).manual_seed(seed)
        logprob = base_sample.samples.sequence_logprob.cpu()
        self.partition = Partition.empty().updated(target.log_score(logprob, base_sample.features) - logprob)
        self.queue = FitSampleQueue(base_sample if args.reuse_fit_samples else None)
        self.source = rule.first
        # An objective that distills needs the guide's law on every batch, whatever proposal the batch came from.
        self.distills = isinstance(objective, Guided)
        self.guidance: Guidance | None = None
        if self.distills or self.source == "guided":
            with roles.use("base") as base:
                self.guidance = Guidance(base, target, base_sample, getattr(objective, "feedback", 0.0))
        self.step = 0
        self.sequences = self.forward_passes = len(base_sample.samples)
        self.seconds: dict[str, float] = defaultdict(float)
        self.spent = 0.0

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
        """One optimizer step on one batch, and what the batch says of policy and target before that step."""
        self.seconds.clear()
        self.step += 1
        batch = self.draw()
        # A batch must not normalize itself: that would correlate Z with the weights that it divides.
        try:
            scores = self.pull(batch, self.partition.log_z.value)
        except NumericalError as error:
            raise NumericalError(f"step {self.step}: {error}") from error
        if not batch.reused:
            self.partition = self.partition.updated(scores.target_logscore - scores.proposal_logprob)
        metrics = step_metrics(scores, batch.features, self.target, self.partition)
        replaced = self._follow(batch, scores)
        if self.guidance:
            self.guidance.follow(scores, batch.features)
        rate = float(self.scheduler.get_last_lr()[0])
        with self._phase("step"):
            norm = self.update()
        return metrics.completed(self.progress, norm, rate, batch.source, replaced, dict(self.seconds))

    def draw(self) -> Batch:
        """The next batch: fit samples while they last, then fresh samples of the proposal, with their features."""
        reused = self.queue.next(self.args.batch_size)
        return reused if reused is not None else self._fresh_batch()

    def _fresh_batch(self) -> Batch:
        role: Any = {"base": "base", "guided": "base", "policy": "policy"}.get(self.source, "proposal")
        guide = self.guidance.guide if self.guidance and self.source == "guided" else None
        with self._phase("sample"), self.roles.use(role) as model, self.accelerator.autocast():
            samples = model.sample(
                self.args.batch_size,
                in_turn(self.prompts, self.sequences),
                generator=self.generator,
                max_completion_length=self.max_completion_length,
                guide=guide,
            ).trimmed()
        self.sequences += len(samples)
        self.forward_passes += len(samples)
        with self._phase("features"):
            return Batch(samples, measure_samples(self.target.features, samples), self.source)

    def pull(self, batch: Batch, log_z: float, *, backward: bool = True) -> Scores:
        """Score the batch and accumulate the gradient of −mean(c · log π), in chunks that do not change the result."""
        n = len(batch.samples)
        parts = []
        order = self.roles.policy.chunks(batch.samples, self.args.per_device_train_batch_size)
        for rows in order:
            chunk, features = batch.samples.select(rows).trimmed(), batch.features[rows.cpu()]
            base_tokens, base_law = self._base_scores(chunk, batch)
            with self._phase("policy"), torch.set_grad_enabled(backward):
                with self.accelerator.autocast():
                    law = self.roles.policy.log_probabilities(chunk, Law())
                scores = Scores.of(chunk, token_logprob(law, chunk), law, base_tokens, base_law)
                scores = scores.with_target(self.target.log_score(scores.base_logprob.cpu(), features))
                if backward:
                    guide = self.guidance.guide if self.guidance and self.distills else None
                    pulled = pull_chunk(self.objective, chunk, scores, law, base_law, guide, log_z)
                    self.accelerator.backward(-pulled.sum() / n)
            parts.append(scores)
        self.forward_passes += n if batch.from_base and not self.distills else 2 * n
        return Scores.concatenate(parts, torch.cat(order).argsort())

    def _base_scores(self, chunk: Samples, batch: Batch) -> tuple[Tensor, Tensor | None]:
        if batch.from_base and not self.distills:
            return chunk.proposal_logprob, None
        with self._phase("base"), torch.no_grad(), self.roles.use("base") as model:
            with self.accelerator.autocast():
                law = model.log_probabilities(chunk, Law())
            return token_logprob(law, chunk), law

    def update(self) -> float:
        """Clip, step the optimizer and the schedule, clear the gradient; returns its norm before clipping."""
        limit = self.args.max_grad_norm or math.inf
        norm = float(self.accelerator.clip_grad_norm_(list(self.parameters.values()), limit))
        scaler = self.accelerator.scaler
        # Loss scaling skips steps that overflow and lowers the scale; below 1 it is not the scale that overflows.
        if not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            raise NumericalError(f"step {self.step}: the gradient is not finite; lower training.learning_rate")
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:
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
            pieces = [self.pull(self._fresh_batch(), 0.0, backward=False) for _ in range(self.rule.extra_batches)]
            for piece in pieces:
                self.partition = self.partition.updated(piece.target_logscore - piece.proposal_logprob)
        known = distances(Scores.concatenate(pieces), self.partition) if pieces else UNKNOWN_DISTANCES
        if not self.rule.replaces(known):
            return False
        self.roles.keep_proposal()
        self.source = f"step {self.step}"
        return True

    @property
    def progress(self) -> Progress:
        return Progress(self.step, self.args.max_steps, self.sequences, self.forward_passes, self.spent)

    def _report(self, metrics: StepMetrics) -> None:
        for callback in self.callbacks:
            callback.on_step_end(self.progress, metrics)
            if self.step % self.args.logging_steps == 0 or self.step == self.args.max_steps:
                callback.on_log(self.progress, metrics)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
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
