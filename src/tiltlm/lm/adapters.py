"""LoRA adapters, which leave the weights of the base unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from tiltlm.errors import UsageError
from tiltlm.lm.loading import quiet_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# LoRA settings and their values that leave the base unchanged; other values change weights or layers it shares.
HARMLESS_TO_THE_BASE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "layer_replication": (None,),
}


def add_lora(
    model: PreTrainedModel, seed: int, settings: Mapping[str, Any], *, is_encoder_decoder: bool
) -> PreTrainedModel:
    """The model with a new LoRA adapter, initialized from ``seed``.

    Raises UsageError for settings that peft refuses or that would change the base.
    """
    from peft import LoraConfig, get_peft_model

    for name, harmless in HARMLESS_TO_THE_BASE.items():
        if settings.get(name, harmless[0]) not in harmless:
            choices = " or ".join(map(repr, harmless))
            raise UsageError(f"peft.{name}: {settings[name]!r} would change the base model too; choose {choices}")
    try:
        with quiet_peft(), torch.random.fork_rng():
            torch.manual_seed(seed)
            task = "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
            config = LoraConfig(task_type=task, **settings)
            adapted: PreTrainedModel = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise UsageError(f"peft: LoRA with {settings} was refused: {error}") from error
    return adapted
