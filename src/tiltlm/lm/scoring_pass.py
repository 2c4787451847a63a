"""One pass of a model over prompts and completions: hidden states before the output layer, or logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.lm.decoding import accepts, positions
from tiltlm.lm.encoder_decoder import EncodedPrompts, decoder_states
from tiltlm.lm.samples import Samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def causal_pass(
    model: PreTrainedModel, inner: PreTrainedModel, layer: torch.nn.Linear | None, samples: Samples
) -> Tensor:
    """Hidden states [N, C + T − 1, H] of prompts and completions; logits [N, T or C + T − 1, V] without a ``layer``.

    ``inner`` is the model without PEFT around it. The last sampled token is never an input.
    """
    tokens, mask = samples.prompts.tokens[samples.prompt_index], samples.prompts.mask[samples.prompt_index]
    arguments: dict[str, Any] = {"input_ids": torch.cat([tokens, samples.tokens[:, :-1]], dim=1), "use_cache": False}
    if not bool(mask.all()):
        # A sampled token never attends to the right padding, so only the left one is masked.
        full = torch.cat([mask, torch.ones_like(samples.mask[:, :-1])], dim=1)
        arguments["attention_mask"] = full.long()
        if accepts(model, "position_ids"):
            arguments["position_ids"] = positions(full)
    if layer is not None:
        hidden: Tensor = inner.base_model(**arguments).last_hidden_state
        return hidden
    if accepts(model, "logits_to_keep"):
        arguments["logits_to_keep"] = samples.tokens.shape[1]
    logits: Tensor = model(**arguments).logits
    return logits


def decoder_pass(model: PreTrainedModel, layer: torch.nn.Linear | None, samples: Samples, start_id: int) -> Tensor:
    """Hidden states [N, T, H] of an encoder–decoder model's completions; logits [N, T, V] without a ``layer``."""
    start = torch.full_like(samples.tokens[:, :1], start_id)
    tokens = torch.cat([start, samples.tokens[:, :-1]], dim=1)
    encoded = EncodedPrompts.of(model, samples.prompts, samples.prompt_index)
    if layer is not None:
        return decoder_states(model, tokens, encoded)
    logits: Tensor = model(decoder_input_ids=tokens, use_cache=False, **encoded.arguments).logits
    return logits
