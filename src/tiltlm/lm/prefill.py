"""Prefill: the prompts of a batch are read, each once where the model's cache can be spread over its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.lm.cross import CrossDecoder
from tiltlm.lm.decoding import Decoder, StaticDecoder, can_be_static, unwrapped
from tiltlm.lm.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prefill(
    model: PreTrainedModel,
    prompts: Prompts,
    prompt_index: Tensor,
    max_new_tokens: int,
    start_id: int,
    cache_dtype: torch.dtype | None,
) -> tuple[Decoder, Tensor]:
    """A decoder that has read the prompt of each row [N], and the logits [N, V] of the first token.

    Where an encoder reads the prompts, what the decoder reads is ``start_id``. A cache of fixed size holds its keys and
    values in ``cache_dtype``.
    """
    crossing = bool(unwrapped(model).config.is_encoder_decoder)

    def decoder_of(rows: Tensor) -> Decoder:
        if crossing:
            return CrossDecoder(model, prompts, rows, start_id)
        tokens, mask = prompts.tokens[rows], prompts.mask[rows]
        if can_be_static(unwrapped(model)):
            return StaticDecoder(model, tokens, mask, tokens.shape[1] + max_new_tokens, cache_dtype)
        return Decoder(model, tokens, mask)

    shared, row = torch.unique(prompt_index, return_inverse=True)
    # One token is read as quickly for all rows.
    if (crossing or prompts.tokens.shape[1] > 1) and len(shared) < len(prompt_index):
        decoder = decoder_of(shared)
        logits = decoder.logits()
        if decoder.keep(row):
            return decoder, logits[row]
    decoder = decoder_of(prompt_index)
    return decoder, decoder.logits()
