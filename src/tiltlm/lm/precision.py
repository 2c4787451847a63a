"""bfloat16 where the hardware multiplies it natively: products in 16 bits, weights and sums in 32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

FLOAT32_ATTENTION = "tiltlm_float32"


def native_bfloat16(device: torch.device) -> bool:
    """Whether this device has instructions for products of bfloat16; where it has not they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention on a CPU: torch's backward of it in bfloat16 is many times slower on short sequences."""
    with torch.autocast("cpu", enabled=False):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
        return attended


AttentionInterface.register(FLOAT32_ATTENTION, attend_in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


@contextlib.contextmanager
def computing(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Take products in ``dtype`` within the block; None leaves everything as it is."""
    if dtype is None:
        yield
        return
    device, attention = model.device.type, model.config._attn_implementation
    replaced = device == "cpu" and attention == "sdpa"
    try:
        if replaced:
            model.config._attn_implementation = FLOAT32_ATTENTION
        with torch.autocast(device, dtype=dtype):
            yield
    finally:
        if replaced:
            model.config._attn_implementation = attention


def cache_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """In what attention reads its keys and values while products are taken in ``dtype``; None: in what they come."""
    return torch.float32 if dtype is not None and device.type == "cpu" else dtype


@contextlib.contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold the weights of linear layers in ``dtype`` for the length of the block, so that no token casts them anew.

    The layers' parameters themselves are put aside and come back as they were: what is tied to them, or trains them,
    does not notice.
    """
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)] if dtype is not None else []
    held = [(layer, name, p) for layer in layers for name, p in layer._parameters.items() if p is not None]
    try:
        for layer, name, parameter in held:
            layer._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for layer, name, parameter in held:
            layer._parameters[name] = parameter
