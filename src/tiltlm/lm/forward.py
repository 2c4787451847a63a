"""The result of a forward pass, whose logits are computed a few positions at a time.

Logits [N, T, V] would be by far the largest tensor of a training step. Only a few positions exist at a time, so memory
does not grow with N · T · V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from tiltlm.lm.guide import LogitBias

# Positions are processed in pieces, and each piece in strips. A strip of logits fits a CPU's cache. A piece has as many
# bytes, but at least FEWEST_ROWS rows, so that its matrix product is fast.
PIECE_BYTES = {"cpu": 4 * 2**20}
PIECE_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 128


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass over P positions: ``hidden`` [P, H], and the output layer's ``weight`` [V, H] and ``bias`` [V].

    Without a weight ``hidden`` holds the logits [P, V]. ``compute`` is the dtype of the matrix product. ``logit_bias``
    comes from the model's own guide.
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
        """A forward pass with the dtype in which the output layer computes, with or without autocast."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            return cls(hidden, weight, bias, torch.get_autocast_dtype(device), logit_bias)
        return cls(hidden, weight, bias, (hidden if weight is None else weight).dtype, logit_bias)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def width(self) -> int:
        """The size V of the vocabulary."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def piece_bytes(self) -> int:
        """Bytes of a strip of float32 logits, and of a piece with more than the fewest rows."""
        return PIECE_BYTES.get(self.hidden.device.type, PIECE_BYTES_ELSEWHERE)

    @property
    def piece_rows(self) -> int:
        """The largest number of positions in a piece."""
        return max(FEWEST_ROWS, self.piece_bytes // (4 * self.width))

    def pieces(self) -> Iterator[slice]:
        """The positions of each piece."""
        return split(slice(0, len(self)), self.piece_rows)

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """Each strip, after the piece it belongs to."""
        rows = max(1, self.piece_bytes // (4 * self.width))
        return ((piece, strip) for piece in self.pieces() for strip in split(piece, rows))

    def logits(self, piece: slice) -> Tensor:
        """Logits [p, V] of the positions ``piece``, in float32 or better."""
        found = self.hidden[piece]
        if self.weight is not None:
            found = linear(found, self.weight, self.bias)
        found = found if found.dtype == torch.float64 else found.float()
        return found if self.logit_bias is None else found + self.logit_bias.at(piece).to(found)

    def cast(self) -> ForwardPass:
        """The forward pass with all tensors in the dtype of the matrix product."""
        weight = self.weight.to(self.compute) if self.weight is not None else None
        bias = self.bias.to(self.compute) if self.bias is not None else None
        return ForwardPass(self.hidden.to(self.compute), weight, bias, self.compute, self.logit_bias)


def split(whole: slice, size: int) -> Iterator[slice]:
    """Consecutive parts of ``whole`` with ``size`` elements each; the last may be shorter."""
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))
