"""The output layer of a model, and whether its logits are that layer's and nothing more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So large that a cap on logits shows even where they are small.
LARGE = 100.0
# How far rounding may part two computations of the same logits, as a share of the largest.
ROUNDING = {torch.bfloat16: 0.02, torch.float16: 0.003}


@torch.no_grad()
def plain_output_layer(model: PreTrainedModel, tokens: Sequence[int]) -> nn.Linear | None:
    """The layer that makes logits of hidden states, where that is all that the model does; tried on ``tokens``.

    None where it is not: where logits are scaled or capped, or the layer is of another kind or carries an adapter.
    """
    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear:
        return None
    ids = torch.tensor([list(tokens)], device=model.device)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    hook = layer.register_forward_pre_hook(lambda _, args: (args[0] * LARGE,))
    try:
        whole = model(**arguments).logits
    finally:
        hook.remove()
    hidden = getattr(model.base_model(**arguments), "last_hidden_state", None)
    if hidden is None:
        return None
    ours = layer(hidden * LARGE)
    tolerance = ROUNDING.get(whole.dtype, 1e-4) * float(whole.abs().max())
    same = ours.shape == whole.shape and bool(((ours - whole).abs() <= tolerance).all())
    return layer if same else None
