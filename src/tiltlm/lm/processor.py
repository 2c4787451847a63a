"""A guide in transformers' own generation: for a tuned model that keeps one, run without our sampler."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltlm.lm.guide import Guide


@dataclass(frozen=True)
class GuideProcessor:
    """Adds a guide's log ψ to the scores of ``generate(logits_processor=[...])``.

    ``prompt_length`` is the number of tokens, padding and all, that stand before every completion; of an
    encoder–decoder model that is 1, the decoder's start. It comes before any processor that warps the law.
    """

    guide: Guide
    prompt_length: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [N, V] of the next token after ``input_ids`` [N, L], guided."""
        guide, written = self.guide.to(scores.device, scores.dtype), input_ids[:, self.prompt_length :]
        states = guide.begin(len(written))
        for column in written.unbind(-1):
            states = guide.advance(states, column)
        return scores + guide.logit_bias(states, written.shape[1])
