"""The output layer of a model, and whether its logits are that layer's and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiltlm.lm.cross import Source, decoder_states
from tiltlm.lm.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So large that a cap on logits shows even where they are small.
LARGE = 100.0
# How far rounding may part two computations of the same logits, as a share of the largest.
ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.003}


@torch.no_grad()
def plain_output_layer(model: PreTrainedModel, tokens: Sequence[int]) -> nn.Linear | None:
    """The layer that makes logits of hidden states, where that is all that the model does; tried on ``tokens``.

    None where it is not: where logits are scaled, capped or shifted, or the layer is of another kind or carries an
    adapter.
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
        whole = model(**arguments).logits
    finally:
        hook.remove()
    hidden = _hidden(model, arguments)
    if hidden is None:
        return None
    ours = layer(hidden * LARGE)
    tolerance = ROUNDING.get(whole.dtype, 1e-4) * float(whole.abs().max())
    same = ours.shape == whole.shape and bool(((ours - whole).abs() <= tolerance).all())
    return layer if same else None


def _hidden(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor | None:
    """What the output layer is given, by the way that a reading takes to it; None where that is no way."""
    if not model.config.is_encoder_decoder:
        return getattr(model.base_model(**arguments), "last_hidden_state", None)
    tokens, mask = arguments["input_ids"], arguments["attention_mask"].bool()
    prompts = Prompts(tokens, mask, (None,))
    try:
        return decoder_states(model, tokens, Source.of(model, prompts, torch.zeros(1, dtype=torch.long)))
    except (AttributeError, TypeError):
        return None
