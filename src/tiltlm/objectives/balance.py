"""How estimates of one gradient are mixed, so that the mix varies least."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.objectives.guided import Forms

# What a batch before counts, per update since; and how much of its own size keeps a form from being trusted blindly.
KEPT, RIDGE = 0.9, 1e-3


class Balance:
    """The shares [T, K] of K forms of one gradient that sum to 1 at each position, with the least second moment.

    All forms have the same mean, so the least second moment is the least variance. It is that of what a token pulls on
    the logits, L (g − π) + C (1_x − π), averaged over batches before: shares that a batch decided for itself would
    lean to what it happens to hold, and the mix would be biased.
    """

    def __init__(self) -> None:
        # Second moments [T, K, K], averaged over updates, and those of the update that is being made.
        self.moments: Tensor | None = None
        self.noted: Tensor | None = None
        self.rows = 0

    def note(self, forms: Forms, gram: Tensor) -> None:
        """Some rows of a batch; ``gram`` [N, T, 3] as in ``NextToken``."""
        lessons, corrections = forms.lessons.double().cpu(), forms.corrections.double().cpu()
        of_guide, of_both, of_token = gram.double().cpu().unbind(-1)
        crossed = torch.einsum("jnt,knt,nt->tjk", lessons, corrections, of_both)
        found = (
            torch.einsum("jnt,knt,nt->tjk", lessons, lessons, of_guide)
            + torch.einsum("jnt,knt,nt->tjk", corrections, corrections, of_token)
            + crossed
            + crossed.mT
        )
        self.noted = found if self.noted is None else _longer(self.noted, found) + _longer(found, self.noted)
        self.rows += lessons.shape[1]

    def settle(self) -> None:
        """The batch is complete: from now on it counts."""
        if self.noted is not None:
            new = self.noted / self.rows
            old = new if self.moments is None else self.moments
            self.moments = KEPT * _longer(old, new) + (1 - KEPT) * _longer(new, old)
        self.forget()

    def forget(self) -> None:
        """What was noted since the last batch does not count."""
        self.noted, self.rows = None, 0

    def shares(self, length: int) -> Tensor | None:
        """The shares [length, K]; None before any batch."""
        if self.moments is None:
            return None
        size = self.moments.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        alike = self.moments / (size[:, None] * size[..., None]) + RIDGE * torch.eye(size.shape[-1]).to(size)
        found = torch.linalg.solve(alike, (size.amin(-1, keepdim=True) / size)[..., None]).squeeze(-1) / size
        found = found / found.sum(-1, keepdim=True)
        # What no batch before came to has the shares of the last position that one did.
        return torch.cat([found, found[-1:].expand(max(0, length - len(found)), -1)])[:length]


def _longer(table: Tensor, other: Tensor) -> Tensor:
    """The table [T, K, K] with zeros up to the length of another."""
    return torch.nn.functional.pad(table, (0, 0, 0, 0, 0, max(0, len(other) - len(table))))
