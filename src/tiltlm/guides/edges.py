"""The outgoing edges of a chain's places, and how likely each edge is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.lm import Transitions


@dataclass(frozen=True)
class OutgoingEdges:
    """Where tokens lead from each of F places. An edge joins all tokens with the same next place and change of count.

    There are U distinct pairs of next place and change: ``places`` [U] and ``changes`` [U]. ``targets`` [F] lists, for
    each edge of a place, its pair. ``edge_of_token`` [F₀, V] is the edge of each token among those of its place. A
    split place has the edges of its parent, one of the F₀ first places.
    """

    edge_of_token: Tensor
    targets: list[Tensor]
    places: Tensor
    changes: Tensor

    @staticmethod
    def of(transitions: Transitions, parent: Tensor) -> OutgoingEdges:
        """The edges of all places, given the ``parent`` [F] of each."""
        most = int(transitions.changes.max()) + 1
        found = list[Tensor]()
        edge_of_token = torch.empty(int(parent.max()) + 1, transitions.shape[1], dtype=torch.int32)
        for place, (to, change) in enumerate(zip(transitions.places, transitions.changes, strict=True)):
            distinct, edge = torch.unique(to.long() * most + change, return_inverse=True)
            found.append(distinct)
            if place < len(edge_of_token):
                edge_of_token[place] = edge
        pairs = torch.unique(torch.cat(found))
        targets = [torch.searchsorted(pairs, one) for one in found]
        return OutgoingEdges(edge_of_token, targets, pairs // most, pairs % most)


@dataclass(frozen=True)
class EdgeSums:
    """Sums over visits to R rows of edges, M edges in all, one row after the other.

    ``mass`` [M] sums the edges' probabilities times the visits' weights, ``weight`` [R] the weights; ``visits`` [R] is
    the number of visits and ``widths`` [R] the number of edges of each row.
    """

    mass: Tensor
    weight: Tensor
    visits: Tensor
    widths: Tensor

    def grouped(self, group: Tensor) -> tuple[EdgeSums, Tensor]:
        """The sums over all rows of each ``group`` [R], and the place of each edge [M] among the new edges."""
        groups, index = torch.unique(group, return_inverse=True)
        widths = torch.empty_like(groups).scatter_(0, index, self.widths)
        shift = (widths.cumsum(0) - widths)[index] - (self.widths.cumsum(0) - self.widths)
        edge = shift.repeat_interleave(self.widths) + torch.arange(len(self.mass))
        mass = torch.zeros(int(widths.sum()), dtype=self.mass.dtype).index_add_(0, edge, self.mass)
        weight, visits = (
            torch.zeros(len(groups), dtype=x.dtype).index_add_(0, index, x) for x in (self.weight, self.visits)
        )
        return EdgeSums(mass, weight, visits, widths), edge

    def mean(self, prior: Tensor, prior_visits: float) -> Tensor:
        """The edges' mean probabilities [M], with ``prior_visits`` more visits to each row that show ``prior`` [M]."""
        return shrunk_mean(self.mass, self.per_edge(self.weight), self.per_edge(self.visits), prior, prior_visits)

    def continuation(self, continues: Tensor, prior: Tensor, prior_visits: float) -> Tensor:
        """``mean`` [M], normalized in each row over the edges that do not end the text (``continues`` [M])."""
        found = torch.where(continues, self.mean(prior, prior_visits), 0.0)
        return found / self.per_edge(self.row_sums(found).clamp_min(1e-300))

    def row_sums(self, edges: Tensor) -> Tensor:
        """The sum [R] over each row's ``edges`` [M]."""
        row = torch.arange(len(self.widths)).repeat_interleave(self.widths)
        return torch.zeros_like(self.weight).index_add_(0, row, edges)

    def per_edge(self, rows: Tensor) -> Tensor:
        """Each row's entry of ``rows`` [R], repeated for its edges [M]."""
        return rows.repeat_interleave(self.widths)


def shrunk_mean(sums: Tensor, weight: Tensor, visits: Tensor, prior: Tensor, prior_visits: float) -> Tensor:
    """Means of weighted sums over visits, with ``prior_visits`` more visits that show ``prior``."""
    return (sums / weight.clamp_min(1e-300) * visits + prior_visits * prior) / (visits + prior_visits)
