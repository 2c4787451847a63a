"""Key-value caches in preallocated memory; transformers' own cache is copied at every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """A ``DynamicLayer`` whose keys and values [N, heads, t, D] lie in buffers for ``capacity`` tokens.

    ``dtype`` is the dtype of the buffers, so that attention does not cast them at every token; None: that of the keys.
    """

    def __init__(self, layer: DynamicLayer, capacity: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = dtype or layer.keys.dtype, layer.device, True
        self.capacity = capacity
        self.keys, self.key_buffer = self._reserved(layer.keys)
        self.values, self.value_buffer = self._reserved(layer.values)

    def _reserved(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of ``states`` at the beginning of a new buffer, and the whole buffer."""
        n, heads, length, width = states.shape
        buffer = states.new_empty(n, heads, max(self.capacity, length), width, dtype=self.dtype)
        buffer[:, :, :length] = states
        return buffer[:, :, :length], buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens; returns those of all tokens."""
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if stop > self.capacity:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.key_buffer[:, :, start:stop] = key_states
        self.value_buffer[:, :, start:stop] = value_states
        self.keys, self.values = self.key_buffer[:, :, :stop], self.value_buffer[:, :, :stop]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue with the given rows, in this order."""
        self.keys, self.key_buffer = self._reserved(self.keys[beam_idx])
        self.values, self.value_buffer = self._reserved(self.values[beam_idx])


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """A ``StaticLayer`` of ``capacity`` tokens that holds keys and values in one dtype.

    Under autocast they may come in two dtypes. Without ``dtype`` the layer takes that of the keys.
    """

    def __init__(self, capacity: int, dtype: torch.dtype | None) -> None:
        super().__init__(max_cache_len=capacity)
        self.cache_dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens; returns those of all tokens."""
        dtype = self.cache_dtype or key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)  # type: ignore[no-any-return]


def reserve(cache: Any, capacity: int, dtype: torch.dtype | None = None) -> None:
    """Replace the ``DynamicLayer`` objects of a cache by layers with room for ``capacity`` tokens; leave the others.

    The cross-attention cache of an encoder–decoder model does not grow, so it stays as it is.
    """
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            layers[i] = ReservedLayer(layer, capacity, dtype)
