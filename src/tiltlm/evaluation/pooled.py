"""Samples of several distributions, weighted as drawn from their mixture."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tiltlm.evaluation.scores import Scores


@dataclass(frozen=True)
class PooledScores:
    """Scores and features [N, K] of samples of several models, with the log-probability [N] of their mixture."""

    scores: Scores
    features: torch.Tensor
    mixture_logprob: torch.Tensor

    @staticmethod
    def of(scores: Scores, features: torch.Tensor) -> PooledScores:
        """Policy and base in equal numbers: every row counts as drawn from their mixture (Owen & Zhou 2000)."""
        mixture = torch.logaddexp(scores.policy_logprob, scores.base_logprob) - math.log(2)
        return PooledScores(scores, features, mixture)
