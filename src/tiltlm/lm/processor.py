"""A guide as a logits processor of transformers, for tuned models that are run without tiltlm's sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.lm.guide import Guide


@dataclass(frozen=True)
class GuideProcessor:
    """Adds a guide's log ψ to the scores of ``generate(logits_processor=[...])``.

    ``prompt_length`` is the number of tokens before each completion, padding included; 1 for an encoder–decoder model,
    whose decoder starts from one token. Put it before processors that change the distribution, such as temperature.
    """

    guide: Guide
    prompt_length: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores [N, V] of the next token after ``input_ids`` [N, L]."""
        guide, tokens = self.guide.to(scores.device, scores.dtype), input_ids[:, self.prompt_length :]
        states = guide.begin(len(tokens))
        for column in tokens.unbind(-1):
            states = guide.advance(states, column)
        return scores + guide.logit_bias(states, tokens.shape[1])
