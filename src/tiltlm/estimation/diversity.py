"""Diversity and fluency of samples: Distinct-n, Self-BLEU-5, entropy, perplexity under the base."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.means import UNKNOWN, mean, ratio_of_means

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
TokenLists = Sequence[Sequence[Hashable]]
ORDERS = 5


def distinct_1(token_lists: TokenLists) -> Estimate:
    """Mean over samples of unique tokens / tokens per sample (Li et al. 2016); empty samples are left out."""
    ratios = [len(set(tokens)) / len(tokens) for tokens in token_lists if len(tokens) > 0]
    return mean(torch.tensor(ratios, dtype=torch.float64)) if ratios else UNKNOWN


def distinct_n(token_lists: TokenLists, n: int = 1) -> Estimate:
    """Unique n-grams / n-grams of all samples together (Li et al. 2016, corpus level), with the jackknife's error.

    It falls as the corpus grows, so compare only equal numbers of samples. nan when no sample has n tokens.
    """
    if n < 1:
        raise UsageError(f"n is {n}; n-grams need at least one token")
    grams = _count_ngrams(token_lists, n)[n - 1]
    samples, total = len(token_lists), int(grams.count.sum())
    if total == 0:
        return UNKNOWN
    unique = grams.holders.shape[0]
    per_sample = np.bincount(grams.sample, weights=grams.count, minlength=samples)
    # Without a sample the corpus loses the n-grams that no other sample has.
    own = np.bincount(grams.sample, weights=grams.holders[grams.gram] == 1, minlength=samples)
    left = total - per_sample
    if samples < 2 or not left.all():
        return Estimate(unique / total, math.nan)
    return Estimate(unique / total, _jackknife((unique - own) / left))


def self_bleu_5(token_lists: TokenLists) -> Estimate:
    """Self-BLEU-5 between 0 and 1: mean sentence BLEU-5 of each sample against all others; higher is less diverse.

    Exactly sacrebleu's ``BLEU(max_ngram_order=5, smooth_method="exp", effective_order=True)`` on tokens, over 100. The
    error is the exact jackknife's, because every sample is also a reference of all others; nan with two samples, and
    all is nan with one. Source: Zhu et al. 2018 (Texygen), Papineni et al. 2002, smoothing of Chen & Cherry 2014.
    """
    samples = len(token_lists)
    if samples < 2:
        return UNKNOWN
    lengths = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
    everyone = np.arange(samples)
    totals = np.maximum(lengths[:, None] - np.arange(ORDERS), 0)
    correct = np.zeros((samples, ORDERS), dtype=np.int64)
    # Dropping sample j changes i's score only if i's clipped count rests on j alone.
    losses: list[tuple[Integers, Integers, Integers, Integers]] = []
    for order, grams in enumerate(_count_ngrams(token_lists, ORDERS)):
        largest, second, third = _three_largest(grams)
        is_first = grams.sample == largest.sample[grams.gram]
        is_second = grams.sample == second.sample[grams.gram]
        best = np.where(is_first, second.count[grams.gram], largest.count[grams.gram])
        holder = np.where(is_first, second.sample[grams.gram], largest.sample[grams.gram])
        next_best = np.where(is_first | is_second, third.count[grams.gram], second.count[grams.gram])
        clipped = np.minimum(grams.count, best)
        np.add.at(correct[:, order], grams.sample, clipped)
        loss = clipped - np.minimum(grams.count, next_best)
        hurt = loss > 0
        losses.append((grams.sample[hurt], holder[hurt], np.full(int(hurt.sum()), order), loss[hurt]))
    nearest, only_by = _closest_lengths(lengths)
    scores = _bleu(correct, totals, lengths, nearest)
    value = float(scores.mean())
    if samples < 3:
        return Estimate(value, math.nan)

    hypothesis, dropped, orders, loss = (np.concatenate(parts) for parts in zip(*losses, strict=True))
    by_length = only_by >= 0
    pairs, row = np.unique(
        np.concatenate([hypothesis, everyone[by_length]]) * samples + np.concatenate([dropped, only_by[by_length]]),
        return_inverse=True,
    )
    i, j = pairs // samples, pairs % samples
    without = correct[i]
    np.subtract.at(without, (row[: len(loss)], orders), loss)
    nearest_without = nearest[i]
    changed = only_by[i] == j
    nearest_without[changed] = [
        _second_closest_length(lengths, a, b) for a, b in zip(i[changed], j[changed], strict=True)
    ]
    change = _bleu(without, totals[i], lengths[i], nearest_without) - scores[i]
    sums = scores.sum() - scores + np.bincount(j, weights=change, minlength=samples)
    return Estimate(value, _jackknife(sums / (samples - 1)))


def entropy(policy_logprob_N: Tensor) -> Estimate:
    """Entropy of the policy, −E_π[log π(x)], in nats per sequence, from log-probabilities [N] of its own samples."""
    return mean(-policy_logprob_N)


def entropy_per_token(policy_logprob_N: Tensor, tokens_N: Tensor) -> Estimate:
    """−Σ log π / Σ tokens, in nats per token, from the policy's own samples and their numbers of tokens [N]."""
    return ratio_of_means(-policy_logprob_N, tokens_N)


def perplexity(base_logprob_N: Tensor, tokens_N: Tensor) -> Estimate:
    """exp(−Σ log a / Σ tokens): the perplexity of a token under the base; the error by the delta method."""
    per_token = ratio_of_means(-base_logprob_N, tokens_N)
    value = float(torch.tensor(per_token.value, dtype=torch.float64).exp())
    return Estimate(value, value * per_token.se)


@dataclass(frozen=True)
class _Ngrams:
    """N-grams of one order: a row for each (sample, n-gram) with its count; holders [G], how many samples have it."""

    sample: Integers
    gram: Integers
    count: Integers
    holders: Integers


@dataclass(frozen=True)
class _Place:
    """For each n-gram [G], the count at one place of the ranking and the sample that has it (0 and −1: none)."""

    count: Integers
    sample: Integers


def _count_ngrams(token_lists: TokenLists, orders: int) -> list[_Ngrams]:
    """Counts of n-grams 1 … ``orders``: an n-gram is numbered by the pair of its (n − 1)-gram and its last token."""
    numbers: dict[Hashable, int] = {}
    tokens = np.array([numbers.setdefault(t, len(numbers)) for ts in token_lists for t in ts], dtype=np.int64)
    lengths = np.array([len(ts) for ts in token_lists], dtype=np.int64)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    start = np.arange(len(tokens))
    # Tokens from each position to the end of its sample.
    room = np.repeat(lengths.cumsum(), lengths) - start
    gram = tokens
    counted: list[_Ngrams] = []
    for n in range(1, orders + 1):
        if n > 1:
            fits = room >= n
            start, room, gram, sample = start[fits], room[fits], gram[fits], sample[fits]
            gram = gram * len(numbers) + tokens[start + n - 1]
        _, gram = np.unique(gram, return_inverse=True)
        kinds = int(gram.max()) + 1 if len(gram) else 0
        keys, count = np.unique(sample * kinds + gram, return_counts=True)
        owner, kind = (keys // kinds, keys % kinds) if kinds else (keys, keys)
        counted.append(_Ngrams(owner, kind, count.astype(np.int64), np.bincount(kind, minlength=kinds)))
    return counted


def _three_largest(grams: _Ngrams) -> tuple[_Place, _Place, _Place]:
    """The three largest counts of each n-gram over the samples."""
    kinds = len(grams.holders)
    ranked = np.lexsort((-grams.count, grams.gram))
    first = np.concatenate([[0], grams.holders.cumsum()[:-1]]) if kinds else np.zeros(0, dtype=np.int64)
    places = []
    for place in range(3):
        held = grams.holders > place
        count, sample = np.zeros(kinds, dtype=np.int64), np.full(kinds, -1, dtype=np.int64)
        rows = ranked[first[held] + place]
        count[held], sample[held] = grams.count[rows], grams.sample[rows]
        places.append(_Place(count, sample))
    return places[0], places[1], places[2]


def _closest_lengths(lengths: Integers) -> tuple[Integers, Integers]:
    """For each sample, the closest length among the others (the shorter on a tie), and the only other sample with it.

    −1 where several others have that length.
    """
    kinds, group, size = np.unique(lengths, return_inverse=True, return_counts=True)
    alone = size[group] == 1
    nearest = lengths.copy()
    gap = np.abs(kinds[:, None] - kinds[None, :])
    np.fill_diagonal(gap, np.iinfo(np.int64).max)
    nearest[alone] = kinds[gap.argmin(1)][group[alone]]
    only_by = np.full(len(lengths), -1, dtype=np.int64)
    for i in range(len(lengths)):
        others = np.flatnonzero(lengths == nearest[i])
        others = others[others != i]
        if len(others) == 1:
            only_by[i] = others[0]
    return nearest, only_by


def _second_closest_length(lengths: Integers, sample: int, dropped: int) -> int:
    """The closest length to a sample's own when one other sample is dropped too."""
    others = np.delete(lengths, [sample, dropped])
    return int(min(others, key=lambda length: (abs(length - lengths[sample]), length)))


def _bleu(correct: Integers, totals: Integers, length: Integers, reference: Integers) -> Floats:
    """Sentence BLEU between 0 and 1 of rows [R, orders] of matched and of all n-grams.

    An order without a match counts as 1/2, then 1/4 … of one match (exponential smoothing); orders longer than the
    sentence are left out (effective order); no match at all is 0.
    """
    present = totals > 0
    missed = present & (correct == 0)
    matches = np.where(missed, 0.5 ** missed.cumsum(1), correct)
    log_precision = np.where(present, np.log(np.where(present, matches / np.maximum(totals, 1), 1.0)), 0.0)
    order = np.maximum(present.sum(1), 1)
    log_brevity = np.minimum(0.0, 1 - reference / np.maximum(length, 1))
    scores: Floats = np.where(correct.any(1), np.exp(log_brevity + log_precision.sum(1) / order), 0.0)
    return scores


def _jackknife(left_out_N: Floats) -> float:
    """Standard error from the values [N] that the statistic takes with each sample left out (Efron & Stein 1981)."""
    n = len(left_out_N)
    return math.sqrt((n - 1) / n * float(np.square(left_out_N - left_out_N.mean()).sum()))
