"""What the last two tokens tell of a target, beside the states of its automata.

"His playing" promises "career" where "of the" does not, and the state of an automaton is the same after both. So tokens
are sorted into classes by what the target promises after them, and each place that many tokens lead to is split by the
classes of the last two. What is promised after a token follows from the base's next-token laws behind it, averaged:

    ψ_t(s, v) = Σ_v' a(v'|v) ψ_{t+1}(δ(s, v'), v')
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.guides.token_states import MOST_STATES, MOST_TRANSITIONS, TokenStates
from tiltlm.lm import Transitions

# Cells that splitting may add; each costs a row of the vocabulary.
MOST_CELLS = 2048
MOST_CLASSES = 16
# A state is split if so many prefixes are in it, and so many tokens lead to it; cells have so many prefixes on average.
ENOUGH_PREFIXES, ENOUGH_TOKENS, ENOUGH_A_CELL = 200, 30, 30
# The law of all prefixes counts as so many after each token.
PRIOR_PREFIXES = 1.0
# Promises are compared with so many tokens to come.
TO_COME = (2, 3, 6, 12, 20, 28, 36)
ROUNDS = 30


@dataclass
class LastTokens:
    """The base's next-token laws, summed by the last token.

    ``kept`` [V + 1] is the row of each token, V for no token yet; the tokens that are seldom written share the last
    row. ``laws`` [K, V] sums laws with the weights [K] of their prefixes.
    """

    kept: Tensor
    laws: Tensor
    weights: Tensor

    @staticmethod
    def empty(tokens: Tensor, vocabulary: int, device: torch.device) -> LastTokens:
        """Nothing yet; ``tokens`` [P] are those of the samples, of which the most frequent get rows of their own."""
        often = torch.bincount(tokens.reshape(-1), minlength=vocabulary + 1)
        often[vocabulary] = tokens.numel()  # every text begins
        count = min(int((often > 0).sum()), max(1, MOST_TRANSITIONS // vocabulary))
        kept = torch.full((vocabulary + 1,), count)
        kept[often.argsort(descending=True, stable=True)[:count]] = torch.arange(count)
        laws = torch.zeros(count + 1, vocabulary, device=device)
        return LastTokens(kept, laws, torch.zeros(count + 1, dtype=torch.float64, device=device))

    def add(self, last: Tensor, laws: Tensor, weights: Tensor) -> None:
        """Laws [P, V] at prefixes with these weights [P], after these tokens [P]."""
        rows = self.kept.to(last.device)[last]
        self.laws.index_add_(0, rows, laws * weights[:, None].to(laws))
        self.weights.index_add_(0, rows, weights)

    def means(self) -> Tensor:
        """The mean law after each row's tokens [K, V]."""
        overall = self.laws.sum(0) / self.weights.sum().to(self.laws)
        sums = self.laws + PRIOR_PREFIXES * overall
        return (sums / (self.weights + PRIOR_PREFIXES)[:, None].to(sums)).cpu()


def with_contexts(
    states: TokenStates, last_tokens: LastTokens, promise: Tensor, tokens: Tensor, visited: Tensor
) -> TokenStates:
    """The states, with those split that many tokens lead to; the same where there is nothing to split.

    ``promise`` [T + 1, S] is ψ of the states as they are; ``tokens`` [N, T] those of samples, and ``visited`` [N, T]
    their states before each, −1 where masked.
    """
    inside, table = visited >= 0, states.transitions
    counts = table.counts.shape[1]
    last = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=table.shape[1])[inside]
    state = visited[inside]
    place = state // counts
    split = _many_lead_to(place, last, len(table.places))
    room = MOST_TRANSITIONS // table.shape[1] - len(table.places)
    prefixes = int(torch.isin(place, split).sum())
    cells = min(MOST_CELLS, room, MOST_STATES // counts - len(table.places), prefixes // ENOUGH_A_CELL)
    classes = min(MOST_CLASSES, int((max(cells, 0) / max(1, len(split))) ** 0.5))
    if classes < 2:
        return states
    with_counts = (split[:, None] * counts + torch.arange(counts)).reshape(-1)
    shares = torch.bincount(state, minlength=len(table))[with_counts].double().sqrt()
    with_counts, shares = with_counts[shares > 0], shares[shares > 0]
    after = _promised_after(table, last_tokens, promise, with_counts)
    rows = (after.log() * shares[:, None, None].to(after)).flatten(0, 1).T.contiguous()
    of_row = _classes(rows, last_tokens.weights.cpu(), classes)
    return _split(states, split, of_row[last_tokens.kept[:-1]], int(of_row.max()) + 1, place, last)


def _many_lead_to(place: Tensor, last: Tensor, count: int) -> Tensor:
    """The places that many prefixes are in, after many different tokens."""
    pairs = torch.stack([place, last]).unique(dim=1)[0]  # type: ignore[no-untyped-call]
    tokens, prefixes = (torch.bincount(x, minlength=count) for x in (pairs, place))
    return ((tokens >= ENOUGH_TOKENS) & (prefixes >= ENOUGH_PREFIXES)).nonzero().squeeze(-1)


def _promised_after(transitions: Transitions, last_tokens: LastTokens, promise: Tensor, split: Tensor) -> Tensor:
    """ψ [S', P, K] of the split states after the tokens of each row, with P different numbers of tokens to come."""
    laws, of_token = last_tokens.means(), last_tokens.kept[:-1]
    s, length = len(transitions), len(promise) - 1
    promise, after = promise.float(), transitions[split]
    # Of the split states, their place; of all others what they promise without.
    place = torch.full((2 * s,), -1)
    place[split] = torch.arange(len(split))
    places = place[after]
    found = list[Tensor]()
    known: Tensor | None = None
    for to_come in range(1, length + 1):
        plain = torch.cat([promise[length - to_come + 1], promise[-1]])[after]
        if known is not None:
            plain = torch.where(places >= 0, known[places.clamp_min(0), of_token.expand_as(places)], plain)
        known = plain @ laws.T
        if to_come in TO_COME or to_come == length < min(TO_COME):
            found.append(known)
    least = float(promise[promise > 0].min()) if bool((promise > 0).any()) else 1.0
    return torch.stack(found, 1).clamp_min(least)


def _classes(rows: Tensor, weights: Tensor, most: int) -> Tensor:
    """The class of each of K rows [K, D] with these weights [K]: k-means, begun at rows far from one another."""
    weights = weights.to(rows) + 0.01
    centers = ((weights[:, None] * rows).sum(0) / weights.sum())[None]
    for _ in range(most - 1):
        distance = torch.cdist(rows, centers).amin(1).square() * weights
        centers = torch.cat([centers, rows[distance.argmax()][None]])
    for _ in range(ROUNDS):
        of = torch.cdist(rows, centers).argmin(1)
        total = torch.zeros(len(centers), dtype=rows.dtype).index_add_(0, of, weights)
        sums = torch.zeros_like(centers).index_add_(0, of, weights[:, None] * rows)
        centers = torch.where(total[:, None] > 0, sums / total.clamp_min(1e-30)[:, None], centers)
    used, of = torch.unique(torch.cdist(rows, centers).argmin(1), return_inverse=True)
    assert len(used) <= most
    return torch.as_tensor(of)


def _split(
    states: TokenStates, split: Tensor, of_token: Tensor, classes: int, place: Tensor, last: Tensor
) -> TokenStates:
    """Cells behind the places as they are: split place by split place, by the last class and that before it."""
    table, f = states.transitions, len(states.transitions.places)
    first = torch.full((f,), -1)
    first[split] = f + torch.arange(len(split)) * classes**2
    kin = torch.cat([torch.arange(f), split.repeat_interleave(classes**2)])
    # What a place tells of its last token itself: the class that it most often has.
    known = last < len(of_token)
    pairs = torch.bincount(place[known] * classes + of_token[last[known]], minlength=f * classes)
    one = torch.arange(classes).repeat_interleave(classes).repeat(len(split))
    own = torch.cat([pairs.reshape(f, classes).argmax(1), one])
    to = table.places[kin]
    ended, to = to >= f, to % f
    cell = torch.where(first[to] >= 0, first[to] + of_token * classes + own[:, None], to)
    counts = table.counts.shape[1]
    of_kin = (kin[:, None] * counts + torch.arange(counts)).reshape(-1)
    return TokenStates(
        Transitions(torch.where(ended, to + len(kin), cell).int(), table.changes[kin], table.counts),
        states.start,
        None if states.values is None else states.values[of_kin],
        kin,
        None if states.counted is None else states.counted[of_kin],
    )
