"""The combination of unbiased estimators of one gradient that has the least variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tiltlm.objectives.objective import Estimators

# The weight of the past in the moving average, per update.
KEPT = 0.9
# Added to the diagonal, relative to it, so that estimators that are nearly equal have a solution.
RIDGE = 1e-3


class MinimumVariance:
    """Mixture weights [T, K] of K unbiased estimators that sum to 1 at each position, with the least second moment.

    All estimators have the same mean, so the least second moment is the least variance. The second moment is that of a
    token's gradient in the logits, D (g − π) + R (1_x − π), averaged over earlier batches: weights computed from the
    batch that they are used on would bias the gradient.
    """

    def __init__(self) -> None:
        # Second moments [T, K, K]: averaged over updates, and summed over the rows of the present update.
        self.moments: Tensor | None = None
        self.pending: Tensor | None = None
        self.pending_rows = 0

    def add(self, estimators: Estimators, gram: Tensor) -> None:
        """Add some rows of a batch; ``gram`` [N, T, 3] as in ``NextToken``."""
        distillation, residual = estimators.distillation.double().cpu(), estimators.residual.double().cpu()
        of_guide, of_both, of_token = gram.double().cpu().unbind(-1)
        crossed = torch.einsum("jnt,knt,nt->tjk", distillation, residual, of_both)
        found = (
            torch.einsum("jnt,knt,nt->tjk", distillation, distillation, of_guide)
            + torch.einsum("jnt,knt,nt->tjk", residual, residual, of_token)
            + crossed
            + crossed.mT
        )
        self.pending = found if self.pending is None else _padded(self.pending, found) + _padded(found, self.pending)
        self.pending_rows += distillation.shape[1]

    def settle(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> None:
        """End the update: the rows added since the last one enter the moving average; ``total`` adds up processes."""
        if self.pending is not None:
            new = total(self.pending) / total(torch.tensor(self.pending_rows))
            old = new if self.moments is None else self.moments
            self.moments = KEPT * _padded(old, new) + (1 - KEPT) * _padded(new, old)
        self.discard()

    def discard(self) -> None:
        """Drop the rows added since the last update."""
        self.pending, self.pending_rows = None, 0

    def weights(self, length: int) -> Tensor | None:
        """The mixture weights [length, K]; None before the first update."""
        if self.moments is None:
            return None
        size = self.moments.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        scaled = self.moments / (size[:, None] * size[..., None]) + RIDGE * torch.eye(size.shape[-1]).to(size)
        found = torch.linalg.solve(scaled, (size.amin(-1, keepdim=True) / size)[..., None]).squeeze(-1) / size
        found = found / found.sum(-1, keepdim=True)
        # Positions beyond those of earlier batches get the weights of the last one.
        return torch.cat([found, found[-1:].expand(max(0, length - len(found)), -1)])[:length]

    def state_dict(self) -> dict[str, Any]:
        """The moving average, for a checkpoint."""
        return {"moments": self.moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the moving average of a checkpoint."""
        self.moments = state["moments"]
        self.discard()


def _padded(table: Tensor, other: Tensor) -> Tensor:
    """The table [T, K, K] with zeros up to the length of another."""
    return torch.nn.functional.pad(table, (0, 0, 0, 0, 0, max(0, len(other) - len(table))))
