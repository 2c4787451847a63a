"""What a run has cost: sequences drawn, forward passes, tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from tiltlm.lm import Samples
from tiltlm.targets import BaseSample


@dataclass
class PassCounter:
    """Counts since the start of a run.

    ``sequences`` were drawn. ``forward_passes`` are sequences times models, sampling included. ``tokens`` are the
    sampled tokens of these passes, without padding. ``trained`` are the tokens of batches that the policy trained on.
    """

    sequences: int = 0
    forward_passes: int = 0
    tokens: int = 0
    trained: int = 0

    def count_drawn(self, samples: Samples) -> None:
        """Count samples that were drawn: one pass each."""
        self.sequences += len(samples)
        self.count_pass(samples)

    def count_fit(self, sample: BaseSample) -> None:
        """Count the samples of a fit; further passes of the fit count with the samples' mean length."""
        self.count_drawn(sample.samples)
        self.forward_passes += sample.forward_passes
        self.tokens += round(sample.forward_passes * float(sample.samples.mask.sum()) / len(sample.samples))

    def count_pass(self, samples: Samples) -> None:
        """Count one pass of base or policy over these samples."""
        self.forward_passes += len(samples)
        self.tokens += int(samples.mask.sum())

    def count_trained(self, samples: Samples) -> None:
        """Count samples that the policy is trained on."""
        self.trained += int(samples.mask.sum())

    @property
    def per_trained_token(self) -> float | None:
        """Passes for each token that the policy was trained on; None before the first."""
        return self.tokens / self.trained if self.trained else None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing within the block."""
        before = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(before)

    def state_dict(self) -> dict[str, int]:
        """All counts, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the counts of a checkpoint."""
        for field in fields(self):
            setattr(self, field.name, int(state[field.name]))
