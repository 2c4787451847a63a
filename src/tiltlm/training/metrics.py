"""Estimates from one batch, before the policy has trained on it; they need no further pass of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from tiltlm import estimation
from tiltlm.estimation import Estimate, Partition, PromptPartition
from tiltlm.evaluation.scores import Mismatch, Scores, kl_policy_base
from tiltlm.targets import Target
from tiltlm.training.gradient_noise import GradientNoise
from tiltlm.training.progress import Progress
from tiltlm.training.proposal_rules import Distances
from tiltlm.training.replay.weights import PoolMetrics


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: estimates in nats (KL, log Z), shares (TV, moments) and samples (ESS).

    ``pool`` is set in steps that trained on a replay buffer with several proposals, ``noise`` where it was measured.
    """

    log_z: Estimate
    kl_p_pi: Estimate
    kl_pi_a: Estimate
    tv_p_pi: Estimate
    ess: Estimate
    moments: dict[str, Estimate]
    target_moments: dict[str, Estimate]
    mismatch: Mismatch | None = None
    progress: Progress | None = None
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    proposal: str = ""
    proposal_updated: bool = False
    seconds: dict[str, float] | None = None
    pool: PoolMetrics | None = None
    noise: GradientNoise | None = None

    def completed(
        self,
        progress: Progress,
        grad_norm: float,
        learning_rate: float,
        proposal: str,
        proposal_updated: bool,
        seconds: dict[str, float],
        pool: PoolMetrics | None = None,
    ) -> StepMetrics:
        """These estimates, with what is known only after the step."""
        return replace(
            self,
            progress=progress,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            proposal=proposal,
            proposal_updated=proposal_updated,
            seconds=dict(seconds),
            pool=pool,
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
            "mismatch": asdict(self.mismatch) if self.mismatch else None,
            "passes_per_token": self.progress.passes_per_token,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "proposal": self.proposal,
            "proposal_updated": self.proposal_updated,
            "seconds": self.seconds,
            **({"pool": self.pool.to_json()} if self.pool else {}),
            **({"spread": self.noise.to_json()} if self.noise else {}),
        }


def step_metrics(
    scores: Scores, features: Tensor, target: Target, partition: Partition | PromptPartition
) -> StepMetrics:
    """Estimates from one batch with feature values [N, K]; means over the policy are weighted by π/q.

    With several prompts they are means over prompts.
    """
    scores = scores.normalized(partition)
    score, proposal, policy = scores.target_logscore, scores.proposal_logprob, scores.policy_logprob
    names = [feature.name for feature in target.features]
    columns = dict(zip(names, features.unbind(-1), strict=True))
    log_z = _log_z(partition)
    return StepMetrics(
        log_z=partition.log_z,
        kl_p_pi=estimation.kl_from_target(score, proposal, policy, log_z),
        kl_pi_a=kl_policy_base(scores),
        tv_p_pi=estimation.tv_from_target(score, proposal, policy, log_z),
        ess=estimation.effective_sample_size(score - proposal),
        moments={n: estimation.moment_under_policy(column, policy, proposal) for n, column in columns.items()},
        target_moments={n: estimation.moment_under_target(column, score, proposal) for n, column in columns.items()},
        mismatch=Mismatch.of(scores),
    )


def _log_z(partition: Partition | PromptPartition) -> Estimate:
    """log Z of normalized scores."""
    return partition.log_z if isinstance(partition, Partition) else Estimate(0.0, partition.log_z.se)


def distances(scores: Scores, partition: Partition | PromptPartition) -> Distances:
    """How much closer to the target the policy is than the proposal, on samples of the proposal."""
    scores = scores.normalized(partition)
    arguments = scores.target_logscore, scores.proposal_logprob, scores.policy_logprob
    return Distances(
        kl_gain=estimation.kl_difference(*arguments),
        tv_gain=estimation.tv_difference(*arguments, _log_z(partition)),
    )
