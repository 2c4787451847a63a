"""Loading tokenizers, weights and adapters from a folder or the hub, and choosing a device."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from tiltlm.errors import ModelError, UsageError, nearest, why_not_loaded
from tiltlm.lm.embedded import EMBEDDED, embedded_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; ``kwargs`` go to ``AutoTokenizer.from_pretrained``.

    Raises ModelError when it cannot be loaded, or has neither a BOS nor an EOS token.
    """
    from transformers import AutoTokenizer

    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(_source(name), **kwargs)
        # For a folder without tokenizer files transformers may build one with an empty vocabulary.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("there are no tokenizer files (tokenizer.json, tokenizer.model, vocab.json ...).")
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(f"model: the tokenizer of '{name}' has neither a BOS nor an EOS token to start from")
    return tokenizer


def load_weights(name: str, dtype: str, **kwargs: Any) -> PreTrainedModel:
    """A causal or encoder–decoder language model, from safetensors only; ``kwargs`` go to ``from_pretrained``.

    If ``name`` is a PEFT adapter, this is its base model with the adapter merged into the weights. Raises UsageError
    for an unknown dtype, ModelError for weights that are missing, damaged or incomplete.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils.peft_utils import find_adapter_config_file

    if dtype not in DTYPES:
        raise UsageError(f"dtype: '{dtype}' is not known; {nearest(str(dtype), DTYPES)}")
    with _explained(name, "model"):
        if find_adapter_config_file(_source(name), revision=kwargs.get("revision")) is not None:
            return _merged_adapter(name, dtype, **kwargs)
        is_encoder_decoder = AutoConfig.from_pretrained(_source(name), **kwargs).is_encoder_decoder
        model, info = (AutoModelForSeq2SeqLM if is_encoder_decoder else AutoModelForCausalLM).from_pretrained(
            _source(name),
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported below, not only in the log
            **kwargs,
        )
        for key, stored, wanted in sorted(info["mismatched_keys"]):
            raise ValueError(
                f"its weight {key} has shape {tuple(stored)}, but its config.json asks for {tuple(wanted)}."
            )
        # transformers would continue with random numbers.
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(f"{len(missing)} of its weights are not in the file, among them {missing[0]}.")
    return model


def _merged_adapter(name: str, dtype: str, **kwargs: Any) -> PreTrainedModel:
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(name, revision=kwargs.get("revision"))
    base = load_weights(str(adapter.base_model_name_or_path), dtype, **{**kwargs, "revision": adapter.revision})
    merged: PreTrainedModel = load_adapter(base, name, revision=kwargs.get("revision")).merge_and_unload()
    merged.requires_grad_(True)  # peft froze the weights
    return merged


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Hide peft's warnings about Conv1D layers, which it corrects itself, and about a name that it deprecated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set|`is_gradient_checkpointing`")
        yield


def load_adapter(model: PreTrainedModel, name: str, **kwargs: Any) -> Any:
    """``model`` with a trained PEFT adapter, from safetensors; ``kwargs`` go to peft.

    Raises ModelError when it cannot be loaded.
    """
    from peft import PeftModel

    with _explained(name, "adapter"), quiet_peft():
        return PeftModel.from_pretrained(model, name, is_trainable=False, use_safetensors=True, **kwargs)


def resolve_device(device: str) -> torch.device:
    """The device to use; ``auto`` is CUDA, else MPS, else the CPU. Raises UsageError for one that is not available."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device: '{device}' cannot be used here ({reason}); try auto, cpu or cuda") from error
    return resolved


def _source(name: str) -> str:
    return str(embedded_path()) if name == EMBEDDED else name


@contextlib.contextmanager
def _explained(name: str, part: str) -> Iterator[None]:
    """Turn any error of transformers, tokenizers or safetensors into one ModelError."""
    try:
        yield
    except (ModelError, UsageError):
        raise
    except Exception as error:
        where, reason = why_not_loaded(name, error)
        raise ModelError(
            f"model: no {part} could be loaded from '{name}' ({where}): {reason}. "
            f"Use 'embedded', a folder saved by save_pretrained (safetensors and tokenizer), or a hub name."
        ) from error
