"""A Markov chain over the states of the features' automata, with transitions averaged from next-token distributions.

The next-token distribution at a prefix gives the probability of every edge from its state, also of edges that no sample
took. So

    ψ_t(s) = Σ_s' P_t(s → s') ψ_{t+1}(s'),     ψ_T(s) = mean of P/a over texts that end in state s

estimates the value of each state with less noise than an average over samples, even where no sample met the target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import pad

from tiltlm.guides.context_classes import LastTokenSums
from tiltlm.guides.edges import EdgeSums, OutgoingEdges, shrunk_mean
from tiltlm.guides.token_states import TokenStates
from tiltlm.lm import Guide, LanguageModel, Samples, Transitions

# Position buckets for the probability of an end. Edges have fewer buckets, so that their sums stay below this number.
MAX_BUCKETS, MAX_EDGE_SUMS = 40, 2**25
# Edges that are kept for each count separately.
MAX_COUNT_EDGES = 2**20
# Prior visits: of a position bucket, whose prior is the mean over all positions;
POSITION_PRIOR = 20.0
# of a row, whose prior is the mean over the places with the same parent; and of one count of these, over all counts;
PARENT_PRIOR = 1.0
# of all places with one parent, whose prior is the mean next-token distribution.
TOKEN_PRIOR = 0.5


@dataclass
class MarkovChain:
    """Sums over prefixes, for texts of at most ``length`` tokens. ``transitions`` [S, V] are as in a ``Guide``.

    There are R rows of edges, M edges in all; row r begins at edge ``offset`` [R]. A state has a ``row`` [S]. A
    ``place`` [R] has one row for all counts, or one for each ``count`` [R], which is −1 for a shared row. Places of one
    ``parent`` [F] share statistics where each was visited rarely.

    Positions fall into G buckets, and for edges into H ≤ G coarse buckets. ``weight`` [G, R] sums the weights of
    prefixes, ``visits`` [G, R] is their number, ``end_mass`` [G, R] sums weight times the probability that the text
    ends. ``mass`` [H, M] sums weight times the probability of each edge, ``token_mass`` [V] that of each token.
    """

    transitions: Transitions
    start: int
    length: int
    edges: OutgoingEdges
    parent: Tensor
    row: Tensor
    place: Tensor
    count: Tensor
    offset: Tensor
    mass: Tensor
    weight: Tensor
    visits: Tensor
    end_mass: Tensor
    token_mass: Tensor

    @staticmethod
    def empty(states: TokenStates, length: int, device: torch.device | None = None) -> MarkovChain:
        """A chain without any prefixes."""
        transitions, counts = states.transitions, states.transitions.counts.shape[1]
        parent = torch.arange(len(transitions.places)) if states.parent is None else states.parent
        edges = OutgoingEdges.of(transitions, parent)
        widths = torch.tensor([len(one) for one in edges.targets])
        # The first places are the most frequent ones.
        order, separate = parent.argsort(stable=True), torch.empty(len(parent), dtype=torch.bool)
        separate[order] = counts * widths[order].cumsum(0) <= MAX_COUNT_EDGES
        rows = torch.where(separate, counts, 1)
        row = (rows.cumsum(0) - rows)[:, None] + separate[:, None] * torch.arange(counts)
        place = torch.arange(len(parent)).repeat_interleave(rows)
        count = torch.where(separate[place], torch.arange(len(place)) - row[place, 0], -1)
        ends = widths[place].cumsum(0)
        buckets = min(length, MAX_BUCKETS)
        mass = torch.zeros(min(buckets, max(1, MAX_EDGE_SUMS // int(ends[-1]))), int(ends[-1]), device=device)
        sums = [torch.zeros(buckets, len(place), dtype=torch.float64, device=device) for _ in range(3)]
        return MarkovChain(
            transitions=transitions,
            start=states.start,
            length=length,
            edges=replace(edges, edge_of_token=edges.edge_of_token.to(device or "cpu")),
            parent=parent,
            row=row.reshape(-1),
            place=place,
            count=count,
            offset=ends - widths[place],
            mass=mass,
            weight=sums[0],
            visits=sums[1],
            end_mass=sums[2],
            token_mass=torch.zeros(transitions.shape[1], dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def add_samples(
        self,
        model: LanguageModel,
        samples: Samples,
        log_weights: Tensor | None = None,
        last_tokens: LastTokenSums | None = None,
    ) -> None:
        """Add the model's next-token distribution at every prefix of the samples, and to ``last_tokens`` where given.

        ``log_weights`` [N, T] are those of the prefixes, 0 by default.
        """
        count, device = len(self.transitions), self.mass.device
        flat = Guide(self.transitions, torch.zeros(1, 2 * count), self.start)
        for rows in model.chunks(samples):
            chunk = samples.select(rows).trimmed()
            forward = model.read(chunk).cast()
            positions, tokens = (chunk.flat_rows.cpu(), chunk.flat_columns.cpu()), chunk.tokens.cpu()
            states = flat.states(tokens)[positions] % count
            last = pad(tokens[:, :-1], (1, 0), value=self.transitions.shape[1])[positions]
            weights = torch.ones(len(states), dtype=torch.float64, device=device)
            if log_weights is not None:
                weights = log_weights[rows.cpu()][positions].exp().to(device)
            for piece in forward.pieces():
                probabilities = forward.logits(piece).float().softmax(-1).to(device)
                self.add(states[piece], positions[1][piece], probabilities, weights[piece])
                if last_tokens is not None:
                    last_tokens.add(last[piece].to(device), probabilities, weights[piece])

    def add(
        self, states: Tensor, columns: Tensor, probabilities: Tensor, weights: Tensor, visits: Tensor | None = None
    ) -> None:
        """Add next-token probabilities [P, V] at prefixes in these states [P], of ``columns`` [P] tokens each.

        A row may stand for several ``visits`` [P]; its weight [P] is then their sum.
        """
        (buckets, rows), (coarse, edges), device = self.weight.shape, self.mass.shape, self.mass.device
        bucket, row = columns * buckets // self.length, self.row[states]
        edge = self.edges.edge_of_token[self.parent[self.place[row]].to(device)]
        cells = edge + (bucket * coarse // buckets * edges + self.offset[row])[:, None].to(device)
        weighted = probabilities.float() * weights[:, None].float()
        self.mass.view(-1).index_add_(0, cells.reshape(-1), weighted.reshape(-1))
        self.token_mass += weighted.sum(0).double()
        cells = (bucket * rows + row).to(device)
        self.weight.view(-1).index_add_(0, cells, weights)
        self.visits.view(-1).index_add_(0, cells, torch.ones_like(weights) if visits is None else visits)
        self.end_mass.view(-1).index_add_(0, cells, weighted[:, self._ends_text].sum(1).double())

    def values(self, final: Tensor) -> Tensor:
        """ψ [T + 1, S] of the states after each number of tokens, from the ``final`` values [S] of finished texts."""
        counts, edges, coarse = self.transitions.counts, self.edges, len(self.mass)
        row, numbers = self.row.reshape(-1, counts.shape[1]), torch.arange(counts.shape[1])
        place, count = edges.places[:, None] % len(row), counts[edges.changes]
        prior, end_rates, matrix = self._edge_means(), self._end_rates(), list[csr_array]()
        bucket_of = [t * len(end_rates) // self.length for t in range(self.length)]
        values = [final]
        for bucket in reversed(range(len(end_rates))):
            if coarse > bucket * len(self.mass) // len(end_rates):
                coarse -= 1
                matrix = [self._transition_matrix(coarse, prior)]
            end_rate = end_rates[bucket][self.row]
            for _ in range(bucket_of.count(bucket)):
                after = values[-1].reshape(row.shape)[place, count]
                # Each state takes the column of its own count.
                continued = torch.from_numpy(matrix[0] @ after.numpy())[row, numbers].reshape(-1)
                values.append(end_rate * final + (1 - end_rate) * continued)
        return torch.stack(values[::-1])

    def _transition_matrix(self, coarse: int, prior: Tensor) -> csr_array:
        """The probabilities [R, U] of where each row leads in a coarse bucket, given that the text does not end."""
        edges, count = self.edges, self.mass.shape[1]
        continues = (edges.places < len(self.parent))[self._edge_targets]
        probabilities = self._edge_sums(coarse).continuation(continues, prior, POSITION_PRIOR)
        begin = torch.cat([self.offset, torch.tensor([count])])
        shape = (len(self.place), len(edges.places))
        return csr_array((probabilities.numpy(), self._edge_targets.numpy(), begin.int().numpy()), shape)

    @cached_property
    def _ends_text(self) -> Tensor:
        """Whether each token ends the text [V]."""
        return (self.transitions.places >= len(self.parent)).all(0).to(self.mass.device)

    @cached_property
    def _edge_targets(self) -> Tensor:
        """Each edge's pair of next place and change [M], one of U."""
        return torch.cat([self.edges.targets[place] for place in self.place.tolist()]).int()

    def _edge_means(self) -> Tensor:
        """The edges' probabilities [M] over all positions."""
        sums, parent, counts = self._edge_sums(), self.parent[self.place], self.transitions.counts.shape[1]
        by_count, edge_by_count = sums.grouped(parent * (counts + 1) + self.count + 1)
        by_parent, edge_by_parent = sums.grouped(parent)
        tokens = self.token_mass.cpu()
        tokens = tokens / tokens.sum().clamp_min(1e-300)
        by_token = torch.cat([self._sum_by_edge(place, tokens) for place in sorted(set(parent.tolist()))])
        prior = by_parent.mean(by_token, TOKEN_PRIOR)
        if counts > 1:
            edge = torch.empty(len(by_count.mass), dtype=torch.long).scatter_(0, edge_by_count, edge_by_parent)
            return sums.mean(by_count.mean(prior[edge], PARENT_PRIOR)[edge_by_count], PARENT_PRIOR)
        return sums.mean(prior[edge_by_parent], PARENT_PRIOR)

    def _end_rates(self) -> Tensor:
        """The probability [G, R] that the next token ends the text, by position bucket and row."""
        ended, weight, visits = (x.cpu() for x in (self.end_mass, self.weight, self.visits))
        overall = ended.sum() / weight.sum().clamp_min(1e-300)
        parent = self.parent[self.place]
        zeros = torch.zeros(len(self.parent), dtype=torch.float64)
        parent_sums = [zeros.index_add(0, parent, x.sum(0)) for x in (ended, weight, visits)]
        by_parent = shrunk_mean(parent_sums[0], parent_sums[1], parent_sums[2], overall, TOKEN_PRIOR)
        by_row = shrunk_mean(ended.sum(0), weight.sum(0), visits.sum(0), by_parent[parent], PARENT_PRIOR)
        by_bucket = shrunk_mean(ended.sum(1), weight.sum(1), visits.sum(1), overall, PARENT_PRIOR)
        # The prior of a cell adds the log-odds of its position and of its row.
        odds = [x.clamp(1e-12, 1 - 1e-12).logit() for x in (by_bucket[:, None], by_row, overall)]
        return shrunk_mean(ended, weight, visits, (odds[0] + odds[1] - odds[2]).sigmoid(), POSITION_PRIOR)

    def _sum_by_edge(self, place: int, tokens: Tensor) -> Tensor:
        """The probabilities of a place's edges, from those of the tokens [V]."""
        edges = torch.zeros(len(self.edges.targets[place]), dtype=tokens.dtype)
        return edges.index_add_(0, self.edges.edge_of_token[place].cpu().long(), tokens)

    def _edge_sums(self, coarse: int | None = None) -> EdgeSums:
        """The sums over one coarse bucket, or over all positions."""
        selected, buckets = slice(None) if coarse is None else slice(coarse, coarse + 1), torch.arange(len(self.weight))
        inside = slice(None) if coarse is None else buckets * len(self.mass) // len(buckets) == coarse
        weight, visits = (x[inside].sum(0).cpu() for x in (self.weight, self.visits))
        ends = torch.cat([self.offset, torch.tensor([self.mass.shape[1]])])
        return EdgeSums(self.mass[selected].sum(0, dtype=torch.float64).cpu(), weight, visits, ends.diff())
