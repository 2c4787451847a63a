"""What a step computes from its whole batch: log Z, distances, moments, and what the next proposal depends on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm import estimation
from tiltlm.estimation import Partition, PromptPartition
from tiltlm.evaluation.scores import Scores
from tiltlm.objectives import Record
from tiltlm.targets import Target
from tiltlm.training.metrics import StepMetrics, distances, step_metrics
from tiltlm.training.proposal_rules import Distances
from tiltlm.training.ranks import Ranks
from tiltlm.training.surrogate import sequence_record


@dataclass(frozen=True)
class WholeBatch:
    """Scores and features [N, K] of the rows of all processes, and every estimate that a step makes from them."""

    scores: Scores
    features: Tensor | None = None

    @staticmethod
    def gather(ranks: Ranks, scores: Scores, features: Tensor | None = None) -> WholeBatch:
        """The whole batch, from the rows of this process."""
        return WholeBatch(ranks.gather_scores(scores), None if features is None else ranks.gather(features))

    @staticmethod
    def concatenate(parts: list[WholeBatch]) -> WholeBatch:
        """The scores of several batches."""
        return WholeBatch(Scores.concatenate([part.scores for part in parts]))

    def added_to(self, partition: Partition | PromptPartition) -> Partition | PromptPartition:
        """The estimate of log Z with these samples."""
        scores = self.scores
        assert scores.prompt_ids is not None
        return partition.updated(scores.target_logscore - scores.proposal_logprob, scores.prompt_ids)

    def metrics(self, target: Target, partition: Partition | PromptPartition) -> StepMetrics:
        """log Z, KL, TV, ESS and moments, each with its standard error."""
        assert self.features is not None
        return step_metrics(self.scores, self.features, target, partition)

    def distances(self, partition: Partition | PromptPartition) -> Distances:
        """How much nearer to the target the policy is than the proposal; decides whether the proposal changes."""
        return distances(self.scores, partition)

    def policy_moments(self, columns: list[int]) -> list[float]:
        """E_π of these features; moves the guide of a method with moment feedback."""
        assert self.features is not None
        policy, proposal = self.scores.policy_logprob, self.scores.proposal_logprob
        chosen = self.features[:, columns].unbind(-1)
        return [estimation.moment_under_policy(column, policy, proposal).value for column in chosen]

    def record(self, log_z: float | Tensor) -> Record:
        """The record of whole sequences that an objective adapts to."""
        return sequence_record(self.scores, log_z)
