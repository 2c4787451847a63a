"""The protocol of everything that draws samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from tiltlm.lm import Guide, LanguageModel, Prompts, Samples, SamplingSettings

# Samples of the model's own distribution.
PLAIN = SamplingSettings()


class Rollouts(Protocol):
    """Draws completions of prompts from one model."""

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
        """``n`` completions in all, the prompts in turn, ``samples_per_prompt`` of each at a time.

        ``seed`` or ``generator`` fixes the draw. ``guide`` reweights each next token. ``Samples.exact`` says whether
        their log-probabilities are also those of a scoring pass of the model.
        """


# Makes the rollouts of a model.
RolloutsOf = Callable[[LanguageModel], Rollouts]
