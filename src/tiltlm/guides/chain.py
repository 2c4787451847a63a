"""The features' automata on a model's tokens, as a Markov chain whose steps are averages of whole next-token laws.

The law at a prefix tells how likely each step from its state is, also the steps that no sample took. So

    ψ_t(s) = Σ_s' P_t(s → s') ψ_{t+1}(s'),     ψ_T(s) = the mean of P/a over texts that end in state s

is what each state promises, with the noise of few samples averaged out, and where no sample met the target at all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import pad

from tiltlm.guides.context_classes import LastTokens
from tiltlm.guides.edges import Slots, Steps, shrunk_mean
from tiltlm.guides.token_states import TokenStates
from tiltlm.lm import Guide, LanguageModel, Samples, Transitions

# Ends are averaged over the positions of a stretch, and there are at most so many; many steps over several stretches.
MOST_STRETCHES, MOST_STEPS = 40, 2**25
# So many steps may be known for each count apart.
MOST_APART = 2**20
# Visits to a state in one stretch that count as much as what is known of the state in all.
ELSEWHERE = 20.0
# Visits to a row that count as much as what is known of its kin; visits to a count of these, as what is of any count.
KIN = 1.0
# Visits to all of a kin that count as much as the guess that tokens come as they do on average.
GUESS = 0.5


@dataclass
class MarkovChain:
    """``transitions`` [S, V] as in a ``Guide``, for texts of at most ``length`` tokens.

    A state has a ``row`` [S], of R, with a step for each slot of its place; all counts of a ``place`` [R] share one, or
    each ``count`` [R] has its own, where it is not −1. Row r begins at ``offset`` [R] of M steps. Over the prefixes
    in each of G stretches of positions ``weight`` [G, R] sums their weights, ``ended`` [G, R] these times the
    probability that the text ends, and ``visits`` [G, R] is their number. ``moved`` [H, M] sums the weights times the
    probabilities of steps in H longer stretches, and ``mean_law`` [V] those of tokens over all prefixes. Places of one
    ``kin`` [F] go on alike where little is known of each.
    """

    transitions: Transitions
    start: int
    length: int
    slots: Slots
    kin: Tensor
    row: Tensor
    place: Tensor
    count: Tensor
    offset: Tensor
    moved: Tensor
    weight: Tensor
    visits: Tensor
    ended: Tensor
    mean_law: Tensor

    @staticmethod
    def empty(states: TokenStates, length: int, device: torch.device | None = None) -> MarkovChain:
        """A chain that has seen nothing."""
        transitions, counts = states.transitions, states.transitions.counts.shape[1]
        kin = torch.arange(len(transitions.places)) if states.kin is None else states.kin
        slots = Slots.of(transitions, kin)
        widths = torch.tensor([len(one) for one in slots.targets])
        # The first places are the most frequent ones.
        order, apart = kin.argsort(stable=True), torch.empty(len(kin), dtype=torch.bool)
        apart[order] = counts * widths[order].cumsum(0) <= MOST_APART
        rows = torch.where(apart, counts, 1)
        row = (rows.cumsum(0) - rows)[:, None] + apart[:, None] * torch.arange(counts)
        place = torch.arange(len(kin)).repeat_interleave(rows)
        count = torch.where(apart[place], torch.arange(len(place)) - row[place, 0], -1)
        ends = widths[place].cumsum(0)
        stretches = min(length, MOST_STRETCHES)
        moved = torch.zeros(min(stretches, max(1, MOST_STEPS // int(ends[-1]))), int(ends[-1]), device=device)
        sums = [torch.zeros(stretches, len(place), dtype=torch.float64, device=device) for _ in range(3)]
        return MarkovChain(
            transitions=transitions,
            start=states.start,
            length=length,
            slots=replace(slots, of_token=slots.of_token.to(device or "cpu")),
            kin=kin,
            row=row.reshape(-1),
            place=place,
            count=count,
            offset=ends - widths[place],
            moved=moved,
            weight=sums[0],
            visits=sums[1],
            ended=sums[2],
            mean_law=torch.zeros(transitions.shape[1], dtype=torch.float64, device=device),
        )

    @torch.no_grad()
    def learn(
        self,
        model: LanguageModel,
        samples: Samples,
        log_weights: Tensor | None = None,
        last_tokens: LastTokens | None = None,
    ) -> None:
        """Add the model's next-token laws at every prefix, to ``last_tokens`` too.

        ``log_weights`` [N, T] are those of the prefixes.
        """
        count, device = len(self.transitions), self.moved.device
        still = Guide(self.transitions, torch.zeros(1, 2 * count), self.start)
        for rows in model.chunks(samples):
            chunk = samples.select(rows).trimmed()
            reading = model.read(chunk).cast()
            places, tokens = (chunk.flat_rows.cpu(), chunk.flat_columns.cpu()), chunk.tokens.cpu()
            states = still.states(tokens)[places] % count
            last = pad(tokens[:, :-1], (1, 0), value=self.transitions.shape[1])[places]
            weights = torch.ones(len(states), dtype=torch.float64, device=device)
            if log_weights is not None:
                weights = log_weights[rows.cpu()][places].exp().to(device)
            for piece in reading.pieces():
                law = reading.logits(piece).float().softmax(-1).to(device)
                self.add(states[piece], places[1][piece], law, weights[piece])
                if last_tokens is not None:
                    last_tokens.add(last[piece].to(device), law, weights[piece])

    def add(self, states: Tensor, columns: Tensor, laws: Tensor, weights: Tensor, visits: Tensor | None = None) -> None:
        """Add next-token laws [P, V] at prefixes in these states [P], after as many tokens as ``columns`` [P] say.

        A law may stand for several ``visits`` [P], whose weights [P] are then their sum.
        """
        (stretches, rows), (longer, steps), device = self.weight.shape, self.moved.shape, self.moved.device
        stretch, row = columns * stretches // self.length, self.row[states]
        slots = self.slots.of_token[self.kin[self.place[row]].to(device)]
        cells = slots + (stretch * longer // stretches * steps + self.offset[row])[:, None].to(device)
        weighted = laws.float() * weights[:, None].float()
        self.moved.view(-1).index_add_(0, cells.reshape(-1), weighted.reshape(-1))
        self.mean_law += weighted.sum(0).double()
        cells = (stretch * rows + row).to(device)
        self.weight.view(-1).index_add_(0, cells, weights)
        self.visits.view(-1).index_add_(0, cells, torch.ones_like(weights) if visits is None else visits)
        self.ended.view(-1).index_add_(0, cells, weighted[:, self._ends].sum(1).double())

    def promise(self, final: Tensor) -> Tensor:
        """ψ [T + 1, S] of the states after each number of tokens, given that of texts that have ended [S]."""
        counts, slots, longer = self.transitions.counts, self.slots, len(self.moved)
        row, numbers = self.row.reshape(-1, counts.shape[1]), torch.arange(counts.shape[1])
        place, count = slots.places[:, None] % len(row), counts[slots.changes]
        anywhere, ending, steps = self._anywhere(), self._ending(), list[csr_array]()
        here = [t * len(ending) // self.length for t in range(self.length)]
        promises = [final]
        for stretch in reversed(range(len(ending))):
            if longer > stretch * len(self.moved) // len(ending):
                longer -= 1
                steps = [self._steps(longer, anywhere)]
            ends = ending[stretch][self.row]
            for _ in range(here.count(stretch)):
                after = promises[-1].reshape(row.shape)[place, count]
                # Of each row only the count that is its own.
                going_on = torch.from_numpy(steps[0] @ after.numpy())[row, numbers].reshape(-1)
                promises.append(ends * final + (1 - ends) * going_on)
        return torch.stack(promises[::-1])

    def _steps(self, longer: int, anywhere: Tensor) -> csr_array:
        """The probabilities of all slots [R, U] in one of the longer stretches, if the text goes on."""
        slots, steps = self.slots, self.moved.shape[1]
        law = self._seen(longer).law((slots.places < len(self.kin))[self._columns], anywhere, ELSEWHERE)
        begin = torch.cat([self.offset, torch.tensor([steps])])
        shape = (len(self.place), len(slots.places))
        return csr_array((law.numpy(), self._columns.numpy(), begin.int().numpy()), shape)

    @cached_property
    def _ends(self) -> Tensor:
        """Whether each token ends the text [V]."""
        return (self.transitions.places >= len(self.kin)).all(0).to(self.moved.device)

    @cached_property
    def _columns(self) -> Tensor:
        """Which of the U pairs of place and change each step leads to [M]."""
        return torch.cat([self.slots.targets[place] for place in self.place.tolist()]).int()

    def _anywhere(self) -> Tensor:
        """The probabilities [M] of the steps at any position."""
        seen, kin, counts = self._seen(), self.kin[self.place], self.transitions.counts.shape[1]
        alike, of_alike = seen.together(kin * (counts + 1) + self.count + 1)
        all_counts, of_all = seen.together(kin)
        law = self.mean_law.cpu()
        law = law / law.sum().clamp_min(1e-300)
        guess = torch.cat([self._of_slots(place, law) for place in sorted(set(kin.tolist()))])
        prior = all_counts.mean(guess, GUESS)
        if counts > 1:
            steps = torch.empty(len(alike.moved), dtype=torch.long).scatter_(0, of_alike, of_all)
            return seen.mean(alike.mean(prior[steps], KIN)[of_alike], KIN)
        return seen.mean(prior[of_all], KIN)

    def _ending(self) -> Tensor:
        """The probability [G, R] that a text ends after a token in each stretch, by row."""
        ended, weight, visits = (x.cpu() for x in (self.ended, self.weight, self.visits))
        overall = ended.sum() / weight.sum().clamp_min(1e-300)
        kin = self.kin[self.place]
        nothing = torch.zeros(len(self.kin), dtype=torch.float64)
        kin_ended, kin_weight, kin_visits = (nothing.index_add(0, kin, x.sum(0)) for x in (ended, weight, visits))
        of_kin = shrunk_mean(kin_ended, kin_weight, kin_visits, overall, GUESS)
        of_row = shrunk_mean(ended.sum(0), weight.sum(0), visits.sum(0), of_kin[kin], KIN)
        of_stretch = shrunk_mean(ended.sum(1), weight.sum(1), visits.sum(1), overall, KIN)
        # What position and place say of an end are taken to add up.
        odds = [x.clamp(1e-12, 1 - 1e-12).logit() for x in (of_stretch[:, None], of_row, overall)]
        return shrunk_mean(ended, weight, visits, (odds[0] + odds[1] - odds[2]).sigmoid(), ELSEWHERE)

    def _of_slots(self, place: int, law: Tensor) -> Tensor:
        """The probabilities of a place's slots, given that of each token [V]."""
        slots = torch.zeros(len(self.slots.targets[place]), dtype=law.dtype)
        return slots.index_add_(0, self.slots.of_token[place].cpu().long(), law)

    def _seen(self, longer: int | None = None) -> Steps:
        """The sums over one of the longer stretches, or over all."""
        of, stretches = slice(None) if longer is None else slice(longer, longer + 1), torch.arange(len(self.weight))
        inside = slice(None) if longer is None else stretches * len(self.moved) // len(stretches) == longer
        weight, visits = (x[inside].sum(0).cpu() for x in (self.weight, self.visits))
        ends = torch.cat([self.offset, torch.tensor([self.moved.shape[1]])])
        return Steps(self.moved[of].sum(0, dtype=torch.float64).cpu(), weight, visits, ends.diff())
