"""Key-value caches with room for the tokens to come, where transformers' own is copied at every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A ``DynamicLayer`` whose keys and values [N, heads, t, D] lie in memory reserved for ``capacity`` tokens.

    They are held in ``dtype``, where it is given, so that attention does not cast them at every token.
    """

    def __init__(self, layer: DynamicLayer, capacity: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = dtype or layer.keys.dtype, layer.device, True
        self.capacity = capacity
        self.keys, self.key_room = self._reserved(layer.keys)
        self.values, self.value_room = self._reserved(layer.values)

    def _reserved(self, held: Tensor) -> tuple[Tensor, Tensor]:
        n, heads, length, width = held.shape
        room = held.new_empty(n, heads, max(self.capacity, length), width, dtype=self.dtype)
        room[:, :, :length] = held
        return room[:, :, :length], room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of the next tokens, and give those of all."""
        start, stop = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if stop > self.capacity:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        self.key_room[:, :, start:stop] = key_states
        self.value_room[:, :, start:stop] = value_states
        self.keys, self.values = self.key_room[:, :, :stop], self.value_room[:, :, :stop]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows, in this order, for all."""
        self.keys, self.key_room = self._reserved(self.keys[beam_idx])
        self.values, self.value_room = self._reserved(self.values[beam_idx])


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """A ``StaticLayer`` of ``capacity`` tokens, in ``dtype``: under autocast keys and values may come in two of them.

    Without one it is the keys'.
    """

    def __init__(self, capacity: int, dtype: torch.dtype | None) -> None:
        super().__init__(max_cache_len=capacity)
        self.wanted = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the keys and values of the next tokens, and give those of all."""
        dtype = self.wanted or key_states.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)  # type: ignore[no-any-return]


def reserve(cache: Any, capacity: int, dtype: torch.dtype | None = None) -> None:
    """Give every plain layer of a model's cache room for ``capacity`` tokens in all; leave the others as they are.

    What a decoder keeps of its encoder does not grow.
    """
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])
    for i, layer in enumerate(layers):
        if type(layer) is DynamicLayer and layer.get_seq_length() > 0:
            layers[i] = RoomyLayer(layer, capacity, dtype)
