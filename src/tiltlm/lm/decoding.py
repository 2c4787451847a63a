"""Decoding: a model's state while it generates token by token, with a growing cache or, on a GPU, one of fixed size."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest difference between the logits of a replayed and of an ordinary step, relative to the largest logit.
REPLAY_TOLERANCE = 1e-2


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its PEFT wrapper; adapters stay in its layers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward names this argument; PEFT's own forward only has **kwargs."""
    return argument in inspect.signature(unwrapped(model).forward).parameters


def positions(mask: Tensor) -> Tensor:
    """Positions [N, L] of tokens, counted from the first one that is not padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class Decoder:
    """The state of a batch of rows [N] while a model generates: cache, attention mask and next input."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> None:
        self.model = model
        self.tokens = tokens
        self.mask = mask
        # Without padding no mask is passed, so that attention takes its fast path.
        self.ragged = not bool(mask.all())
        self.pass_positions = self.ragged and accepts(model, "position_ids")
        self.cache: Any = None
        self.next_input = tokens

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token; a model without a cache reads the whole prefix at every step."""
        arguments: dict[str, Any] = {"input_ids": self.next_input, "use_cache": True}
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        if self.ragged:
            arguments["attention_mask"] = self.mask.long()
            if self.pass_positions:
                arguments["position_ids"] = positions(self.mask)[:, -self.next_input.shape[1] :]
        if accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        output = self.model(**arguments)
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor) -> None:
        """Take the drawn tokens [N] as the next input."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.next_input = self.tokens if self.cache is None else tokens[:, None]

    def keep(self, rows: Tensor) -> bool:
        """Continue with the given rows [n], in this order; False if the model's cache cannot be reordered."""
        if self.cache is not None:
            # Not batch_select_indices: it forgets the states of linear-attention layers.
            if not hasattr(self.cache, "reorder_cache"):
                return False
            self.cache.reorder_cache(rows)
        self.tokens, self.mask, self.next_input = self.tokens[rows], self.mask[rows], self.next_input[rows]
        return True


class StaticDecoder(Decoder):
    """A decoder whose cache has its final size from the start, so that a GPU can replay a step as one CUDA graph.

    A step of a small batch is hundreds of kernels, and launching them takes longer than running them. The graph is
    tested once: if capturing fails or the replayed logits differ, every step runs without a graph.
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
        """Prepare inputs of one token a row, in memory whose address does not change."""
        rows, length = self.mask.shape
        self.next_input = self.tokens[:, -1:].clone()
        # The causal mask hides the positions that are not written yet.
        self.full_mask = torch.ones(rows, self.capacity, dtype=torch.long, device=self.mask.device)
        self.full_mask[:, :length] = self.mask.long()
        self.next_positions = positions(self.mask)[:, -1:].clone()

    def append(self, tokens: Tensor) -> None:
        """Take the drawn tokens [N] as the next input."""
        if self.steps == 0:
            self.start()
        self.steps += 1
        self.next_input.copy_(tokens[:, None])
        self.next_positions += 1

    def keep(self, rows: Tensor) -> bool:
        """Continue with the given rows [n]; possible right after the prompt, and False later."""
        return self.steps == 0 and super().keep(rows)

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token."""
        if self.steps == 0:
            return super().logits()
        if self.graph is not None and self.graph_logits is not None:
            self.graph.replay()
            return self.graph_logits
        logits = self._step()
        if self.steps == 1 and self.next_input.is_cuda:
            self._capture(logits)
        return logits

    def _step(self) -> Tensor:
        arguments: dict[str, Any] = {"input_ids": self.next_input, "past_key_values": self.cache, "use_cache": True}
        if self.ragged:
            arguments["attention_mask"] = self.full_mask
        if self.pass_positions:
            arguments["position_ids"] = self.next_positions
        return self.model(**arguments).logits[:, -1]  # type: ignore[no-any-return]

    def _capture(self, expected: Tensor) -> None:
        """Record the last step as a graph; keep it if its replay gives the ``expected`` logits."""
        graph = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            # Capturing runs nothing on the device; the replay repeats the last step.
            self._rewind()
            with torch.cuda.graph(graph):
                logits = self._step()
            graph.replay()
            same = (logits - expected).abs().max() <= REPLAY_TOLERANCE * expected.abs().max()
            if bool(same):
                self.graph, self.graph_logits = graph, logits
                return
        # Restore the cache after a failed attempt.
        self._rewind()
        self._step()

    def _rewind(self) -> None:
        """Set the cache back to before the last step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.tokens.shape[1] + self.steps - 1)


def can_be_static(model: PreTrainedModel) -> bool:
    """Whether the model is on a GPU, works with a cache of fixed size, and has full attention in every layer."""
    from transformers.cache_utils import StaticCache, StaticLayer

    if model.device.type != "cuda" or not getattr(model, "_can_compile_fullgraph", False):
        return False
    layers = StaticCache(config=model.config.get_text_config(), max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers)
