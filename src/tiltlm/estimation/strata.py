"""Strata: samples grouped by prompt, so that weights are normalized and sums taken within each prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Strata:
    """N samples in C prompts: ``index`` [N], from 0 to C − 1, is the prompt of each.

    With one prompt every method is the plain operation over all rows.
    """

    index: Tensor
    count: int

    @staticmethod
    def of(prompts: Tensor | None, n: int) -> Strata:
        """From any numbers that identify prompts [N]; None: one prompt."""
        if prompts is None:
            return Strata(torch.zeros(n, dtype=torch.long), 1)
        found, index = torch.unique(prompts.cpu(), return_inverse=True)
        return Strata(index, max(1, len(found)))

    @property
    def sizes(self) -> Tensor:
        """Samples of each prompt [C], in float64."""
        return torch.bincount(self.index, minlength=self.count).double()

    def select(self, rows: Tensor) -> Strata:
        """The same of these rows [N], a boolean mask; prompts without a sample are dropped."""
        return Strata.of(self.index[rows], int(rows.sum())) if self.count > 1 else Strata(self.index[rows], 1)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each prompt [C, ...] of values [N, ...]."""
        if self.count == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.index, values)

    def mean(self, values: Tensor) -> Tensor:
        """Means over each prompt [C, ...] of values [N, ...]."""
        return self.sum(values) / self.sizes.reshape(-1, *[1] * (values.ndim - 1))

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest [C] of values [N] in each prompt."""
        start = values.new_zeros(self.count)
        return (
            start.scatter_reduce(0, self.index, values, "amin", include_self=False),
            start.scatter_reduce(0, self.index, values, "amax", include_self=False),
        )

    def logsumexp(self, values: Tensor) -> Tensor:
        """log Σ exp of values [N] over each prompt [C]; −inf for a prompt with only −inf or no values."""
        if self.count == 1:
            return values.logsumexp(0, keepdim=True)
        largest = values.new_full((self.count,), -torch.inf).scatter_reduce(0, self.index, values, "amax")
        shift = torch.where(largest > -torch.inf, largest, 0.0)
        return self.sum((values - shift[self.index]).exp()).log() + shift

    def softmax(self, values: Tensor) -> Tensor:
        """Weights [N] from logarithms [N] that sum to 1/C in each prompt; 0 in a prompt with only −inf."""
        if self.count == 1:
            return values.softmax(0)
        total = self.logsumexp(values)
        return (values - torch.where(total > -torch.inf, total, 0.0)[self.index]).exp() / self.count
