"""What a run has cost in passes through a model, in sequences and in tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tiltlm.lm import Samples
from tiltlm.targets import BaseSample


@dataclass
class Passes:
    """Counts since the start of a run: sequences drawn, and what went through any model, once for each pass.

    ``tokens`` are sampled tokens without padding, ``trained`` those of batches that the policy was trained on.
    """

    sequences: int = 0
    forward_passes: int = 0
    tokens: int = 0
    trained: int = 0

    def drew(self, samples: Samples) -> None:
        """These were sampled."""
        self.sequences += len(samples)
        self.read(samples)

    def found(self, sample: BaseSample) -> None:
        """A target was fitted on this; sequences that were read beside are counted with the sample's mean length."""
        self.drew(sample.samples)
        self.forward_passes += sample.forward_passes
        self.tokens += round(sample.forward_passes * float(sample.samples.mask.sum()) / len(sample.samples))

    def read(self, samples: Samples) -> None:
        """These went through base or policy."""
        self.forward_passes += len(samples)
        self.tokens += int(samples.mask.sum())

    def train(self, samples: Samples) -> None:
        """The policy is trained on these."""
        self.trained += int(samples.mask.sum())

    @property
    def per_trained_token(self) -> float | None:
        """Passes for each token that the policy was trained on; None before the first."""
        return self.tokens / self.trained if self.trained else None
