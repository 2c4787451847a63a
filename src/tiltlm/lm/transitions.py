"""The transition table of a guide in factored form: a state is a place and a count, and a table row serves a place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Transitions:
    """A table [S, V] of next states, stored as factors: state f · K + k is place f of F with count k of K, S = F · K.

    ``places`` [F, V] gives the place after a token, and F + f if the token ends the text in place f. ``changes`` [F, V]
    names a row of ``counts`` [C, K], which gives the new count for each old count. Index it like the table itself: by
    states, or by states and tokens.
    """

    places: Tensor
    changes: Tensor
    counts: Tensor

    @staticmethod
    def of(table: Tensor) -> Transitions:
        """The factored form of a table [S, V]: every state is a place, and there is one count."""
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
        # In place, because there may be thousands of states times the vocabulary.
        after = self.changes[place, of_tokens].long()
        after.mul_(self.counts.shape[1]).add_(count[..., None] if whole_rows else count)
        return self.counts.take(after).add_(self.places[place, of_tokens], alpha=self.counts.shape[1])

    def to(self, device: torch.device | str) -> Transitions:
        """The transitions on another device."""
        return Transitions(self.places.to(device), self.changes.to(device), self.counts.to(device))

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.places.device
