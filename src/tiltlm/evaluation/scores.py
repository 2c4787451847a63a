"""Log-probabilities of whole sequences under base, policy and proposal, and the target's log-score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm import estimation
from tiltlm.estimation import Estimate, Partition, PromptPartition
from tiltlm.lm import NextToken, Samples

# At this mean, in nats, importance weights are off by about a fifth.
LARGEST_MEAN_MISMATCH = 0.2


@dataclass(frozen=True)
class Scores:
    """Sequence log-probabilities [N] in nats, float64 on the CPU, of samples drawn from the proposal.

    ``kl_to_base`` [N] is each row's Rao–Blackwell term Σ_t (π/q)(x_<t) KL(π(·|x_<t)‖a(·|x_<t)), whose mean is KL(π‖a)
    for any proposal; None without the base's next-token distributions. ``rescored`` [N] is the proposal's
    log-probability from a scoring pass instead of the sampler; None, or NaN in a row, without such a pass.
    ``base_logprob`` is NaN in rows with P = 0 that the base did not read. ``prompt_ids`` [N] identify prompts.
    """

    policy_logprob: Tensor
    base_logprob: Tensor
    proposal_logprob: Tensor
    target_logscore: Tensor
    kl_to_base: Tensor | None
    rescored: Tensor | None = None
    prompt_ids: Tensor | None = None

    @staticmethod
    @torch.no_grad()
    def of(samples: Samples, scored: NextToken, base_tokens: Tensor | None = None) -> Scores:
        """From scores of tokens; ``base_tokens`` [N, T] is log a if ``scored`` has none. Without the target."""
        kl: Tensor | None = None
        if scored.kl is not None:
            log_ratio = scored.policy - samples.proposal_logprob
            before = (log_ratio.cumsum(-1) - log_ratio).exp()
            kl = (before * scored.kl).double().sum(-1).cpu()
        base = scored.base if scored.base is not None else base_tokens
        assert base is not None
        return Scores(
            policy_logprob=scored.policy.detach().double().sum(-1).cpu(),
            base_logprob=base.double().sum(-1).cpu(),
            proposal_logprob=samples.sequence_logprob.cpu(),
            target_logscore=torch.empty(0, dtype=torch.float64),
            kl_to_base=kl,
            prompt_ids=samples.prompt_ids,
        )

    def with_target(self, target_logscore: Tensor) -> Scores:
        """The same scores with the target's log P [N]."""
        return replace(self, target_logscore=target_logscore.double())

    def normalized(self, partition: Partition | PromptPartition) -> Scores:
        """The same scores with log p in place of log P, if prompts have a log Z each.

        Samples of several prompts are then samples of prompt and completion, whose log Z is 0.
        """
        if isinstance(partition, Partition) or self.prompt_ids is None:
            return self
        return self.with_target(self.target_logscore - partition.at(self.prompt_ids))

    def with_rescored(self, token_logprob: Tensor) -> Scores:
        """The same scores with the proposal's log-probabilities of the tokens [N, T] from a scoring pass."""
        return replace(self, rescored=token_logprob.detach().double().sum(-1).cpu())

    @staticmethod
    def concatenate(parts: Sequence[Scores], order: Tensor | None = None) -> Scores:
        """All rows of the parts, then in ``order``."""
        rows = slice(None) if order is None else order.cpu()

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if name == "rescored" and any(value is not None for value in values):
                unknown = (torch.full_like(part.policy_logprob, math.nan) for part in parts)
                values = [nan if value is None else value for value, nan in zip(values, unknown, strict=True)]
            return None if any(value is None for value in values) else torch.cat(values)[rows]

        return Scores(**{field.name: joined(field.name) for field in fields(Scores)})


@dataclass(frozen=True)
class Mismatch:
    """|log-probability from the sampler − from a scoring pass| of whole sequences, in nats.

    Both are exact up to rounding, which differs between a pass with a cache and one without, most of all in bfloat16.
    """

    mean: float
    worst: float

    @staticmethod
    def of(scores: Scores) -> Mismatch | None:
        """None without a scoring pass of the model that drew the samples."""
        if scores.rescored is None:
            return None
        apart = (scores.rescored - scores.proposal_logprob).abs()
        apart = apart[~apart.isnan()]
        return Mismatch(float(apart.mean()), float(apart.max()))

    @property
    def is_large(self) -> bool:
        """Whether importance weights are off by more than rounding."""
        return self.mean > LARGEST_MEAN_MISMATCH

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a sequence on average, {self.worst:.2g} at worst"


def kl_policy_base(scores: Scores) -> Estimate:
    """KL(π‖a), Rao–Blackwellized if next-token distributions of the base are known; NaN if the base read nothing."""
    if scores.kl_to_base is not None:
        return estimation.mean(scores.kl_to_base)
    if bool(scores.base_logprob.isnan().any()):
        return Estimate(math.nan, math.nan)
    return estimation.kl_policy_base(scores.policy_logprob, scores.base_logprob, scores.proposal_logprob)
