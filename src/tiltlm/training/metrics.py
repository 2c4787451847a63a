"""What one batch says of target, policy and proposal, before the policy has trained on it; no extra model pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm import estimation
from tiltlm.estimation import Estimate, Partition
from tiltlm.lm import Samples
from tiltlm.targets import Target
from tiltlm.training.callbacks import Progress
from tiltlm.training.proposal import Distances


@dataclass(frozen=True)
class Scores:
    """Sequence log-probabilities [N] in nats, float64 on the CPU, of samples drawn from the proposal.

    ``kl_to_base`` [N] is each row's Rao–Blackwell term Σ_t (π/q)(x_<t) KL(π(·|x_<t)‖a(·|x_<t)), whose mean is KL(π‖a)
    whatever the proposal; None where the base's next-token law was not at hand.
    """

    policy_logprob: Tensor
    base_logprob: Tensor
    proposal_logprob: Tensor
    target_logscore: Tensor
    kl_to_base: Tensor | None

    @staticmethod
    @torch.no_grad()
    def of(
        samples: Samples, policy_tokens: Tensor, policy_law: Tensor, base_tokens: Tensor, base_law: Tensor | None
    ) -> Scores:
        """From log-probabilities of sampled tokens [N, T] and of the whole vocabulary [N, T, V]; no target yet."""
        kl: Tensor | None = None
        if base_law is not None:
            per_position = (policy_law.exp() * (policy_law - base_law)).sum(-1)
            log_ratio = policy_tokens - samples.proposal_logprob
            before = (log_ratio.cumsum(-1) - log_ratio).exp()
            kl = (before * per_position * samples.mask).double().sum(-1).cpu()
        return Scores(
            policy_logprob=policy_tokens.detach().double().sum(-1).cpu(),
            base_logprob=base_tokens.double().sum(-1).cpu(),
            proposal_logprob=samples.sequence_logprob.cpu(),
            target_logscore=torch.empty(0, dtype=torch.float64),
            kl_to_base=kl,
        )

    def with_target(self, target_logscore: Tensor) -> Scores:
        """The same scores with the target's log P [N]."""
        return replace(self, target_logscore=target_logscore.double())

    @staticmethod
    def concatenate(parts: Sequence[Scores], order: Tensor | None = None) -> Scores:
        """All rows of the parts, then in ``order``."""
        rows = slice(None) if order is None else order.cpu()
        kls = [part.kl_to_base for part in parts if part.kl_to_base is not None]
        return Scores(
            policy_logprob=torch.cat([part.policy_logprob for part in parts])[rows],
            base_logprob=torch.cat([part.base_logprob for part in parts])[rows],
            proposal_logprob=torch.cat([part.proposal_logprob for part in parts])[rows],
            target_logscore=torch.cat([part.target_logscore for part in parts])[rows],
            kl_to_base=torch.cat(kls)[rows] if len(kls) == len(parts) else None,
        )


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: estimates in nats (KL, log Z), shares (TV, moments) and samples (ESS)."""

    log_z: Estimate
    kl_p_pi: Estimate
    kl_pi_a: Estimate
    tv_p_pi: Estimate
    ess: Estimate
    moments: dict[str, Estimate]
    target_moments: dict[str, Estimate]
    progress: Progress | None = None
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    proposal: str = ""
    proposal_updated: bool = False
    seconds: dict[str, float] | None = None

    def completed(
        self,
        progress: Progress,
        grad_norm: float,
        learning_rate: float,
        proposal: str,
        proposal_updated: bool,
        seconds: dict[str, float],
    ) -> StepMetrics:
        """These estimates with what is known only after the step."""
        return replace(
            self,
            progress=progress,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            proposal=proposal,
            proposal_updated=proposal_updated,
            seconds=seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``."""
        assert self.progress is not None
        return {
            "step": self.progress.step,
            "sequences": self.progress.sequences,
            "forward_passes": self.progress.forward_passes,
            "log_z": self.log_z.to_json(),
            "kl_p_pi": self.kl_p_pi.to_json(),
            "kl_pi_a": self.kl_pi_a.to_json(),
            "tv_p_pi": self.tv_p_pi.to_json(),
            "ess": self.ess.to_json(),
            "moments": {name: value.to_json() for name, value in self.moments.items()},
            "target_moments": {name: value.to_json() for name, value in self.target_moments.items()},
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "proposal": self.proposal,
            "proposal_updated": self.proposal_updated,
            "seconds": self.seconds,
        }


def step_metrics(scores: Scores, features: Tensor, target: Target, partition: Partition) -> StepMetrics:
    """Estimates from one batch with feature values [N, K]; π/q weighs what is a mean over the policy."""
    score, proposal, policy = scores.target_logscore, scores.proposal_logprob, scores.policy_logprob
    names = [feature.name for feature in target.features]
    columns = dict(zip(names, features.unbind(-1), strict=True))
    log_z = partition.log_z
    return StepMetrics(
        log_z=log_z,
        kl_p_pi=estimation.kl_from_target(score, proposal, policy, log_z),
        kl_pi_a=kl_policy_base(scores),
        tv_p_pi=estimation.tv_from_target(score, proposal, policy, log_z),
        ess=estimation.effective_sample_size(score - proposal),
        moments={n: estimation.moment_under_policy(column, policy, proposal) for n, column in columns.items()},
        target_moments={n: estimation.moment_under_target(column, score, proposal) for n, column in columns.items()},
    )


def kl_policy_base(scores: Scores) -> Estimate:
    """KL(π‖a), by Rao–Blackwell where the base's next-token laws were at hand."""
    if scores.kl_to_base is not None:
        return estimation.mean(scores.kl_to_base)
    return estimation.kl_policy_base(scores.policy_logprob, scores.base_logprob, scores.proposal_logprob)


def distances(scores: Scores, partition: Partition) -> Distances:
    """How much closer to the target the policy is than the proposal, on samples of the proposal."""
    arguments = scores.target_logscore, scores.proposal_logprob, scores.policy_logprob
    return Distances(
        kl_gain=estimation.kl_difference(*arguments),
        tv_gain=estimation.tv_difference(*arguments, partition.log_z),
    )
