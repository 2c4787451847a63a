"""A batch: samples, their features, and the proposal that they were drawn from."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.lm import Prompts, Samples
from tiltlm.rollouts.proposal import BASE, EARLIER, MIXTURE, POLICY, Proposal
from tiltlm.targets import BaseSample


@dataclass(frozen=True)
class Assessment:
    """What is known of a whole batch before any update on it; None where it was not needed.

    ``advantage`` is [N] or [N, T]. ``base`` and ``policy`` [N, T] are log-probabilities of tokens, ``policy`` until the
    policy changes. ``values`` and ``returns`` [N, T] belong to a critic.
    """

    advantage: Tensor | None = None
    base: Tensor | None = None
    policy: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True)
class RolloutBatch:
    """N samples of a proposal with their features [N, K], which may still be measured by a worker thread.

    ``reused`` are samples that the target was fitted on, so log Z has counted them already. With a ``base_share`` all
    samples count as drawn from the mixture of base and guided base with that share. With a ``mixture`` [N], on the CPU,
    they count as drawn from the distribution with these log-probabilities of whole sequences.
    """

    samples: Samples
    measured: Tensor | Future[Tensor]
    proposal: Proposal
    reused: bool = False
    assessment: Assessment | None = None
    base_share: float | None = None
    mixture: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """Feature values [N, K] on the CPU; waits until they are measured."""
        return self.measured.result() if isinstance(self.measured, Future) else self.measured

    @property
    def is_measured(self) -> bool:
        """Whether ``features`` returns at once."""
        return not isinstance(self.measured, Future) or self.measured.done()

    @property
    def from_base(self) -> bool:
        """Whether the base alone drew the samples."""
        return self.proposal == BASE

    @property
    def base_logprob(self) -> Tensor | None:
        """log a of each token [N, T], where it is known without a pass of the base."""
        if self.from_base and self.samples.exact:
            return self.samples.proposal_logprob
        return self.assessment.base if self.assessment is not None else None

    @property
    def policy_logprob(self) -> Tensor | None:
        """log π of each token [N, T], where it is known without a pass of the policy."""
        if self.proposal == POLICY and self.samples.exact:
            return self.samples.proposal_logprob
        return self.assessment.policy if self.assessment is not None else None

    def after_update(self) -> RolloutBatch:
        """The same batch after an update of the policy: what was known of the policy no longer holds."""
        known = replace(self.assessment, policy=None) if self.assessment is not None else None
        return replace(self, proposal=EARLIER if self.proposal == POLICY else self.proposal, assessment=known)

    def row(self, row: int) -> RolloutBatch:
        """A batch of one of the samples; what is known of the whole batch still holds."""
        rows = torch.tensor([row])

        def of(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[rows.to(value.device)]

        known = self.assessment
        return replace(
            self,
            samples=self.samples.select(rows.to(self.samples.tokens.device)),
            measured=self.features[rows],
            assessment=replace(known, **{name: of(value) for name, value in vars(known).items()}) if known else None,
            mixture=of(self.mixture),
        )


def prompts_in_turn(prompts: Prompts, drawn: int, n: int, samples_per_prompt: int = 1) -> Prompts:
    """The prompts of the next ``n`` sequences after ``drawn`` others, so that small batches use all prompts.

    Every prompt gets ``samples_per_prompt`` sequences before the next one's turn.
    """
    count, first = len(prompts), drawn // samples_per_prompt
    return prompts.select([(first + i) % count for i in range(min(-(-n // samples_per_prompt), count))])


@dataclass
class FitSampleQueue:
    """The samples that the target was fitted on, handed out once in full batches.

    Samples of the base come in their order, samples of a mixture in a fixed random order.
    """

    base_sample: BaseSample | None
    position: int = 0

    def holds(self, size: int) -> bool:
        """Whether ``size`` rows are left."""
        return self.base_sample is not None and self.position + size <= len(self.base_sample.samples)

    def next(self, size: int) -> RolloutBatch | None:
        """The next ``size`` rows as a batch, or None when fewer are left."""
        if self.base_sample is None or not self.holds(size):
            return None
        part = slice(self.position, self.position + size)
        self.position += size
        everything = len(self.base_sample.samples)
        order = torch.arange(everything)
        if not self.base_sample.from_base:
            order = torch.randperm(everything, generator=torch.Generator().manual_seed(0))
        chosen = self.base_sample.select(order[part])
        samples = chosen.samples.trimmed()
        known: Assessment | None = None
        if chosen.base_logprob is not None:
            known = Assessment(base=chosen.base_logprob[:, : samples.tokens.shape[1]])
        proposal = BASE if self.base_sample.from_base else MIXTURE
        return RolloutBatch(samples, chosen.features, proposal, reused=True, assessment=known)

    def state_dict(self) -> dict[str, Any]:
        """How many rows were handed out, for a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the position of a checkpoint."""
        self.position = state["position"]
