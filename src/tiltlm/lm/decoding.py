"""Decoding: a model's state while it writes, token by token, with a cache that grows or, on a GPU, one that stays."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How far the logits of a replayed step may be from those of the same step taken one operation at a time.
REPLAY_TOLERANCE = 1e-2


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model without PEFT around it; its adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward takes this argument by name, which PEFT hides behind **kwargs."""
    return argument in inspect.signature(unwrapped(model).forward).parameters


def positions(mask: Tensor) -> Tensor:
    """Position of each token [N, L] when padding on the left does not count."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class Decoder:
    """A model's state while it decodes a batch of rows: its cache, its attention mask and its next input."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> None:
        self.model = model
        self.tokens = tokens
        self.mask = mask
        # Without padding no mask is needed, and attention takes its fast path.
        self.ragged = not bool(mask.all())
        self.pass_positions = self.ragged and accepts(model, "position_ids")
        self.cache: Any = None
        self.fresh = tokens

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token; a model without a cache reads its whole prefix again."""
        arguments: dict[str, Any] = {"input_ids": self.fresh, "use_cache": True}
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        if self.ragged:
            arguments["attention_mask"] = self.mask.long()
            if self.pass_positions:
                arguments["position_ids"] = positions(self.mask)[:, -self.fresh.shape[1] :]
        if accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        output = self.model(**arguments)
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor) -> None:
        """Take the drawn tokens [N] as the next input."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.fresh = self.tokens if self.cache is None else tokens[:, None]

    def keep(self, rows: Tensor) -> bool:
        """Take these rows [n], in this order, for all; False where the model's cache cannot do so."""
        if self.cache is not None:
            # Not batch_select_indices: it forgets the states of linear-attention layers.
            if not hasattr(self.cache, "reorder_cache"):
                return False
            self.cache.reorder_cache(rows)
        self.tokens, self.mask, self.fresh = self.tokens[rows], self.mask[rows], self.fresh[rows]
        return True


class StaticDecoder(Decoder):
    """A decoder whose cache has its full size from the start, so that a GPU can replay a step as one graph.

    A step of a small batch is hundreds of kernels that take less time than it takes to launch them. The graph is tried
    out before it is used: where it cannot be captured, or gives other logits, steps go on one operation at a time.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, mask: Tensor, capacity: int, cache_dtype: torch.dtype | None
    ) -> None:
        from transformers import StaticCache

        from tiltlm.lm.cache import FixedLayer

        super().__init__(model, tokens, mask)
        self.capacity, self.steps = capacity, 0
        self.cache = StaticCache(config=model.config.get_text_config(), max_cache_len=capacity)
        self.cache.layers = [FixedLayer(capacity, cache_dtype) for _ in self.cache.layers]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_logits: Tensor | None = None

    def start(self) -> None:
        """From now on one token a row at a time, in memory that stays where it is."""
        rows, length = self.mask.shape
        self.fresh = self.tokens[:, -1:].clone()
        # Of what is not written yet the causal mask takes care.
        self.whole_mask = torch.ones(rows, self.capacity, dtype=torch.long, device=self.mask.device)
        self.whole_mask[:, :length] = self.mask.long()
        self.next_positions = positions(self.mask)[:, -1:].clone()

    def append(self, tokens: Tensor) -> None:
        """Take the drawn tokens [N] as the next input."""
        if self.steps == 0:
            self.start()
        self.steps += 1
        self.fresh.copy_(tokens[:, None])
        self.next_positions += 1

    def keep(self, rows: Tensor) -> bool:
        """Take these rows while the prompt has just been read; later the batch stays as it is."""
        return self.steps == 0 and super().keep(rows)

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token."""
        if self.steps == 0:
            return super().logits()
        if self.graph is not None and self.graph_logits is not None:
            self.graph.replay()
            return self.graph_logits
        logits = self._step()
        if self.steps == 1 and self.fresh.is_cuda:
            self._capture(logits)
        return logits

    def _step(self) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": self.fresh, "past_key_values": self.cache, "use_cache": True}
        if self.ragged:
            arguments["attention_mask"] = self.whole_mask
        if self.pass_positions:
            arguments["position_ids"] = self.next_positions
        return self.model(**arguments).logits[:, -1]  # type: ignore[no-any-return]

    def _capture(self, expected: Tensor) -> None:
        """Record the step just taken as a graph, and use it from now on if it gives the same logits."""
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            # Capturing runs nothing on the device; the replay repeats the step that has been taken.
            self._rewind()
            with torch.cuda.graph(graph):
                logits = self._step()
            graph.replay()
            same = (logits - expected).abs().max() <= REPLAY_TOLERANCE * expected.abs().max()
            if bool(same):
                self.graph, self.graph_logits = graph, logits
                return
        # As if it had not been tried.
        self._rewind()
        self._step()

    def _rewind(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.tokens.shape[1] + self.steps - 1)


def can_be_static(model: PreTrainedModel) -> bool:
    """Whether the model writes on a GPU, with a cache whose size may be fixed and whose layers all attend to it all."""
    from transformers.cache_utils import StaticCache, StaticLayer

    if model.device.type != "cuda" or not getattr(model, "_can_compile_fullgraph", False):
        return False
    layers = StaticCache(config=model.config.get_text_config(), max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers)
