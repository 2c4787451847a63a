"""Mixed precision: matrix products in bfloat16 where the hardware supports it, weights and sums in float32."""

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
# The same function as NewGELUActivation, which under autocast runs eight float32 operations and saves each input.
FUSED_GELU = nn.GELU(approximate="tanh")


def native_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 instructions; without them bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def attend_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in float32 on a CPU, where torch's bfloat16 backward is many times slower on short sequences."""
    with torch.autocast("cpu", enabled=False):
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
        return attended


AttentionInterface.register(FLOAT32_ATTENTION, attend_in_float32)
AttentionMaskInterface.register(FLOAT32_ATTENTION, sdpa_mask)


@contextlib.contextmanager
def computing(model: PreTrainedModel, dtype: torch.dtype | None) -> Iterator[None]:
    """Compute matrix products in ``dtype`` within the block; None changes nothing."""
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
    """The dtype of the key-value cache when products are computed in ``dtype``; None: that of the keys."""
    return torch.float32 if dtype is not None and device.type == "cpu" else dtype


@contextlib.contextmanager
def cast_weights(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Replace the weights of linear layers by copies in ``dtype`` within the block, so that they are cast only once.

    The parameters themselves come back unchanged, also for tied layers and optimizers. Every backward adds the
    gradient of a copy to ``grad`` of its parameter, in the parameter's dtype. ``torch.autograd.grad`` does not reach
    the parameters.
    """
    replaced = _linear_parameters(model) if dtype is not None else []
    try:
        _replace_by_copies(replaced, dtype)
        yield
    finally:
        for layer, name, parameter in replaced:
            layer._parameters[name] = parameter


def keep_cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the weights of linear layers to ``dtype`` for good, in a model that is never trained again.

    The model's distribution does not change, because products are computed from the cast weights anyway. An embedding
    that is tied to a linear layer keeps its dtype.
    """
    model.requires_grad_(False)
    if dtype is not None:
        _replace_by_copies(_linear_parameters(model), dtype)


def _linear_parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The parameters of linear layers: layer, name in the layer, parameter."""
    layers = [module for module in model.modules() if type(module) in (nn.Linear, Conv1D)]
    return [(layer, name, p) for layer in layers for name, p in layer._parameters.items() if p is not None]


def _replace_by_copies(listed: list[tuple[nn.Module, str, nn.Parameter]], dtype: torch.dtype | None) -> None:
    copies: dict[nn.Parameter, nn.Parameter] = {}
    for layer, name, parameter in listed:
        if parameter.dtype != dtype:
            if parameter not in copies:
                copies[parameter] = _copy(parameter, dtype)
            layer._parameters[name] = copies[parameter]


def _copy(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
    if parameter.requires_grad:
        copied.original = parameter  # type: ignore[attr-defined]
        copied.register_post_accumulate_grad_hook(_move_gradient)  # type: ignore[no-untyped-call]
    return copied


def _move_gradient(copied: Tensor) -> None:
    """Add the gradient of a copy to that of its parameter."""
    gradient, copied.grad = copied.grad, None
    # NextTokenFunction adds its gradient to the original itself and leaves none.
    if gradient is not None:
        add_gradient(copied.original, gradient)  # type: ignore[attr-defined]


def original_of(weight: Tensor) -> nn.Parameter | None:
    """The trained parameter of which ``weight`` is a copy made by ``cast_weights``; None for any other tensor."""
    return getattr(weight, "original", None)


@torch.no_grad()
def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add ``gradient`` to the accumulated gradient of a parameter, in the parameter's dtype."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


@contextlib.contextmanager
def sparse_lookups(model: nn.Module) -> Iterator[None]:
    """Make gradients of embeddings sparse within the block, so that a backward only touches the rows it looked up.

    A dense gradient is a new table of zeros at every backward, which is slow on a CPU.
    """
    tables = [m for m in model.modules() if type(m) is nn.Embedding and m.weight.requires_grad]
    tables = [table for table in tables if not (table.sparse or table.scale_grad_by_freq)]
    weights: set[Any] = {table.weight for table in tables}
    hooks = [weight.register_post_accumulate_grad_hook(_to_dense) for weight in weights]
    try:
        for table in tables:
            table.sparse = True
        yield
    finally:
        for table in tables:
            table.sparse = False
        for hook in hooks:
            hook.remove()


def _to_dense(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
