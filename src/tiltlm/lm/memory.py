"""How many rows a model reads or samples at once: what fits a memory bound that no other process changes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes that one chunk's activations (or logits, where they are made) may take on a CPU; or as many as the weights take,
# which every chunk reads: smaller ones would do little else.
CPU_CHUNK_BYTES = 192 * 2**20
CPU_SAMPLING_BYTES = 2**30
COPIES_OF_LOGITS = 4
# Of a layer's activations that backward needs, per token: so many hidden and intermediate vectors.
HIDDEN_VECTORS, INTERMEDIATE_VECTORS = 10, 6


@dataclass(frozen=True)
class Memory:
    """What a model needs of memory, in bytes; all but ``weights`` are estimates.

    ``activations`` of a token in a pass with gradient, its ``logits`` where they are made, and what is ``cached`` of it
    while a row is sampled.
    """

    device: torch.device
    weights: int
    activations: int
    logits: int
    cached: int

    @staticmethod
    def of(model: PreTrainedModel, *, narrow: bool) -> Memory:
        """Of a model whose products are taken in 16 bits where ``narrow``."""
        config = model.config.get_text_config()
        first = next(model.parameters())
        width, layers = int(config.hidden_size), int(config.num_hidden_layers)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        # Products in 16 bits keep their inputs for backward in 16 bits; norms and attention keep theirs in 32.
        element = 3 if narrow else 4
        return Memory(
            device=first.device,
            weights=sum(p.numel() * p.element_size() for p in model.parameters()),
            activations=int(element * layers * (HIDDEN_VECTORS * width + INTERMEDIATE_VECTORS * inner)),
            logits=int(config.vocab_size) * 4 * COPIES_OF_LOGITS,
            cached=2 * 2 * layers * width * first.element_size(),  # keys and values, twice for a copy
        )

    @property
    def bound(self) -> int:
        """Bytes that a chunk may take."""
        if self.device.type == "cuda":
            # Of all memory: what is free changes from run to run, and the sizes of chunks decide the last bits.
            return int(torch.cuda.mem_get_info(self.device)[1] // 8)
        return max(CPU_CHUNK_BYTES, self.weights)

    def rows_at_once(self, length: int) -> int:
        """Rows of ``length`` tokens that may be sampled together: their logits and their caches fit the bound."""
        bound = self.bound if self.device.type == "cuda" else CPU_SAMPLING_BYTES
        return max(1, bound // (self.logits + self.cached * length))


def even_pieces(lengths: Sequence[int], budget: int) -> list[int]:
    """Numbers of rows, of ascending ``lengths``, in as few pieces as can be of ``budget`` tokens each with padding.

    Among such pieces those whose largest is least, so that none is full where another is nearly empty.
    """

    def pieces(budget: int) -> list[int]:
        rows = [0]
        for length in lengths:
            if rows[-1] and (rows[-1] + 1) * length > budget:
                rows.append(0)
            rows[-1] += 1
        return rows

    fewest = len(pieces(budget))
    return pieces(bisect_left(range(budget), True, key=lambda less: len(pieces(less)) <= fewest))
