"""bfloat16 where the hardware multiplies it natively: products in 16 bits, weights and sums in 32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

FLOAT32_ATTENTION = "tiltlm_float32"
# The same function as transformers' own, which under autocast is eight operations in float32 and keeps what each takes.
FUSED_GELU = nn.GELU(approximate="tanh")


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
    gelus = [(m, name, c) for m in model.modules() for name, c in m._modules.items() if type(c) is NewGELUActivation]
    try:
        if replaced:
            model.config._attn_implementation = FLOAT32_ATTENTION
        for module, name, _ in gelus:
            module._modules[name] = FUSED_GELU
        with torch.autocast(device, dtype=dtype):
            yield
    finally:
        if replaced:
            model.config._attn_implementation = attention
        for module, name, gelu in gelus:
            module._modules[name] = gelu


def cache_dtype(device: torch.device, dtype: torch.dtype | None) -> torch.dtype | None:
    """In what attention reads its keys and values while products are taken in ``dtype``; None: in what they come."""
    return torch.float32 if dtype is not None and device.type == "cpu" else dtype


@contextlib.contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Hold the weights of linear layers in ``dtype`` for the length of the block, so that no pass casts them anew.

    The layers' parameters themselves are put aside and come back as they were: what is tied to them, or trains them,
    does not notice. Gradients of their copies are added to ``grad`` of the parameters, in the dtype of these, at every
    backward; ``torch.autograd.grad`` does not reach them.
    """
    held = _of_linear_layers(model) if dtype is not None else []
    try:
        _replace_by_copies(held, dtype)
        yield
    finally:
        for layer, name, parameter in held:
            layer._parameters[name] = parameter


def keep_cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Hold the weights of linear layers in ``dtype`` from now on, for a model that is never trained again.

    Its law stays what it is, as products are taken of these numbers anyway; an embedding that is tied to a linear layer
    stays as it is.
    """
    model.requires_grad_(False)
    if dtype is not None:
        _replace_by_copies(_of_linear_layers(model), dtype)


def _of_linear_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters with the layer that each is in and its name there."""
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    return [(layer, name, p) for layer in layers for name, p in layer._parameters.items() if p is not None]


def _replace_by_copies(held: list[tuple[nn.Module, str, nn.Parameter]], dtype: torch.dtype | None) -> None:
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for layer, name, parameter in held:
        if parameter.dtype != dtype:
            if parameter not in copies:
                copies[parameter] = _copy(parameter, dtype)
            layer._parameters[name] = copies[parameter]


def _copy(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    if parameter.requires_grad:
        copied.original = parameter  # type: ignore[attr-defined]
        copied.register_post_accumulate_grad_hook(_hand_over)  # type: ignore[no-untyped-call]
    return copied


def _hand_over(copied: Tensor) -> None:
    gradient, copied.grad = copied.grad, None
    # A backward that has added its gradient to the original by itself leaves none.
    if gradient is not None:
        add_gradient(copied.original, gradient)  # type: ignore[attr-defined]


def original_of(weight: Tensor) -> nn.Parameter | None:
    """The parameter that trains where ``weight`` is its copy from ``cast_weights``; None for any other tensor."""
    return getattr(weight, "original", None)


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to the gradient that has accumulated on a parameter, in its dtype."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


@contextlib.contextmanager
def sparse_lookups(model: nn.Module) -> Iterator[None]:
    """Let a backward within the block touch only those rows of an embedding's gradient that were looked up.

    torch's own fills a table of zeros at every backward, which on a CPU takes as long as much of the rest of it.
    """
    tables = [m for m in model.modules() if type(m) is nn.Embedding and m.weight.requires_grad]
    tables = [table for table in tables if not (table.sparse or table.scale_grad_by_freq)]
    weights: set[Any] = {table.weight for table in tables}
    hooks = [weight.register_post_accumulate_grad_hook(_fill) for weight in weights]
    try:
        for table in tables:
            table.sparse = True
        yield
    finally:
        for table in tables:
            table.sparse = False
        for hook in hooks:
            hook.remove()


def _fill(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
