"""Evaluation of each prompt, if there are several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tiltlm import estimation
from tiltlm.estimation import Estimate
from tiltlm.evaluation.pooled import PooledScores
from tiltlm.evaluation.scores import Scores
from tiltlm.lm import Samples

# At most this many prompts are reported one by one; means are over all.
MOST_PROMPTS = 100


@dataclass(frozen=True)
class PromptEvaluation:
    """The same estimates for one of several prompts, on its own samples alone."""

    prompt: str | None
    samples: int
    moments: dict[str, Estimate]
    target_moments: dict[str, Estimate]
    kl_p_pi: Estimate
    tv_p_pi: Estimate
    log_z: Estimate

    def to_json(self) -> dict[str, Any]:
        """An entry of the evaluation's ``per_prompt``."""
        moments = {
            name: {key: value.to_json() for key, value in getattr(self, name).items()}
            for name in ("moments", "target_moments")
        }
        distances = {name: getattr(self, name).to_json() for name in ("kl_p_pi", "tv_p_pi", "log_z")}
        return {"prompt": self.prompt, "samples": self.samples, **moments, **distances}


def evaluate_prompts(
    samples: Samples, scores: Scores, pooled: PooledScores, columns: dict[str, torch.Tensor]
) -> tuple[PromptEvaluation, ...]:
    """Estimates for each of the first ``MOST_PROMPTS`` prompts."""
    texts = dict(zip(samples.prompts.ids, samples.prompts.texts, strict=True))
    found = []
    assert scores.prompt_ids is not None
    assert pooled.scores.prompt_ids is not None
    for prompt in sorted(set(scores.prompt_ids.tolist()))[:MOST_PROMPTS]:
        own, both = scores.prompt_ids == prompt, pooled.scores.prompt_ids == prompt
        score, policy = pooled.scores.target_logscore[both], pooled.scores.policy_logprob[both]
        mixture, features = pooled.mixture_logprob[both], pooled.features[both].unbind(-1)
        under_target = [estimation.moment_under_target(column, score, mixture) for column in features]
        found.append(
            PromptEvaluation(
                texts[prompt],
                int(own.sum()),
                {name: estimation.mean(column[own]) for name, column in columns.items()},
                dict(zip(columns, under_target, strict=True)),
                estimation.kl_from_target(score, mixture, policy),
                estimation.tv_from_target(score, mixture, policy),
                estimation.log_partition(score - mixture),
            )
        )
    return tuple(found)
