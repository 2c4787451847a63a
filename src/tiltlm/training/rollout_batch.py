"""A batch: samples with what is measured on them, and where they come from."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.lm import Prompts, Samples
from tiltlm.targets.base_sample import BaseSample


@dataclass(frozen=True)
class Assessment:
    """What was found out about a whole batch before any update on it; None where nobody asked.

    ``advantage`` is [N] or [N, T]; ``base`` and ``policy``, log-probabilities until the policy changes, ``values`` and
    ``returns`` are [N, T].
    """

    advantage: Tensor | None = None
    base: Tensor | None = None
    policy: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """N samples of the proposal with their ``measured`` features, and the ``source``: the name of that proposal.

    ``reused`` are samples that the target was fitted on, so that log Z has counted them already. With a ``base_share``
    the samples, however each was drawn, count as drawn from the mixture of base and guided base with that share; with a
    ``mixture`` [N] as drawn from the law that has these log-probabilities of whole sequences, on the CPU.
    """

    samples: Samples
    measured: Tensor | Future[Tensor]
    source: str
    reused: bool = False
    assessment: Assessment | None = None
    base_share: float | None = None
    mixture: Tensor | None = None

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

    @property
    def base_logprob(self) -> Tensor | None:
        """log a of each token [N, T], where it is known without asking the base."""
        if self.from_base:
            return self.samples.proposal_logprob
        return self.assessment.base if self.assessment is not None else None

    @property
    def policy_logprob(self) -> Tensor | None:
        """log π of each token [N, T], where it is known without asking the policy."""
        if self.source == "policy":
            return self.samples.proposal_logprob
        return self.assessment.policy if self.assessment is not None else None

    def after_update(self) -> Batch:
        """The same batch for a policy that has changed since it was drawn and assessed."""
        known = replace(self.assessment, policy=None) if self.assessment is not None else None
        return replace(self, source="an earlier policy" if self.source == "policy" else self.source, assessment=known)


def in_turn(prompts: Prompts, drawn: int, n: int, each: int = 1) -> Prompts:
    """The prompts of ``n`` sequences after ``drawn`` others, the next one first, so that small batches use all.

    Every prompt gets ``each`` sequences before it is the next one's turn.
    """
    count, first = len(prompts), drawn // each
    return prompts.select([(first + i) % count for i in range(min(-(-n // each), count))])


# The proposal of fit samples that not only the base drew.
MIXTURE = "mixture"


@dataclass
class FitSampleQueue:
    """The samples that the target was fitted on, handed out once in full batches.

    In order where they are the base's own; of a mixture of laws in an order that mixes them, the same in every run.
    """

    base_sample: BaseSample | None
    position: int = 0

    def holds(self, size: int) -> bool:
        """Whether it has another ``size`` rows."""
        return self.base_sample is not None and self.position + size <= len(self.base_sample.samples)

    def next(self, size: int) -> Batch | None:
        """The next ``size`` rows as a batch from the base, or None when fewer are left."""
        if self.base_sample is None or not self.holds(size):
            return None
        part = slice(self.position, self.position + size)
        self.position += size
        if self.base_sample.base_logprob is None:
            chosen = self.base_sample.select(torch.arange(part.start, part.stop))
            return Batch(chosen.samples.trimmed(), chosen.features, "base", reused=True)
        mixed = torch.randperm(len(self.base_sample.samples), generator=torch.Generator().manual_seed(0))
        chosen = self.base_sample.select(mixed[part])
        samples = chosen.samples.trimmed()
        assert chosen.base_logprob is not None
        known = Assessment(base=chosen.base_logprob[:, : samples.tokens.shape[1]])
        return Batch(samples, chosen.features, MIXTURE, reused=True, assessment=known)
