"""The drawer: where the next batch comes from. Features are measured while the models are busy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch

from tiltlm.config.training import TrainingArguments
from tiltlm.features import Feature
from tiltlm.lm import Guide, Roles
from tiltlm.lm.roles import Role
from tiltlm.rollouts import LocalRollouts, RolloutsOf
from tiltlm.rollouts.proposal import BASE, GUIDED, POLICY, Proposal
from tiltlm.targets import BaseSample
from tiltlm.targets.base_sample import measure_samples
from tiltlm.training.pass_counter import PassCounter
from tiltlm.training.rollout_batch import FitSampleQueue, RolloutBatch, prompts_in_turn

# The model that draws the samples of each proposal; every other proposal is an earlier policy, kept by the roles.
ROLES: dict[Proposal, Role] = {BASE: "base", GUIDED: "base", POLICY: "policy"}


class Drawer:
    """Hands out batches in an order that depends on ``seed`` alone: fit samples first, then samples of ``proposal``.

    A worker thread measures features. While it is busy the next batch can be drawn ahead, if it would be drawn from the
    same proposal. A batch drawn ahead counts, and is part of the state, only once it is handed out.
    """

    def __init__(
        self,
        roles: Roles,
        features: list[Feature],
        base_sample: BaseSample,
        args: TrainingArguments,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        counter: PassCounter,
    ) -> None:
        self.roles, self.features, self.autocast, self.counter = roles, features, autocast, counter
        self.batch_size, self.samples_per_prompt = args.batch_size, args.samples_per_prompt or 1
        self.prompts, self.max_completion_length = base_sample.samples.prompts, base_sample.max_completion_length
        self.queue = FitSampleQueue(base_sample if args.reuse_fit_samples else None)
        self.generator = torch.Generator(roles.policy.device).manual_seed(seed)
        self.proposal = POLICY
        # What draws the samples of a model.
        self.rollouts: RolloutsOf = LocalRollouts
        self.worker = WorkerThread()
        self.ahead: RolloutBatch | None = None
        self.generator_before_ahead: torch.Tensor | None = None

    def next(self, guide: Guide | None) -> RolloutBatch:
        """The next batch: fit samples while they last, then fresh samples. ``guide`` is the one in force."""
        return self.queue.next(self.batch_size) or self.fresh(guide)

    def fresh(self, guide: Guide | None) -> RolloutBatch:
        """Fresh samples of the proposal, drawn now unless they were drawn ahead."""
        batch, self.ahead, self.generator_before_ahead = self.ahead, None, None
        batch = batch or self._draw(guide)
        self.counter.count_drawn(batch.samples)
        return batch

    def look_ahead(self, batch: RolloutBatch, guide: Guide | None) -> None:
        """Draw the batch after ``batch`` while the features of that one are still being measured."""
        if self.ahead is None and not batch.is_measured and not self.queue.holds(self.batch_size):
            state = self.generator.get_state()
            self.ahead = self._draw(guide)
            self.generator_before_ahead = state

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next batch depends on, for a checkpoint; a batch drawn ahead is drawn again."""
        before = self.generator_before_ahead
        return {
            "queue": self.queue.state_dict(),
            "generator": before if before is not None else self.generator.get_state(),
            "proposal": str(self.proposal),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.queue.load_state_dict(state["queue"])
        self.generator.set_state(state["generator"])
        self.proposal = Proposal.parse(state["proposal"])
        self.ahead = self.generator_before_ahead = None

    def _draw(self, guide: Guide | None) -> RolloutBatch:
        with self.roles.use(ROLES.get(self.proposal, "proposal")) as model, self.autocast():
            samples = (
                self.rollouts(model)
                .generate(
                    prompts_in_turn(self.prompts, self.counter.sequences, self.batch_size, self.samples_per_prompt),
                    self.batch_size,
                    generator=self.generator,
                    samples_per_prompt=self.samples_per_prompt,
                    max_completion_length=self.max_completion_length,
                    guide=guide,
                )
                .trimmed()
            )
        return RolloutBatch(samples, self.worker.submit(measure_samples, self.features, samples), self.proposal)


class WorkerThread:
    """Calls functions in turn in daemon threads, which do not keep the process from ending."""

    def __init__(self) -> None:
        self.last: threading.Thread | None = None

    def submit(self, function: Callable[..., torch.Tensor], *args: Any) -> Future[torch.Tensor]:
        """A future of what the function returns or raises."""
        found: Future[torch.Tensor] = Future()
        before = self.last

        def call() -> None:
            if before is not None:
                before.join()
            try:
                found.set_result(function(*args))
            except BaseException as error:
                found.set_exception(error)

        self.last = threading.Thread(target=call, name="features", daemon=True)
        self.last.start()
        return found
