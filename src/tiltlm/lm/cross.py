"""Encoder–decoder models: the encoder reads each prompt once for all its completions, which the decoder writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.lm.decoding import Decoder, unwrapped
from tiltlm.lm.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Source:
    """What a decoder attends to: the encoder's ``states`` [N, L, H] of each row's prompt, and their ``mask`` [N, L]."""

    states: Tensor
    mask: Tensor

    @staticmethod
    def of(model: PreTrainedModel, prompts: Prompts, prompt_index: Tensor) -> Source:
        """The prompt of each row [N], read once for all rows that share it."""
        shared, place = torch.unique(prompt_index, return_inverse=True)
        tokens, mask = right_padded(prompts.tokens[shared], prompts.mask[shared])
        encoder = unwrapped(model).get_encoder()
        states = encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return Source(states, mask).select(place)

    def select(self, rows: Tensor) -> Source:
        """These rows, in this order."""
        return Source(self.states[rows], self.mask[rows])

    @property
    def arguments(self) -> dict[str, Any]:
        """For the model's forward, in place of the prompt."""
        return {"encoder_outputs": (self.states,), "attention_mask": self.mask.long()}


def right_padded(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [M, L] and mask [M, L] with all padding moved to the right: an encoder may count its positions itself."""
    order = mask.logical_not().long().argsort(dim=-1, stable=True)
    return tokens.gather(-1, order), mask.gather(-1, order)


def decoder_states(model: PreTrainedModel, tokens: Tensor, source: Source) -> Tensor:
    """What the output layer is given for each of the decoder's ``tokens`` [N, T]: states [N, T, H]."""
    inner = unwrapped(model)
    read = inner.get_decoder()(
        input_ids=tokens,
        encoder_hidden_states=source.states,
        encoder_attention_mask=source.mask.long(),
        use_cache=False,
    )
    states: Tensor = read.last_hidden_state
    return states * inner.config.d_model**-0.5 if getattr(inner.config, "scale_decoder_outputs", False) else states


class CrossDecoder(Decoder):
    """A decoder whose rows attend to prompts that the encoder has read; they themselves begin with ``start_id``."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, prompt_index: Tensor, start_id: int) -> None:
        start = torch.full((len(prompt_index), 1), start_id, dtype=torch.long, device=prompt_index.device)
        super().__init__(model, start, torch.ones_like(start).bool())
        self.source = Source.of(model, prompts, prompt_index)

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token; a model without a cache reads its whole prefix again."""
        output = self.model(
            decoder_input_ids=self.fresh, past_key_values=self.cache, use_cache=True, **self.source.arguments
        )
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> bool:
        """Take these rows [n], in this order, for all; False where the model's cache cannot do so."""
        kept = super().keep(rows)
        if kept:
            self.source = self.source.select(rows)
        return kept
