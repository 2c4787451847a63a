"""The steps of a chain: where tokens lead from each place, and how likely each is after visits to the place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.lm import Transitions


@dataclass(frozen=True)
class Slots:
    """Where tokens lead from each of F places: to ``places`` [U] with ``changes`` [U] of the count.

    ``of_token`` [F₀, V] says which of its place's n slots a token leads to, and n of ``targets`` [F] which of the U
    these are. The places of one kin have the slots of that of the F₀ that they are kin of.
    """

    of_token: Tensor
    targets: list[Tensor]
    places: Tensor
    changes: Tensor

    @staticmethod
    def of(transitions: Transitions, kin: Tensor) -> Slots:
        """Those of places, each kin [F] of one of the first."""
        most = int(transitions.changes.max()) + 1
        found = list[Tensor]()
        of_token = torch.empty(int(kin.max()) + 1, transitions.shape[1], dtype=torch.int32)
        for place, (to, change) in enumerate(zip(transitions.places, transitions.changes, strict=True)):
            distinct, of = torch.unique(to.long() * most + change, return_inverse=True)
            found.append(distinct)
            if place < len(of_token):
                of_token[place] = of
        pairs = torch.unique(torch.cat(found))
        return Slots(of_token, [torch.searchsorted(pairs, one) for one in found], pairs // most, pairs % most)


@dataclass(frozen=True)
class Steps:
    """Sums over visits to R rows of steps: of the steps' probabilities [M], one row behind the other, and weights [R].

    ``widths`` [R] says how many steps a row has.
    """

    moved: Tensor
    weight: Tensor
    visits: Tensor
    widths: Tensor

    def together(self, group: Tensor) -> tuple[Steps, Tensor]:
        """The sums of all rows of a ``group`` [R], and the place among them of each step [M]."""
        groups, of = torch.unique(group, return_inverse=True)
        widths = torch.empty_like(groups).scatter_(0, of, self.widths)
        begin = (widths.cumsum(0) - widths)[of] - (self.widths.cumsum(0) - self.widths)
        step = begin.repeat_interleave(self.widths) + torch.arange(len(self.moved))
        moved = torch.zeros(int(widths.sum()), dtype=self.moved.dtype).index_add_(0, step, self.moved)
        weight, visits = (
            torch.zeros(len(groups), dtype=x.dtype).index_add_(0, of, x) for x in (self.weight, self.visits)
        )
        return Steps(moved, weight, visits, widths), step

    def mean(self, prior: Tensor, prior_visits: float) -> Tensor:
        """The steps' mean probabilities [M], as if ``prior_visits`` more to each row had shown ``prior`` [M]."""
        return shrunk_mean(self.moved, self.each(self.weight), self.each(self.visits), prior, prior_visits)

    def law(self, goes_on: Tensor, prior: Tensor, prior_visits: float) -> Tensor:
        """The same among the steps [M] with which a text goes on."""
        found = torch.where(goes_on, self.mean(prior, prior_visits), 0.0)
        return found / self.each(self.sums(found).clamp_min(1e-300))

    def sums(self, steps: Tensor) -> Tensor:
        """The sum [R] over each row's of ``steps`` [M]."""
        row = torch.arange(len(self.widths)).repeat_interleave(self.widths)
        return torch.zeros_like(self.weight).index_add_(0, row, steps)

    def each(self, rows: Tensor) -> Tensor:
        """For each step what its row is given [M], of ``rows`` [R]."""
        return rows.repeat_interleave(self.widths)


def shrunk_mean(sums: Tensor, weight: Tensor, visits: Tensor, prior: Tensor, prior_visits: float) -> Tensor:
    """Weighted means of n visits each, as if ``prior_visits`` more had shown ``prior``."""
    return (sums / weight.clamp_min(1e-300) * visits + prior_visits * prior) / (visits + prior_visits)
