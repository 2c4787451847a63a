"""Where tokens lead from each state of a guide: places times counts, so that a row per place serves all its counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transitions:
    """A table [S, V] of S = F · K states that is not written out; state f · K + k is place f with count k.

    ``places`` [F, V] gives the place after a token, F + f where the token ends the text in place f; ``changes`` [F, V]
    the row of ``counts`` [C, K], which gives the count after each count. Indexed by states, or by states and tokens.
    """

    places: Tensor
    changes: Tensor
    counts: Tensor

    @staticmethod
    def of(table: Tensor) -> Transitions:
        """The same for a table [S, V] that is written out."""
        return Transitions(table, torch.zeros_like(table, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.long))

    @property
    def shape(self) -> tuple[int, int]:
        """S and V."""
        return len(self.places) * self.counts.shape[1], self.places.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | int | slice | tuple[Tensor | int | slice, Tensor | int | slice]) -> Tensor:
        of_states, of_tokens = index if isinstance(index, tuple) else (index, slice(None))
        states = torch.arange(len(self), device=self.places.device)[of_states]
        whole_rows = isinstance(of_tokens, slice)
        if self.counts.shape[1] == 1:
            return self.places[states, of_tokens].long()
        place, count = states // self.counts.shape[1], states % self.counts.shape[1]
        # In place, as there may be a row of the vocabulary for each of thousands of states.
        after = self.changes[place, of_tokens].long()
        after.mul_(self.counts.shape[1]).add_(count[..., None] if whole_rows else count)
        return self.counts.take(after).add_(self.places[place, of_tokens], alpha=self.counts.shape[1])

    def to(self, device: torch.device | str) -> Transitions:
        """The same on another device."""
        return Transitions(self.places.to(device), self.changes.to(device), self.counts.to(device))

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.places.device
