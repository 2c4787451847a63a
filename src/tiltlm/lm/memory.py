"""Chunk sizes: how many rows a model scores or samples at once within a memory bound that never changes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes for the activations (or whole logits) of one chunk on a CPU. The bound is never below the size of the weights:
# smaller chunks would spend their time reading weights.
CPU_CHUNK_BYTES = 192 * 2**20
CPU_SAMPLING_BYTES = 2**30
COPIES_OF_LOGITS = 4
# Vectors of hidden and of intermediate size that a layer keeps for backward, per token.
HIDDEN_VECTORS, INTERMEDIATE_VECTORS = 10, 6


@dataclass(frozen=True)
class Memory:
    """Memory that a model needs, in bytes; all but ``weights`` are estimates.

    Per token: ``activations`` of a pass with gradient, ``logits`` where they exist as a whole, and the keys and values
    ``cached`` while sampling.
    """

    device: torch.device
    weights: int
    activations: int
    logits: int
    cached: int

    @staticmethod
    def of(model: PreTrainedModel, *, narrow: bool) -> Memory:
        """The needs of ``model``; ``narrow``: its products are computed in 16 bits."""
        config = model.config.get_text_config()
        first = next(model.parameters())
        width, layers = int(config.hidden_size), int(config.num_hidden_layers)
        inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
        # For backward, products in 16 bits keep 16-bit inputs; norms and attention keep 32-bit ones.
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
        """Bytes that one chunk may take."""
        if self.device.type == "cuda":
            # From the total, not the free memory: chunk sizes decide the last bits, and must be the same in every run.
            return int(torch.cuda.mem_get_info(self.device)[1] // 8)
        return max(CPU_CHUNK_BYTES, self.weights)

    def rows_at_once(self, length: int) -> int:
        """Number of rows of ``length`` tokens whose logits and caches fit the bound while sampling."""
        bound = self.bound if self.device.type == "cuda" else CPU_SAMPLING_BYTES
        return max(1, bound // (self.logits + self.cached * length))


def even_pieces(lengths: Sequence[int], budget: int) -> list[int]:
    """Split rows of ascending ``lengths`` into pieces of at most ``budget`` tokens with padding; returns their sizes.

    There are as few pieces as possible. Among such splits this is one whose largest piece is smallest. A row that is
    longer than the budget is a piece of its own.
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
