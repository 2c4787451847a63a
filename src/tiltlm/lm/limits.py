"""Limits of a model and of its arguments: positions, the start token, whole numbers."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

from tiltlm.errors import ModelError, UsageError
from tiltlm.lm.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_length(config: Any, prompts: Prompts, completion: int, *, name: str, is_encoder_decoder: bool) -> None:
    """Raise UsageError, which names the longest prompt, if the model ``name`` has too few positions for the tokens."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    row = int(prompts.lengths.argmax())
    longest = int(prompts.lengths[row])
    which = f"prompt {prompts.ids[row] + 1}, {prompts.texts[row]!r:.60}," if len(prompts) > 1 else "a prompt"
    # The last token needs no position. A decoder's positions hold its start token and the completion, but no prompt.
    room = positions if is_encoder_decoder else positions + 1 - longest
    if is_encoder_decoder and longest > positions:
        raise UsageError(
            f"prompts: {which} of {longest} tokens has more than the {positions} positions of '{name}'; shorten it"
        )
    if completion > room:
        after = "" if is_encoder_decoder else f"after {which} of {longest} "
        raise UsageError(
            f"max_completion_length: {completion} tokens {after}are more than the {positions} positions of "
            f"'{name}'; " + (f"ask for at most {room}, or shorten the prompts" if room > 0 else "shorten the prompts")
        )


def start_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that a completion without a prompt starts after. Raises ModelError if a decoder has none."""
    if not model.config.is_encoder_decoder:
        return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for place in (model.generation_config, model.config):
            if getattr(place, name, None) is not None:
                return int(getattr(place, name))
    raise ModelError("model: its config.json has no decoder_start_token_id; the decoder needs a token to start from")


def check_whole(name: str, value: int | None, least: int) -> None:
    """Raise UsageError unless ``value`` is None or a whole number of at least ``least``."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
        raise UsageError(f"{name}: {value!r} must be a whole number, at least {least}")
