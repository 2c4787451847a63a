"""The training loop: draw, score, accumulate the gradient, update, follow."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from tiltlm.config.training import TrainingArguments
from tiltlm.errors import CheckpointError, NumericalError
from tiltlm.estimation import partition_for
from tiltlm.guides import estimate_values
from tiltlm.lm import Guide, Roles
from tiltlm.rollouts.proposal import GUIDED, POLICY, Proposal
from tiltlm.targets import BaseSample, Target
from tiltlm.training.acceleration import build_accelerator
from tiltlm.training.callbacks import Callback
from tiltlm.training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from tiltlm.training.critic import Critic
from tiltlm.training.drawer import Drawer
from tiltlm.training.forward_passes import ForwardPasses
from tiltlm.training.gradient_noise import measure_gradient_noise
from tiltlm.training.guidance import Guidance
from tiltlm.training.interrupt import stop_requests
from tiltlm.training.method import Method
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.optimizers import build_optimizer, build_scheduler
from tiltlm.training.pass_counter import PassCounter
from tiltlm.training.progress import Progress
from tiltlm.training.proposal_rules import UNKNOWN_DISTANCES
from tiltlm.training.ranks import Ranks
from tiltlm.training.replay.schedule import build_replay, check_pool
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.scoring import Scorer
from tiltlm.training.surrogate import updates_per_batch
from tiltlm.training.timer import Timer
from tiltlm.training.whole_batch import WholeBatch

if TYPE_CHECKING:
    from accelerate import Accelerator

# Drawing ahead pays off if the last step waited longer than this for features, in seconds.
WORTH_DRAWING_AHEAD = 0.05


@dataclass(frozen=True)
class Outcome:
    """How training ended: ``done``, or ``interrupted`` by a signal after its checkpoint was written."""

    status: Literal["done", "interrupted"]
    progress: Progress


class Trainer:
    """Tunes the policy of ``roles`` toward ``target``.

    ``base_sample`` holds the samples that the target was fitted on. They set prompts and length, start the estimate of
    log Z and, with ``reuse_fit_samples``, are the first batches. Raises UsageError for arguments that do not fit the
    method.
    """

    def __init__(
        self,
        roles: Roles,
        target: Target,
        method: Method,
        args: TrainingArguments,
        *,
        base_sample: BaseSample,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        objective = method.objective
        self.roles, self.target, self.rule, self.args = roles, target, method.rule, args
        self.callbacks: list[Callback] = []
        # Where save and resume keep checkpoints; None: nowhere.
        self.checkpoint_dir: Path | None = None
        self.iterations = updates_per_batch(objective, args.num_iterations)
        check_pool(args, self.iterations, objective, method.rule)
        self.accelerator = accelerator or build_accelerator(args, roles.policy.device)
        self.ranks, self.timer, self.counter = Ranks(), Timer(), PassCounter()
        self.counter.count_fit(base_sample)
        critic = Critic(roles.policy) if objective.has_critic else None
        self.parameters = {**roles.trainable(), **(critic.parameters() if critic else {})}
        optimizer = build_optimizer(self.parameters.values(), args)
        self.scheduler = build_scheduler(optimizer, args)
        self.optimizer = self.accelerator.prepare(optimizer)
        autocast = self.accelerator.autocast
        self.drawer = Drawer(roles, list(target.features), base_sample, args, seed, autocast, self.counter)
        self.drawer.proposal = method.rule.first
        rows_at_once = args.per_device_train_batch_size
        passes = ForwardPasses(roles, self.accelerator, rows_at_once, self.counter, self.timer)
        # A guide's distillation reads the base in every pass anyway.
        keeps_base = self.iterations > 1 and not objective.distills
        self.scorer = Scorer(passes, target, objective, self.ranks, critic, keeps_base=keeps_base)
        # Over all prompts, also those that the fit did not reach.
        empty = partition_for(len(base_sample.samples.prompts))
        self.partition = empty.updated(base_sample.log_weights(target), base_sample.samples.prompt_ids)
        # A policy keeps a guide by its method, or because the user asks for it.
        self.keeps_guide = args.keep_guide or objective.keeps_guide
        self.guidance = self._build_guidance(base_sample)
        self.replay = build_replay(args, self.iterations, seed, base_sample.samples, self.scorer, self.guidance)
        self.step = 0
        self.seconds_spent = self.waited = 0.0

    def _build_guidance(self, base_sample: BaseSample) -> Guidance | None:
        """The guide in force, where the method samples from one or distills it; the policy's own guide beside it."""
        objective = self.scorer.objective
        in_force = objective.distills or self.drawer.proposal == GUIDED
        if not (in_force or self.keeps_guide):
            return None
        with self.roles.use("base") as base:
            values = estimate_values(base, self.target, base_sample)
            guidance: Guidance | None = None
            if in_force:
                log_z = self.partition.at(base_sample.samples.prompt_ids)
                guidance = Guidance(base, self.target, base_sample, values, objective.moment_feedback, log_z)
        if self.keeps_guide:
            self.roles.policy.keep(guidance.guide if guidance else values.guide_toward(self.target, base_sample))
        for _ in range(values.forward_passes):
            self.counter.count_pass(base_sample.samples)
        return guidance

    def add_callback(self, callback: Callback) -> None:
        """Call this object's methods as training goes on, after those of earlier callbacks."""
        self.callbacks.append(callback)

    def train(self) -> Outcome:
        """Train up to ``max_steps``, from the checkpoint if ``resume`` loaded one; stop early on a signal."""
        began, before = time.monotonic(), self.seconds_spent
        with stop_requests() as requested:
            while self.step < self.args.max_steps:
                metrics = self.train_step()
                self.seconds_spent = before + time.monotonic() - began
                self._report(metrics)
                stop = requested() is not None
                if stop or (self.args.save_steps and self.step % self.args.save_steps == 0):
                    self.save()
                if stop:
                    return Outcome("interrupted", self.progress)
        return Outcome("done", self.progress)

    def train_step(self) -> StepMetrics:
        """The updates on one batch, and the estimates that the batch gave before them."""
        self.waited = self.timer.seconds["features"]
        self.timer.clear()
        self.step += 1
        try:
            return self._train_on(self.draw())
        except NumericalError as error:
            raise NumericalError(f"step {self.step}: {error}") from error

    def _train_on(self, batch: RolloutBatch) -> StepMetrics:
        # A batch must not normalize itself: Z would be correlated with the weights that it divides.
        before = self.partition
        log_z = before.at(batch.samples.prompt_ids)
        batch, record = self.scorer.assess(batch, log_z)
        few = self.args.gradient_samples
        noise = measure_gradient_noise(self.scorer, batch, log_z, self._distilled_guide, few) if few else None
        whole = self.accumulate(batch, log_z)
        if not batch.reused:
            self.partition = whole.added_to(self.partition)
        self.replay.add(batch)
        metrics = replace(whole.metrics(self.target, self.partition), noise=noise)
        updated = self._follow(batch, whole)
        if self.guidance:
            self.guidance.follow(whole)
            self._keep_guide()
        rate = float(self.scheduler.get_last_lr()[0])
        norm = self.update()
        for again, log_z in self.replay.after(batch, metrics.kl_p_pi.value, before, self.scorer.objective):
            self.accumulate(again, log_z)
            self.update(schedule=False)
        self.scorer.adapt(record)
        seconds, pool = self.timer.seconds, self.replay.metrics
        return metrics.completed(self.progress, norm, rate, str(batch.proposal), updated, seconds, pool)

    def draw(self) -> RolloutBatch:
        """The next batch: fit samples while they last, then fresh samples of the proposal."""
        with self.timer("sample"):
            batch = self.drawer.next(self._proposal_guide)
            # Ahead only where features are slow, and where nothing in this step can change the proposal.
            steady = self.drawer.proposal != POLICY and not (self.guidance and self.guidance.feedback)
            slow = self.waited > WORTH_DRAWING_AHEAD
            if slow and steady and not self.rule.due(self.step) and self.step < self.args.max_steps:
                self.drawer.look_ahead(batch, self._proposal_guide)
        return batch

    @property
    def _proposal_guide(self) -> Guide | None:
        """The guide that samples are drawn with."""
        return self.guidance.guide if self.guidance and self.drawer.proposal == GUIDED else None

    @property
    def _distilled_guide(self) -> Guide | None:
        """The guide that every batch is scored with, whatever proposal drew it."""
        return self.guidance.guide if self.guidance and self.scorer.objective.distills else None

    def _keep_guide(self) -> None:
        """Give a policy that keeps a guide the one that is in force now."""
        if self.keeps_guide and self.guidance:
            self.roles.policy.keep(self.guidance.guide)

    def accumulate(self, batch: RolloutBatch, log_z: float | Tensor) -> WholeBatch:
        """Score the batch and add the gradient of its mean surrogate loss; ``log_z`` is one number or one a row [N]."""
        self.counter.count_trained(batch.samples)
        scores = self.scorer.accumulate(batch, log_z, self._distilled_guide)
        self.scorer.minimum_variance.settle(self.ranks.total)
        whole = WholeBatch.gather(self.ranks, scores, batch.features)
        if not self.scorer.objective.batchwise:
            self.scorer.adapt(whole.record(log_z))
        return whole

    def update(self, *, schedule: bool = True) -> float:
        """Clip, step the optimizer and the schedule, clear the gradient; returns its norm before clipping."""
        with self.timer("step"):
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

    def _follow(self, batch: RolloutBatch, whole: WholeBatch) -> bool:
        """Make the policy, as it is before this step's update, the proposal if the rule says so."""
        if not self.rule.due(self.step):
            return False
        # Fit samples may be of another distribution than the proposal; then they do not measure its distance.
        pieces = [whole] if batch.proposal == self.drawer.proposal else []
        if self.rule.extra_batches:
            pieces = [self._extra_batch() for _ in range(self.rule.extra_batches)]
            for piece in pieces:
                self.partition = piece.added_to(self.partition)
        known = WholeBatch.concatenate(pieces).distances(self.partition) if pieces else UNKNOWN_DISTANCES
        if not self.rule.replaces(known):
            return False
        self.roles.keep_proposal()
        self.drawer.proposal = Proposal("earlier", self.step)
        return True

    def _extra_batch(self) -> WholeBatch:
        """A fresh batch for the proposal rule alone."""
        with self.timer("sample"):
            batch = self.drawer.fresh(self._proposal_guide)
        return WholeBatch.gather(self.ranks, self.scorer.score_in_support(batch))

    @property
    def progress(self) -> Progress:
        """Where the run is."""
        counter = self.counter
        spent = counter.sequences, counter.forward_passes, self.seconds_spent, counter.per_trained_token
        return Progress(self.step, self.args.max_steps, *spent)

    def _report(self, metrics: StepMetrics) -> None:
        for callback in self.callbacks:
            callback.on_step_end(self.progress, metrics)
            if self.step % self.args.logging_steps == 0 or self.step == self.args.max_steps:
                callback.on_log(self.progress, metrics)

    def save(self) -> None:
        """Write a checkpoint of everything that the next step depends on."""
        if self.checkpoint_dir is None:
            return
        path = save_checkpoint(self.checkpoint_dir, self.step, self.state_dict())
        for callback in self.callbacks:
            callback.on_save(self.progress, path)

    def resume(self) -> bool:
        """Load the latest checkpoint; returns whether there was one. Raises CheckpointError if it does not fit."""
        path = latest_checkpoint(self.checkpoint_dir) if self.checkpoint_dir is not None else None
        if path is None:
            return False
        try:
            self.load_state_dict(load_checkpoint(path))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run: {error!r}. Delete that folder to resume from the one before "
                f"it, or start anew in another output directory."
            ) from error
        return True

    def state_dict(self) -> dict[str, Any]:
        """The trainer's own state and that of its parts: all that the next step depends on."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "seconds": self.seconds_spent,
            "policy": {name: p.detach() for name, p in self.parameters.items()},
            "kept_proposal": self.roles.proposal_state(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "objective": self.scorer.objective.state_dict(),
            "minimum_variance": self.scorer.minimum_variance.state_dict(),
            "partition": self.partition.to_json(),
            "counter": self.counter.state_dict(),
            "drawer": self.drawer.state_dict(),
            "guidance": self.guidance.state_dict() if self.guidance else None,
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint. Raises KeyError, ValueError or RuntimeError where it does not fit."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["policy"][name])
        if state["kept_proposal"] is not None:
            self.roles.load_proposal_state(state["kept_proposal"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.scorer.objective = self.scorer.objective.with_state_dict(state["objective"])
        self.scorer.minimum_variance.load_state_dict(state["minimum_variance"])
        self.partition = type(self.partition).from_json(state["partition"])
        self.counter.load_state_dict(state["counter"])
        self.drawer.load_state_dict(state["drawer"])
        self.replay.load_state_dict(state["replay"])
        if self.guidance:
            self.guidance.load_state_dict(state["guidance"])
            self._keep_guide()
        self.step, self.seconds_spent = state["step"], state["seconds"]
