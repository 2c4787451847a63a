"""Encoder–decoder models: the encoder reads each prompt once, and all completions of that prompt share its states."""

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
class EncodedPrompts:
    """The encoder's ``states`` [N, L, H] of each row's prompt, and their ``mask`` [N, L]; a decoder attends to them."""

    states: Tensor
    mask: Tensor

    @staticmethod
    def of(model: PreTrainedModel, prompts: Prompts, prompt_index: Tensor) -> EncodedPrompts:
        """Encode the prompt of each row [N]; rows with the same prompt share one pass."""
        distinct, row = torch.unique(prompt_index, return_inverse=True)
        tokens, mask = right_padded(prompts.tokens[distinct], prompts.mask[distinct])
        encoder = unwrapped(model).get_encoder()
        states = encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return EncodedPrompts(states, mask).select(row)

    def select(self, rows: Tensor) -> EncodedPrompts:
        """The given rows, in this order."""
        return EncodedPrompts(self.states[rows], self.mask[rows])

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the model's forward that stand in for the prompt."""
        return {"encoder_outputs": (self.states,), "attention_mask": self.mask.long()}


def right_padded(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [M, L] and mask [M, L] with the padding on the right, for encoders that number positions from the left."""
    order = mask.logical_not().long().argsort(dim=-1, stable=True)
    return tokens.gather(-1, order), mask.gather(-1, order)


def decoder_states(model: PreTrainedModel, tokens: Tensor, encoded: EncodedPrompts) -> Tensor:
    """Inputs [N, T, H] of the output layer for the decoder's ``tokens`` [N, T]."""
    inner = unwrapped(model)
    output = inner.get_decoder()(
        input_ids=tokens,
        encoder_hidden_states=encoded.states,
        encoder_attention_mask=encoded.mask.long(),
        use_cache=False,
    )
    states: Tensor = output.last_hidden_state
    return states * inner.config.d_model**-0.5 if getattr(inner.config, "scale_decoder_outputs", False) else states


class CrossAttentionDecoder(Decoder):
    """A decoder that attends to encoded prompts; each of its rows begins with ``start_id``."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, prompt_index: Tensor, start_id: int) -> None:
        start = torch.full((len(prompt_index), 1), start_id, dtype=torch.long, device=prompt_index.device)
        super().__init__(model, start, torch.ones_like(start).bool())
        self.encoded = EncodedPrompts.of(model, prompts, prompt_index)

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token."""
        output = self.model(
            decoder_input_ids=self.next_input, past_key_values=self.cache, use_cache=True, **self.encoded.arguments
        )
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> bool:
        """Continue with the given rows [n], in this order; False if the model's cache cannot be reordered."""
        kept = super().keep(rows)
        if kept:
            self.encoded = self.encoded.select(rows)
        return kept
