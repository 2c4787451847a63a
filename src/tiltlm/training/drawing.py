"""Drawing: where the next batch comes from; features are measured beside the passes of the models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch

from tiltlm.lm import Guide, Roles
from tiltlm.targets import Target
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.training.rollout_batch import Batch, FitSampleQueue, in_turn


class Drawer:
    """Hands out batches in an order that depends on ``seed`` alone: fit samples while they last, then fresh ones.

    Features are measured in a thread beside this one. While it is busy the next batch can be drawn ahead, where that
    would be drawn from the same proposal; ``drawn`` and ``generator_state`` do not count it before it is handed out.
    """

    def __init__(
        self,
        roles: Roles,
        target: Target,
        base_sample: BaseSample,
        batch_size: int,
        reuse_fit_samples: bool,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        samples_per_prompt: int = 1,
    ) -> None:
        self.roles, self.features, self.batch_size, self.autocast = roles, target.features, batch_size, autocast
        self.prompts, self.max_completion_length = base_sample.samples.prompts, base_sample.max_completion_length
        self.queue = FitSampleQueue(base_sample if reuse_fit_samples else None)
        self.generator = torch.Generator(roles.policy.device).manual_seed(seed)
        self.drawn, self.each = len(base_sample.samples), samples_per_prompt
        self.worker = Aside()
        self.ahead: Batch | None = None
        self.generator_before_ahead: torch.Tensor | None = None

    def next(self, source: str, guide: Guide | None) -> Batch:
        """Fit samples while they last, then fresh samples of the proposal."""
        return self.queue.next(self.batch_size) or self.fresh(source, guide)

    def fresh(self, source: str, guide: Guide | None) -> Batch:
        """Fresh samples of the proposal, drawn now unless they were drawn ahead."""
        batch, self.ahead, self.generator_before_ahead = self.ahead, None, None
        batch = batch or self._draw(source, guide)
        self.drawn += len(batch.samples)
        return batch

    def look_ahead(self, batch: Batch, source: str, guide: Guide | None) -> None:
        """Draw the batch after ``batch`` while the features of that one are still being measured."""
        if self.ahead is None and not batch.is_measured and not self.queue.holds(self.batch_size):
            state = self.generator.get_state()
            self.ahead = self._draw(source, guide)
            self.generator_before_ahead = state

    @property
    def generator_state(self) -> torch.Tensor:
        """The state from which all batches that are still to be handed out follow."""
        before = self.generator_before_ahead
        return before if before is not None else self.generator.get_state()

    def restore(self, generator_state: torch.Tensor, position: int, drawn: int) -> None:
        """Go on from what a checkpoint holds."""
        self.generator.set_state(generator_state)
        self.queue.position, self.drawn = position, drawn
        self.ahead = self.generator_before_ahead = None

    def _draw(self, source: str, guide: Guide | None) -> Batch:
        role: Any = {"base": "base", "guided": "base", "policy": "policy"}.get(source, "proposal")
        with self.roles.use(role) as model, self.autocast():
            samples = model.sample(
                self.batch_size,
                in_turn(self.prompts, self.drawn, self.batch_size, self.each),
                generator=self.generator,
                samples_per_prompt=self.each,
                max_completion_length=self.max_completion_length,
                guide=guide,
            ).trimmed()
        return Batch(samples, self.worker.submit(measure_samples, self.features, samples), source)


class Aside:
    """Calls functions one after the other beside the main thread; none of them keeps the process from ending."""

    def __init__(self) -> None:
        self.last: threading.Thread | None = None

    def submit(self, function: Callable[..., torch.Tensor], *args: Any) -> Future[torch.Tensor]:
        """What the function will have returned, or raised."""
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
