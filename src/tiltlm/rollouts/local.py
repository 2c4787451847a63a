"""Rollouts by the model in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tiltlm.lm import Guide, LanguageModel, Prompts, Samples, SamplingSettings
from tiltlm.rollouts.rollout import PLAIN


@dataclass(frozen=True)
class LocalRollouts:
    """Samples of ``model``; exact, because the sampler's log-probabilities are those of the model's own passes."""

    model: LanguageModel
    batch_size: int | None = None

    def generate(
        self,
        prompts: Prompts,
        n: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        guide: Guide | None = None,
        max_completion_length: int = 40,
        samples_per_prompt: int = 1,
        settings: SamplingSettings = PLAIN,
        progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """See ``Rollouts.generate``."""
        return self.model.sample(
            n,
            prompts,
            seed,
            max_completion_length=max_completion_length,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            generator=generator,
            batch_size=self.batch_size,
            guide=guide,
            samples_per_prompt=samples_per_prompt,
            progress=progress,
        )
