"""Logits of a forward pass strip by strip, and gradients from them, in buffers that are reused."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.lm.forward import FEWEST_ROWS, ForwardPass, split

# Bytes of 16-bit gradients of logits in one product; above 32 MiB the C library maps new memory each time.
GATHERED_BYTES = 31 * 2**20


class Scratch:
    """A buffer [s, V] for each intermediate result by name, reused for all strips.

    A new allocation for each strip would fragment memory, to several times its size on a CPU.
    """

    def __init__(self, forward: ForwardPass) -> None:
        self.dtype = torch.float64 if forward.hidden.dtype == torch.float64 else torch.float32
        self.device, self.width, self.buffers = forward.hidden.device, forward.width, dict[str, Tensor]()
        self.rows = 0

    def start(self, strip: slice) -> None:
        """Begin a strip. The first strip must be the largest."""
        self.rows = strip.stop - strip.start

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.buffers:
            self.buffers[name] = torch.empty(self.rows, self.width, dtype=self.dtype, device=self.device)
        return self.buffers[name][: self.rows]


class StripLogits:
    """Logits strip by strip; the matrix product is computed once for a whole piece."""

    def __init__(self, forward: ForwardPass) -> None:
        self.forward = forward
        self.buffer: Tensor | None = None
        self.product = forward.hidden

    def at(self, piece: slice, strip: slice, scratch: Scratch) -> Tensor:
        """Logits [s, V] of a strip, in float32 or better; the caller may overwrite them."""
        found = self._unbiased(piece, strip, scratch)
        return found if self.forward.logit_bias is None else found.add_(self.forward.logit_bias.at(strip).to(found))

    def _unbiased(self, piece: slice, strip: slice, scratch: Scratch) -> Tensor:
        if self.forward.weight is None:
            return scratch["logits"].copy_(self.forward.hidden[strip])
        if strip.start == piece.start:
            self.product = self._multiplied(self.forward.hidden[piece], self.forward.weight)
        found = self.product[strip.start - piece.start : strip.stop - piece.start]
        return found if found.dtype == scratch.dtype else scratch["logits"].copy_(found)

    def _multiplied(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.buffer is None:
            self.buffer = hidden.new_empty(len(hidden), len(weight))
        out, bias = self.buffer[: len(hidden)], self.forward.bias
        if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            # Such a product first rearranges its right factor in memory; in this order that is not the weight.
            out.copy_(torch.mm(weight, hidden.T).T)
            return out if bias is None else out.add_(bias)
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)


class GatheredRows:
    """Rows [r, V] of several strips, gathered for one matrix product, in its dtype."""

    def __init__(self, forward: ForwardPass, most: int) -> None:
        self.table = forward.hidden.new_empty(min(most, len(forward)), forward.width)
        self.start = self.stop = 0

    def has_room(self, strip: slice) -> bool:
        """Whether the rows of ``strip`` fit beside those gathered already."""
        return bool(strip.stop - self.start <= len(self.table))

    def put(self, strip: slice, rows: Tensor) -> None:
        """Add the rows [s, V] of the next strip."""
        self.table[self.stop - self.start : strip.stop - self.start].copy_(rows)
        self.stop = strip.stop

    def take(self) -> tuple[slice, Tensor]:
        """The gathered rows and their positions; gathering starts again."""
        positions = slice(self.start, self.stop)
        self.start = self.stop
        return positions, self.table[: positions.stop - positions.start]


class LogitGradients:
    """Gradients of hidden states [P, H] and of the weight [V, H], in the given dtypes (None: not needed).

    Gradients of logits are gathered in the dtype of the product, so that many rows are multiplied at once. A 16-bit
    product cannot accumulate into a 32-bit sum, and with a large vocabulary that sum is larger than a piece. In that
    case more rows are gathered, and multiplied for a part of the vocabulary at a time. ``of_weight`` may start from an
    earlier sum. ``batched``: under vmap, which needs a new tensor for each product.
    """

    def __init__(
        self, policy: ForwardPass, hidden: torch.dtype | None, weight: torch.dtype | None, batched: bool
    ) -> None:
        self.policy, self.hidden_dtype, self.weight_dtype = policy, hidden, weight
        self.of_hidden: list[Tensor] = []
        self.of_weight: Tensor | None = None
        self.accumulates = policy.hidden.dtype == weight
        enough = (
            policy.piece_rows if self.accumulates else GATHERED_BYTES // (policy.hidden.element_size() * policy.width)
        )
        self.rows = None if batched else GatheredRows(policy, max(FEWEST_ROWS, enough))

    def take(self, strip: slice, of_logits: Tensor) -> None:
        """Add the gradient [s, V] of the logits of the next strip."""
        if self.rows is None:
            self._multiply(strip, of_logits)
            return
        if not self.rows.has_room(strip):
            self._multiply(*self.rows.take())
        self.rows.put(strip, of_logits)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of hidden states and of the weight, over all strips."""
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
            if self.accumulates:
                self.of_weight = of_logits.T @ hidden
                return
            self.of_weight = hidden.new_zeros(weight.shape, dtype=self.weight_dtype)
        if self.accumulates:
            self.of_weight.addmm_(of_logits.T, hidden)
            return
        rows = max(FEWEST_ROWS, self.policy.piece_bytes // hidden[0].nbytes)
        for vocabulary in split(slice(0, len(weight)), rows):
            self.of_weight[vocabulary].add_(of_logits[:, vocabulary].T @ hidden)
