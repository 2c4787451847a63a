"""A batch: samples with what is measured on them, and where they come from."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.lm import Prompts, Samples
from tiltlm.targets.constrain import BaseSample


@dataclass(frozen=True)
class Batch:
    """N samples of the proposal with their ``measured`` features, and the ``source``: the name of that proposal.

    ``reused`` are samples that the target was fitted on, so that log Z has counted them already.
    """

    samples: Samples
    measured: Tensor | Future[Tensor]
    source: str
    reused: bool = False

    @property
    def features(self) -> Tensor:
        """Feature values [N, K] on the CPU; waits for them where they are still being measured."""
        return self.measured.result() if isinstance(self.measured, Future) else self.measured

    @property
    def is_measured(self) -> bool:
        """Whether ``features`` would not wait."""
        return not isinstance(self.measured, Future) or self.measured.done()

    @property
    def from_base(self) -> bool:
        """Whether the sampler's log-probabilities are the base's own."""
        return self.source == "base"


def in_turn(prompts: Prompts, drawn: int, n: int) -> Prompts:
    """The prompts of ``n`` sequences after ``drawn`` others, the next one first, so that small batches use all."""
    count = len(prompts)
    return prompts.select([(drawn + i) % count for i in range(min(n, count))])


@dataclass
class FitSampleQueue:
    """The base samples that the target was fitted on, handed out once in full batches, in order."""

    base_sample: BaseSample | None
    position: int = 0

    def holds(self, size: int) -> bool:
        """Whether it has another ``size`` rows."""
        return self.base_sample is not None and self.position + size <= len(self.base_sample.samples)

    def next(self, size: int) -> Batch | None:
        """The next ``size`` rows as a batch from the base, or None when fewer are left."""
        if self.base_sample is None or not self.holds(size):
            return None
        rows = torch.arange(self.position, self.position + size)
        self.position += size
        samples = self.base_sample.samples.select(rows.to(self.base_sample.samples.tokens.device)).trimmed()
        return Batch(samples, self.base_sample.features[rows], "base", reused=True)
