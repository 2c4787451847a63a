"""Diversity and fluency: equal to sacrebleu, jackknife equal to leaving out, small cases by hand."""

from __future__ import annotations

import math
import random
import time

import pytest
import torch
from sacrebleu.metrics import BLEU

from tiltlm.errors import UsageError
from tiltlm.estimation import distinct_1, distinct_n, entropy, entropy_per_token, perplexity, self_bleu_5


def sacrebleu_self_bleu(token_lists: list[list[int]]) -> float:
    bleu = BLEU(max_ngram_order=5, smooth_method="exp", effective_order=True, tokenize="none")
    texts = [" ".join(f"t{token}" for token in tokens) for tokens in token_lists]
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    return sum(scores) / len(scores) / 100


def leave_one_out_error(token_lists: list[list[int]], statistic) -> float:
    n = len(token_lists)
    left = [statistic(token_lists[:i] + token_lists[i + 1 :]) for i in range(n)]
    center = sum(left) / n
    return math.sqrt((n - 1) / n * sum((value - center) ** 2 for value in left))


def random_samples(rng: random.Random, samples: int, vocabulary: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(vocabulary) for _ in range(rng.randrange(longest + 1))] for _ in range(samples)]


@pytest.mark.parametrize("seed", range(60))
def test_self_bleu_equals_sacrebleu_with_empty_and_short_samples(seed):
    rng = random.Random(seed)
    samples = random_samples(rng, rng.randint(3, 9), rng.randint(1, 6), rng.choice([2, 6, 12]))
    estimate = self_bleu_5(samples)
    assert estimate.value == pytest.approx(sacrebleu_self_bleu(samples), abs=1e-9)
    assert estimate.se == pytest.approx(leave_one_out_error(samples, sacrebleu_self_bleu), abs=1e-9)


@pytest.mark.parametrize(
    "samples",
    [
        [[], []],
        [[1], [1]],
        [[1, 2, 3], []],
        [[1, 2, 3, 4, 5, 6], [1, 2, 3]],
        [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5, 6]],
        [[1, 1, 1], [1, 1], [1, 2, 1]],
    ],
)
def test_self_bleu_equals_sacrebleu_at_the_edges(samples):
    assert self_bleu_5(samples).value == pytest.approx(sacrebleu_self_bleu(samples), abs=1e-9)


def test_self_bleu_by_hand():
    assert self_bleu_5([[1, 2, 3, 4, 5]] * 4).value == pytest.approx(1.0)
    assert self_bleu_5([[1, 2, 3, 4, 5]] * 4).se == pytest.approx(0.0, abs=1e-12)
    assert self_bleu_5([[1, 2, 3], [4, 5, 6], [7, 8]]).value == 0.0
    # One word against three: precision 1, brevity exp(1 − 3/1); three against one: (1/3 · 1/4 · 1/4)^(1/3).
    expected = (math.exp(-2) + (1 / 48) ** (1 / 3)) / 2
    assert self_bleu_5([[1], [1, 2, 3]]).value == pytest.approx(expected, abs=1e-12)
    assert math.isnan(self_bleu_5([[1, 2]]).value)
    assert math.isnan(self_bleu_5([]).value)
    assert math.isnan(self_bleu_5([[1, 2], [1, 2]]).se)


def test_self_bleu_is_fast_and_takes_any_tokens():
    rng = random.Random(0)
    samples = [[min(int(rng.paretovariate(0.6)), 4096) for _ in range(40)] for _ in range(1000)]
    start = time.process_time()
    value = self_bleu_5(samples).value
    assert time.process_time() - start < 5
    assert self_bleu_5([[str(token) for token in tokens] for tokens in samples]).value == value
    assert 0.0 < value < 1.0


def test_distinct_1_is_a_mean_over_samples():
    estimate = distinct_1([[1, 1, 2, 3], [5, 5], [], [7]])
    assert estimate.value == pytest.approx((0.75 + 0.5 + 1.0) / 3)
    assert estimate.se == pytest.approx(torch.tensor([0.75, 0.5, 1.0]).std().item() / math.sqrt(3))
    assert math.isnan(distinct_1([[], []]).value)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_distinct_n_over_the_corpus(n):
    rng = random.Random(n)
    samples = random_samples(rng, 12, 5, 9) + [[1, 2, 3, 4, 5]] * 2

    def by_hand(token_lists: list[list[int]]) -> float:
        grams = [tuple(tokens[i : i + n]) for tokens in token_lists for i in range(len(tokens) - n + 1)]
        return len(set(grams)) / len(grams)

    estimate = distinct_n(samples, n)
    assert estimate.value == pytest.approx(by_hand(samples), abs=1e-12)
    assert estimate.se == pytest.approx(leave_one_out_error(samples, by_hand), abs=1e-12)


def test_distinct_n_edges():
    assert math.isnan(distinct_n([[1], []], 2).value)
    assert distinct_n([[1, 2]], 1).value == 1.0
    assert math.isnan(distinct_n([[1, 2]], 1).se)
    with pytest.raises(UsageError, match="n is 0"):
        distinct_n([[1]], 0)


def test_entropy_and_perplexity_by_hand():
    logprob, tokens = torch.tensor([-2.0, -6.0, -4.0]), torch.tensor([1, 4, 3])
    assert entropy(logprob).value == pytest.approx(4.0)
    assert entropy_per_token(logprob, tokens).value == pytest.approx(12 / 8)
    assert perplexity(logprob, tokens).value == pytest.approx(math.exp(12 / 8))
    assert perplexity(logprob, tokens).se == pytest.approx(
        math.exp(12 / 8) * entropy_per_token(logprob, tokens).se, rel=1e-12
    )
    assert math.isnan(perplexity(torch.tensor([-1.0]), torch.tensor([0])).value)
    assert perplexity(torch.tensor([-math.inf, -1.0]), torch.tensor([2, 2])).value == math.inf


def test_the_error_of_perplexity_is_its_standard_deviation():
    generator = torch.Generator().manual_seed(1)
    values, errors = [], []
    for _ in range(300):
        tokens = torch.randint(5, 41, (400,), generator=generator)
        noise = torch.randn(400, generator=generator, dtype=torch.float64)
        estimate = perplexity(-2.0 * tokens - noise * tokens.sqrt(), tokens)
        values.append(estimate.value)
        errors.append(estimate.se)
    deviation = torch.tensor(values).std().item()
    assert abs(sum(values) / 300 - math.exp(2)) < 5 * deviation / math.sqrt(300)
    assert sum(errors) / 300 == pytest.approx(deviation, rel=0.17)
