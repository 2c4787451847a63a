"""What one batch says of target, policy and proposal, before the policy has trained on it; no extra model pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm import estimation
from tiltlm.estimation import Estimate, Partition, PromptPartition
from tiltlm.lm import NextToken, Samples
from tiltlm.objectives import Record
from tiltlm.targets import Target
from tiltlm.training.callbacks import Progress
from tiltlm.training.proposal_rules import Distances
from tiltlm.training.replay.weights import PoolMetrics

if TYPE_CHECKING:
    from tiltlm.training.gradient_noise import Spread

# Above this mean, in nats, importance weights are typically off by a fifth.
LARGEST_MEAN_MISMATCH = 0.2


@dataclass(frozen=True)
class Scores:
    """Sequence log-probabilities [N] in nats, float64 on the CPU, of samples drawn from the proposal.

    ``kl_to_base`` [N] is each row's Rao–Blackwell term Σ_t (π/q)(x_<t) KL(π(·|x_<t)‖a(·|x_<t)), whose mean is KL(π‖a)
    whatever the proposal; None where the base's next-token law was not at hand. ``rescored`` [N] is the proposal's
    log-probability by a scoring pass instead of the sampler; None, or NaN in a row, where no pass took that law.
    ``base_logprob`` is NaN where P is 0 and the base was not asked. ``prompt_ids`` [N] tell prompts apart.
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
    def of(samples: Samples, laws: NextToken, base_tokens: Tensor | None = None) -> Scores:
        """From what the models say at each token; ``base_tokens`` [N, T] where the base was not read. No target yet."""
        kl: Tensor | None = None
        if laws.kl is not None:
            log_ratio = laws.policy - samples.proposal_logprob
            before = (log_ratio.cumsum(-1) - log_ratio).exp()
            kl = (before * laws.kl).double().sum(-1).cpu()
        base = laws.base if laws.base is not None else base_tokens
        assert base is not None
        return Scores(
            policy_logprob=laws.policy.detach().double().sum(-1).cpu(),
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
        """The same scores with log p in place of log P where prompts have a log Z each.

        Samples of several prompts are then samples of prompt and completion, and log Z of that law is 0.
        """
        if isinstance(partition, Partition) or self.prompt_ids is None:
            return self
        return self.with_target(self.target_logscore - partition.at(self.prompt_ids))

    def with_rescored(self, token_logprob: Tensor) -> Scores:
        """The same scores with the proposal's log-probabilities of the tokens [N, T] from a scoring pass."""
        return replace(self, rescored=token_logprob.detach().double().sum(-1).cpu())

    def record(self, log_z: float | Tensor) -> Record:
        """What an objective reads of whole sequences."""
        return Record(self.policy_logprob, self.base_logprob, self.proposal_logprob, self.target_logscore, log_z)

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
    """|log-probability by the sampler − by a scoring pass| of whole sequences under one law, in nats.

    Both are right to rounding, which differs between a pass with a cache and one without; in bfloat16 that shows.
    """

    mean: float
    worst: float

    @staticmethod
    def of(scores: Scores) -> Mismatch | None:
        """None where no scoring pass took the law that drew the samples."""
        if scores.rescored is None:
            return None
        apart = (scores.rescored - scores.proposal_logprob).abs()
        apart = apart[~apart.isnan()]
        return Mismatch(float(apart.mean()), float(apart.max()))

    @property
    def is_large(self) -> bool:
        """Whether importance weights are off by more than is fair to call rounding."""
        return self.mean > LARGEST_MEAN_MISMATCH

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a sequence on average, {self.worst:.2g} at worst"


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: estimates in nats (KL, log Z), shares (TV, moments) and samples (ESS).

    ``pool`` is there in steps that trained on a pool of several laws.
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
    spread: Spread | None = None

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
        """These estimates with what is known only after the step."""
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
            **({"spread": self.spread.to_json()} if self.spread else {}),
        }


def step_metrics(
    scores: Scores, features: Tensor, target: Target, partition: Partition | PromptPartition
) -> StepMetrics:
    """Estimates from one batch with feature values [N, K]; π/q weighs what is a mean over the policy.

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


def kl_policy_base(scores: Scores) -> Estimate:
    """KL(π‖a), by Rao–Blackwell where the base's next-token laws were at hand; NaN where the base was not asked."""
    if scores.kl_to_base is not None:
        return estimation.mean(scores.kl_to_base)
    if bool(scores.base_logprob.isnan().any()):
        return Estimate(math.nan, math.nan)
    return estimation.kl_policy_base(scores.policy_logprob, scores.base_logprob, scores.proposal_logprob)


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
