"""Prefill: a decoder reads the prompts of a batch, each only once if its cache can be copied to several rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.lm.decoding import Decoder, StaticDecoder, can_be_static, unwrapped
from tiltlm.lm.encoder_decoder import CrossAttentionDecoder
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
    """A decoder that has read the prompt of each row [N], and the logits [N, V] of the first sampled token.

    ``start_id`` is the first input of the decoder of an encoder–decoder model. ``cache_dtype`` is the dtype of a cache
    of fixed size.
    """
    is_encoder_decoder = bool(unwrapped(model).config.is_encoder_decoder)

    def decoder_of(rows: Tensor) -> Decoder:
        if is_encoder_decoder:
            return CrossAttentionDecoder(model, prompts, rows, start_id)
        tokens, mask = prompts.tokens[rows], prompts.mask[rows]
        if can_be_static(unwrapped(model)):
            return StaticDecoder(model, tokens, mask, tokens.shape[1] + max_new_tokens, cache_dtype)
        return Decoder(model, tokens, mask)

    distinct, row = torch.unique(prompt_index, return_inverse=True)
    # A prompt of one token takes no longer for all rows.
    if (is_encoder_decoder or prompts.tokens.shape[1] > 1) and len(distinct) < len(prompt_index):
        decoder = decoder_of(distinct)
        logits = decoder.logits()
        if decoder.keep(row):
            return decoder, logits[row]
    decoder = decoder_of(prompt_index)
    return decoder, decoder.logits()
