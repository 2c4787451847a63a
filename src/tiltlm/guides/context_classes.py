"""Split states by the last two tokens, because they too predict the target.

After "His playing" the word "career" is likelier than after "of the", but an automaton that waits for "career" is in
the same state after both. Tokens are clustered into classes by the values of the states after them. Each place that
many tokens lead to is split by the classes of the last two tokens. The value after token v follows from the base's mean
next-token distribution a(·|v):

    ψ_t(s, v) = Σ_v' a(v'|v) ψ_{t+1}(δ(s, v'), v')
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.guides.token_states import MAX_STATES, MAX_TRANSITIONS, TokenStates
from tiltlm.lm import Transitions

# Places that splitting may add; each costs a row of the vocabulary.
MAX_NEW_PLACES = 2048
MAX_CLASSES = 16
# A place is split if it has this many prefixes, with this many different last tokens.
MIN_PREFIXES, MIN_TOKENS = 200, 30
# New places have this many prefixes on average.
MIN_MEAN_PREFIXES = 30
# The mean distribution of all prefixes counts as this many prefixes after each token.
PRIOR_PREFIXES = 1.0
# Values are compared at these numbers of remaining tokens.
REMAINING_TOKENS = (2, 3, 6, 12, 20, 28, 36)
KMEANS_ROUNDS = 30


@dataclass(frozen=True)
class LastTokenSums:
    """The base's next-token probabilities, summed by the last token.

    ``row_of_token`` [V + 1] is the row of each last token, V for the empty prefix; rare tokens share the last row.
    ``mass`` [K, V] sums weight times probability, ``weights`` [K] the weights of the prefixes.
    """

    row_of_token: Tensor
    mass: Tensor
    weights: Tensor

    @staticmethod
    def empty(tokens: Tensor, vocabulary: int, device: torch.device) -> LastTokenSums:
        """Sums of no prefix, with rows for the most frequent of ``tokens`` [P], those of the samples."""
        frequency = torch.bincount(tokens.reshape(-1), minlength=vocabulary + 1)
        frequency[vocabulary] = tokens.numel()  # every text begins with the empty prefix
        count = min(int((frequency > 0).sum()), max(1, MAX_TRANSITIONS // vocabulary))
        row_of_token = torch.full((vocabulary + 1,), count)
        row_of_token[frequency.argsort(descending=True, stable=True)[:count]] = torch.arange(count)
        mass = torch.zeros(count + 1, vocabulary, device=device)
        return LastTokenSums(row_of_token, mass, torch.zeros(count + 1, dtype=torch.float64, device=device))

    def add(self, last: Tensor, probabilities: Tensor, weights: Tensor) -> None:
        """Add next-token probabilities [P, V] at prefixes with these ``last`` tokens [P] and ``weights`` [P]."""
        rows = self.row_of_token.to(last.device)[last]
        self.mass.index_add_(0, rows, probabilities * weights[:, None].to(probabilities))
        self.weights.index_add_(0, rows, weights)

    def means(self) -> Tensor:
        """The mean next-token distribution of each row [K, V]."""
        overall = self.mass.sum(0) / self.weights.sum().to(self.mass)
        sums = self.mass + PRIOR_PREFIXES * overall
        return (sums / (self.weights + PRIOR_PREFIXES)[:, None].to(sums)).cpu()


def split_by_context(
    states: TokenStates, last_tokens: LastTokenSums, values: Tensor, tokens: Tensor, visited: Tensor
) -> TokenStates:
    """Split the places that many tokens lead to; return ``states`` itself where there are none.

    ``values`` [T + 1, S] is ψ of the states; ``tokens`` [N, T] are those of the samples, and ``visited`` [N, T] the
    states before each token, −1 where masked.
    """
    inside, table = visited >= 0, states.transitions
    counts = table.counts.shape[1]
    last = torch.nn.functional.pad(tokens[:, :-1], (1, 0), value=table.shape[1])[inside]
    state = visited[inside]
    place = state // counts
    split = _places_to_split(place, last, len(table.places))
    room = MAX_TRANSITIONS // table.shape[1] - len(table.places)
    prefixes = int(torch.isin(place, split).sum())
    new = min(MAX_NEW_PLACES, room, MAX_STATES // counts - len(table.places), prefixes // MIN_MEAN_PREFIXES)
    classes = min(MAX_CLASSES, int((max(new, 0) / max(1, len(split))) ** 0.5))
    if classes < 2:
        return states
    split_states = (split[:, None] * counts + torch.arange(counts)).reshape(-1)
    scale = torch.bincount(state, minlength=len(table))[split_states].double().sqrt()
    split_states, scale = split_states[scale > 0], scale[scale > 0]
    after = _values_by_token(table, last_tokens, values, split_states)
    rows = (after.log() * scale[:, None, None].to(after)).flatten(0, 1).T.contiguous()
    class_of_row = _cluster(rows, last_tokens.weights.cpu(), classes)
    class_of_token = class_of_row[last_tokens.row_of_token[:-1]]
    return _split(states, split, class_of_token, int(class_of_row.max()) + 1, place, last)


def _places_to_split(place: Tensor, last: Tensor, count: int) -> Tensor:
    """The places with many prefixes that end in many different tokens."""
    pairs = torch.stack([place, last]).unique(dim=1)[0]  # type: ignore[no-untyped-call]
    tokens, prefixes = (torch.bincount(x, minlength=count) for x in (pairs, place))
    return ((tokens >= MIN_TOKENS) & (prefixes >= MIN_PREFIXES)).nonzero().squeeze(-1)


def _values_by_token(transitions: Transitions, last_tokens: LastTokenSums, values: Tensor, split: Tensor) -> Tensor:
    """ψ [S', P, K] of the ``split`` states [S'], for P numbers of remaining tokens and each row of last tokens."""
    probabilities, row_of_token = last_tokens.means(), last_tokens.row_of_token[:-1]
    s, length = len(transitions), len(values) - 1
    values, after = values.float(), transitions[split]
    # A split state has its index in ``split``; other states keep their values.
    index = torch.full((2 * s,), -1)
    index[split] = torch.arange(len(split))
    index_after = index[after]
    found = list[Tensor]()
    known: Tensor | None = None
    for remaining in range(1, length + 1):
        following = torch.cat([values[length - remaining + 1], values[-1]])[after]
        if known is not None:
            by_token = known[index_after.clamp_min(0), row_of_token.expand_as(index_after)]
            following = torch.where(index_after >= 0, by_token, following)
        known = following @ probabilities.T
        if remaining in REMAINING_TOKENS or remaining == length < min(REMAINING_TOKENS):
            found.append(known)
    least = float(values[values > 0].min()) if bool((values > 0).any()) else 1.0
    return torch.stack(found, 1).clamp_min(least)


def _cluster(rows: Tensor, weights: Tensor, most: int) -> Tensor:
    """The cluster of each of K rows [K, D] with these weights [K]: k-means from starting rows far from one another."""
    weights = weights.to(rows) + 0.01
    centers = ((weights[:, None] * rows).sum(0) / weights.sum())[None]
    for _ in range(most - 1):
        distance = torch.cdist(rows, centers).amin(1).square() * weights
        centers = torch.cat([centers, rows[distance.argmax()][None]])
    for _ in range(KMEANS_ROUNDS):
        cluster = torch.cdist(rows, centers).argmin(1)
        total = torch.zeros(len(centers), dtype=rows.dtype).index_add_(0, cluster, weights)
        sums = torch.zeros_like(centers).index_add_(0, cluster, weights[:, None] * rows)
        centers = torch.where(total[:, None] > 0, sums / total.clamp_min(1e-30)[:, None], centers)
    used, cluster = torch.unique(torch.cdist(rows, centers).argmin(1), return_inverse=True)
    assert len(used) <= most
    return torch.as_tensor(cluster)


def _split(
    states: TokenStates, split: Tensor, class_of_token: Tensor, classes: int, place: Tensor, last: Tensor
) -> TokenStates:
    """Add, for each place in ``split``, a place for each class of the last token and of the token before it."""
    table, f = states.transitions, len(states.transitions.places)
    first = torch.full((f,), -1)
    first[split] = f + torch.arange(len(split)) * classes**2
    parent = torch.cat([torch.arange(f), split.repeat_interleave(classes**2)])
    # An unsplit place stands for the class that its last token most often has.
    known = last < len(class_of_token)
    pairs = torch.bincount(place[known] * classes + class_of_token[last[known]], minlength=f * classes)
    last_class = torch.arange(classes).repeat_interleave(classes).repeat(len(split))
    own_class = torch.cat([pairs.reshape(f, classes).argmax(1), last_class])
    to = table.places[parent]
    ended, to = to >= f, to % f
    to_split = torch.where(first[to] >= 0, first[to] + class_of_token * classes + own_class[:, None], to)
    counts = table.counts.shape[1]
    parent_state = (parent[:, None] * counts + torch.arange(counts)).reshape(-1)
    return TokenStates(
        Transitions(torch.where(ended, to + len(parent), to_split).int(), table.changes[parent], table.counts),
        states.start,
        None if states.values is None else states.values[parent_state],
        parent,
        None if states.final_count is None else states.final_count[parent_state],
    )
