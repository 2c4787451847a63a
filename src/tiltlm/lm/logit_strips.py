"""Logits of a forward pass strip by strip, and their gradients, in memory that is used again."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.lm.forward import FEWEST_ROWS, ForwardPass, split

# For gradients of logits in 16 bits that are multiplied at once: below the size that the C library maps anew each time.
HELD_BYTES = 31 * 2**20


class Scratch:
    """Memory [s, V] for each intermediate result by name, used again for all strips.

    Allocating it anew for each strip fragments memory to several times as much on a CPU.
    """

    def __init__(self, forward: ForwardPass) -> None:
        self.dtype = torch.float64 if forward.hidden.dtype == torch.float64 else torch.float32
        self.device, self.width, self.held = forward.hidden.device, forward.width, dict[str, Tensor]()
        self.rows = 0

    def start(self, strip: slice) -> None:
        """Begin a strip; none has more rows than the first."""
        self.rows = strip.stop - strip.start

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.held:
            self.held[name] = torch.empty(self.rows, self.width, dtype=self.dtype, device=self.device)
        return self.held[name][: self.rows]


class StripLogits:
    """Logits strip by strip; the matrix product is taken for a whole piece."""

    def __init__(self, forward: ForwardPass) -> None:
        self.forward = forward
        self.room: Tensor | None = None
        self.product = forward.hidden

    def at(self, piece: slice, strip: slice, scratch: Scratch) -> Tensor:
        """Logits [s, V] of a strip, in float32 or better; the caller may overwrite them."""
        found = self._plain(piece, strip, scratch)
        return found if self.forward.logit_bias is None else found.add_(self.forward.logit_bias.at(strip).to(found))

    def _plain(self, piece: slice, strip: slice, scratch: Scratch) -> Tensor:
        if self.forward.weight is None:
            return scratch["logits"].copy_(self.forward.hidden[strip])
        if strip.start == piece.start:
            self.product = self._multiplied(self.forward.hidden[piece], self.forward.weight)
        found = self.product[strip.start - piece.start : strip.stop - piece.start]
        return found if found.dtype == scratch.dtype else scratch["logits"].copy_(found)

    def _multiplied(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.room is None:
            self.room = hidden.new_empty(len(hidden), len(weight))
        room, bias = self.room[: len(hidden)], self.forward.bias
        if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            # There every such product first rearranges its right factor; this order spares the weight.
            room.copy_(torch.mm(weight, hidden.T).T)
            return room if bias is None else room.add_(bias)
        return torch.mm(hidden, weight.T, out=room) if bias is None else torch.addmm(bias, hidden, weight.T, out=room)


class GatheredRows:
    """Rows [r, V] of several strips, gathered for one product in its dtype."""

    def __init__(self, forward: ForwardPass, most: int) -> None:
        self.table = forward.hidden.new_empty(min(most, len(forward)), forward.width)
        self.start = self.stop = 0

    def has_room(self, strip: slice) -> bool:
        return bool(strip.stop - self.start <= len(self.table))

    def put(self, strip: slice, rows: Tensor) -> None:
        self.table[self.stop - self.start : strip.stop - self.start].copy_(rows)
        self.stop = strip.stop

    def take(self) -> tuple[slice, Tensor]:
        """The positions and rows put since the last call."""
        positions = slice(self.start, self.stop)
        self.start = self.stop
        return positions, self.table[: positions.stop - positions.start]


class LogitGradients:
    """Gradients of hidden states [P, H] and of the weight [V, H], in these dtypes (None: not needed).

    Gradients of logits are gathered in the dtype of the product, so that many rows are multiplied at once. A product in
    16 bits cannot add to a sum in 32 bits, and with a large vocabulary that sum is larger than a piece: then more rows
    are gathered and multiplied for some words at a time. ``of_weight`` may start from a sum.
    """

    def __init__(self, policy: ForwardPass, hidden: torch.dtype | None, weight: torch.dtype | None, many: bool) -> None:
        self.policy, self.hidden_dtype, self.weight_dtype = policy, hidden, weight
        self.of_hidden: list[Tensor] = []
        self.of_weight: Tensor | None = None
        self.adds = policy.hidden.dtype == weight
        enough = policy.piece_rows if self.adds else HELD_BYTES // (policy.hidden.element_size() * policy.width)
        self.rows = None if many else GatheredRows(policy, max(FEWEST_ROWS, enough))

    def take(self, strip: slice, of_logits: Tensor) -> None:
        """Add the gradient [s, V] of the logits of the next strip."""
        if self.rows is None:
            self._multiply(strip, of_logits)
            return
        if not self.rows.has_room(strip):
            self._multiply(*self.rows.take())
        self.rows.put(strip, of_logits)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Both, over all strips."""
        if self.rows is not None:
            self._multiply(*self.rows.take())
        return torch.cat(self.of_hidden) if self.of_hidden else None, self.of_weight

    def _multiply(self, positions: slice, of_logits: Tensor) -> None:
        weight = self.policy.weight
        if self.hidden_dtype is not None:
            part = of_logits.clone() if weight is None else of_logits @ weight
            self.of_hidden.append(part.to(self.hidden_dtype))
        if self.weight_dtype is None or weight is None:
            return
        hidden = self.policy.hidden[positions]
        if self.of_weight is None:
            if self.adds:
                self.of_weight = of_logits.T @ hidden
                return
            self.of_weight = hidden.new_zeros(weight.shape, dtype=self.weight_dtype)
        if self.adds:
            self.of_weight.addmm_(of_logits.T, hidden)
            return
        for words in split(slice(0, len(weight)), max(FEWEST_ROWS, self.policy.piece_bytes // hidden[0].nbytes)):
            self.of_weight[words].add_(of_logits[:, words].T @ hidden)
