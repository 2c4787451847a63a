"""The output layer of a model, and a test of whether that layer alone makes the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltlm.lm.encoder_decoder import EncodedPrompts, decoder_states
from tiltlm.lm.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Factor on hidden states that makes a cap on logits visible.
LARGE = 100.0
# Largest rounding difference between two computations of the same logits, relative to the largest logit.
ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.003}


@torch.no_grad()
def plain_output_layer(model: PreTrainedModel, tokens: Sequence[int]) -> nn.Linear | None:
    """The linear layer that maps hidden states to logits, tested on ``tokens``; None if the model does more than that.

    More is: logits that are scaled, capped or shifted, a layer of another kind, or an adapter on it.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or bool(torch.as_tensor(getattr(model, "final_logits_bias", 0.0)).any()):
        return None
    ids = torch.tensor([list(tokens)], device=model.device)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids
    hook = layer.register_forward_pre_hook(lambda _, args: (args[0] * LARGE,))
    try:
        logits = model(**arguments).logits
    finally:
        hook.remove()
    hidden = _hidden(model, arguments)
    if hidden is None:
        return None
    computed = layer(hidden * LARGE)
    tolerance = ROUNDING.get(logits.dtype, 1e-4) * float(logits.abs().max())
    same = computed.shape == logits.shape and bool(((computed - logits).abs() <= tolerance).all())
    return layer if same else None


def _hidden(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor | None:
    """Inputs of the output layer, computed as in a scoring pass; None if the model has no such pass."""
    if not model.config.is_encoder_decoder:
        return getattr(model.base_model(**arguments), "last_hidden_state", None)
    tokens, mask = arguments["input_ids"], arguments["attention_mask"].bool()
    prompts = Prompts(tokens, mask, (None,))
    try:
        return decoder_states(model, tokens, EncodedPrompts.of(model, prompts, torch.zeros(1, dtype=torch.long)))
    except (AttributeError, TypeError):
        return None
