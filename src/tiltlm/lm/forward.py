"""The result of a forward pass, whose logits are computed a few positions at a time.

The logits of N sequences of T tokens over V words are by far the largest tensor of a training step. Only a few rows of
them exist at a time, so memory does not grow with N · T · V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from tiltlm.lm.guide import LogitBias

# A strip of logits stays in a CPU's cache. A piece has as many bytes, but at least so many rows that a matrix product
# over it is fast.
PIECE_BYTES = {"cpu": 4 * 2**20}
PIECE_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 128


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass over P positions: ``hidden`` [P, H], and ``weight`` [V, H], ``bias`` [V] of the output layer.

    Without a weight ``hidden`` holds the logits [P, V] themselves. ``compute`` is the dtype of the product.
    ``logit_bias`` is that of the model's own guide.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    compute: torch.dtype
    logit_bias: LogitBias | None = None

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, logit_bias: LogitBias | None = None
    ) -> ForwardPass:
        """With the dtype in which the output layer computes, under autocast or not."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            return cls(hidden, weight, bias, torch.get_autocast_dtype(device), logit_bias)
        return cls(hidden, weight, bias, (hidden if weight is None else weight).dtype, logit_bias)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def width(self) -> int:
        """The number V of tokens."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def piece_bytes(self) -> int:
        """Bytes of a strip in float32, and of a piece unless it has the fewest rows."""
        return PIECE_BYTES.get(self.hidden.device.type, PIECE_BYTES_ELSEWHERE)

    @property
    def piece_rows(self) -> int:
        """Positions of a piece at most."""
        return max(FEWEST_ROWS, self.piece_bytes // (4 * self.width))

    def pieces(self) -> Iterator[slice]:
        """Positions, as many at a time as a piece of logits holds."""
        return split(slice(0, len(self)), self.piece_rows)

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """Each strip, with the piece that it belongs to."""
        rows = max(1, self.piece_bytes // (4 * self.width))
        return ((piece, strip) for piece in self.pieces() for strip in split(piece, rows))

    def logits(self, piece: slice) -> Tensor:
        """Logits [p, V] of these positions, in float32 or better."""
        found = self.hidden[piece]
        if self.weight is not None:
            found = linear(found, self.weight, self.bias)
        found = found if found.dtype == torch.float64 else found.float()
        return found if self.logit_bias is None else found + self.logit_bias.at(piece).to(found)

    def cast(self) -> ForwardPass:
        """The same, with everything in the dtype of the product."""
        weight = self.weight.to(self.compute) if self.weight is not None else None
        bias = self.bias.to(self.compute) if self.bias is not None else None
        return ForwardPass(self.hidden.to(self.compute), weight, bias, self.compute, self.logit_bias)


def split(whole: slice, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))
