"""The draw of one token per row agrees with a plain inversion of the cumulative sum, for any vocabulary size."""

from __future__ import annotations

import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from enumerable import SETTINGS
from tiltlm.lm import SamplingSettings, sampling

# Vocabularies of less than a block of 64 tokens, one block, a little more, and several blocks.
WIDTHS = [1, 2, 63, 64, 65, 130, 1000]
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(n: int, width: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return (2 * torch.randn(n, width, generator=seeded(seed), dtype=torch.float64)).to(dtype)


def with_holes(logits: Tensor) -> Tensor:
    """The logits with tokens of probability 0: the first, the last, a whole block, and every third of the rest."""
    holes = torch.arange(logits.shape[1]) % 3 == 0
    holes[-1] = True
    holes[64:128] = True
    # At least one token must remain.
    holes[1] = False
    return logits.masked_fill(holes, -math.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_frequencies_agree_with_the_probabilities(width: int, dtype: torch.dtype) -> None:
    n = 40_000
    logits = random_logits(1, width, dtype)
    drawn, _ = sampling.draw(logits.expand(n, width), SamplingSettings(), seeded(1))
    assert drawn.shape == (n,)
    expected = n * logits[0].double().softmax(0)
    observed = torch.bincount(drawn, minlength=width).double()
    assert len(observed) == width
    rare = expected < 10
    cells = [
        torch.cat([x[~rare], x[rare].sum()[None]])[: width if not rare.any() else None] for x in (observed, expected)
    ]
    if width == 1:
        assert observed.tolist() == [n]
    else:
        assert len(cells[0]) > width / 3
        assert scipy.stats.chisquare(cells[0].numpy(), cells[1].numpy()).pvalue > 1e-4


def naive(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Plain inversion of the cumulative sum, in float64."""
    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform.double() * cumulative[:, -1:], right=True)


@pytest.mark.parametrize("holes", [False, True], ids=["all tokens", "with holes"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_invert_agrees_with_plain_inversion(width: int, dtype: torch.dtype, holes: bool) -> None:
    if holes and width == 1:
        pytest.skip("one token cannot be left out")
    n = 5000
    logits = random_logits(n, width, dtype)
    probabilities = (with_holes(logits) if holes else logits).softmax(-1)
    uniform = torch.rand(n, 1, generator=seeded(2), dtype=dtype)
    token = sampling.invert(probabilities, uniform)
    assert token.shape == (n, 1)
    assert float((token == naive(probabilities, uniform)).double().mean()) > 0.999
    # Where rounding gives a neighbouring token, the number lies on the boundary between the two.
    cumulative = probabilities.double().cumsum(-1)
    end, mass = cumulative.gather(-1, token), probabilities.double().gather(-1, token)
    wanted = uniform.double() * cumulative[:, -1:]
    assert bool((end - mass - TOLERANCE[dtype] <= wanted).all())
    assert bool((wanted <= end + TOLERANCE[dtype]).all())
    assert bool((mass > 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS[1:])
def test_the_ends_of_the_unit_interval_give_tokens_of_positive_probability(width: int, dtype: torch.dtype) -> None:
    """0 and the largest number below 1 give the first and the last token of positive probability."""
    logits = random_logits(50, width, dtype)
    late, early = logits.clone(), logits.clone()
    late[:, : min(64, width - 1)] = -math.inf
    early[:, max(1, width - 66) :] = -math.inf
    for tested in (logits, with_holes(logits), late, early):
        possible = tested[0].isfinite().nonzero().squeeze(-1)
        below_one = torch.nextafter(torch.ones(50, 1, dtype=dtype), torch.zeros(50, 1, dtype=dtype))
        first = sampling.invert(tested.softmax(-1), torch.zeros(50, 1, dtype=dtype))
        assert set(first.flatten().tolist()) == {int(possible[0])}
        last = sampling.invert(tested.softmax(-1), below_one)
        mass = tested.double().softmax(-1).flip(-1).cumsum(-1).flip(-1).gather(-1, last)
        # The probability beyond that token is below the rounding error.
        assert float((mass - tested.double().softmax(-1).gather(-1, last)).max()) < TOLERANCE[dtype]
        assert bool(torch.isin(last, possible).all())


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("width", [1, 65, 1000])
def test_rows_drawn_in_groups_give_the_same_tokens(
    width: int, setting: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 101
    logits = random_logits(n, width, torch.float32)
    weights = random_logits(n, width, torch.float32, seed=5)
    pieces: list[slice] = []

    def of(rows: slice) -> Tensor:
        pieces.append(rows)
        return weights[rows]

    found = []
    for bound, count in ((2**40, 1), (4 * width * 10, 11), (1, n)):
        monkeypatch.setattr(sampling, "CPU_DRAW_BYTES", bound)
        generator = seeded(3)
        pieces.clear()
        found.append(
            (*sampling.draw(logits, SETTINGS[setting], generator, of if weighted else None), generator.get_state())
        )
        assert len(pieces) == (count if weighted else 0)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def reference_probabilities(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Probabilities [V] of one row, token by token from the definitions of the settings."""
    scaled = (logits.double() / settings.temperature).tolist()
    ranked = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    if settings.top_k:
        ranked = ranked[: settings.top_k]
    total = sum(math.exp(scaled[v]) for v in ranked)
    kept, mass = [], 0.0
    for v in ranked:
        if mass >= settings.top_p:
            break
        kept.append(v)
        mass += math.exp(scaled[v]) / total
    total = sum(math.exp(scaled[v]) for v in kept)
    probabilities = torch.zeros(len(scaled), dtype=torch.float64)
    for v in kept:
        probabilities[v] = math.exp(scaled[v]) / total
    return probabilities


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_log_probability_is_that_of_the_settings(setting: str, dtype: torch.dtype, weighted: bool) -> None:
    n, width = 300, 70
    # Multiples of 1/16: equal, or far enough apart not to count as equal.
    logits = (16 * random_logits(n, width)).round().div(16).to(dtype)
    weights = (16 * random_logits(n, width, seed=5)).round().div(16)
    weights = weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    arguments: dict[str, Any] = {"logit_bias": lambda rows: weights[rows]} if weighted else {}
    drawn, logprob = sampling.draw(logits, SETTINGS[setting], seeded(4), **arguments)
    assert logprob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    total = logits + weights if weighted else logits
    expected = torch.stack([reference_probabilities(row, SETTINGS[setting]) for row in total])
    kept = expected.gather(-1, drawn[:, None]).squeeze(-1)
    # No token that the settings remove is drawn.
    assert bool((kept > 0).all())
    torch.testing.assert_close(logprob.double(), kept.log(), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    # The draw is not always the likeliest token.
    assert float((kept < expected.max(-1).values).double().mean()) > 0.2


@pytest.mark.parametrize("setting", ["plain", "all_three"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_with_nan_or_infinity_does_not_change_other_rows(width: int, setting: str) -> None:
    logits = random_logits(40, width, torch.float32)
    fine, fine_logprob = sampling.draw(logits, SETTINGS[setting], seeded(6))
    broken = logits.clone()
    broken[3] = math.nan
    broken[7, width // 2] = math.nan
    broken[11] = -math.inf
    broken[39, -1] = math.inf
    drawn, logprob = sampling.draw(broken, SETTINGS[setting], seeded(6))
    assert bool(((drawn >= 0) & (drawn < width)).all())
    bad = torch.zeros(40, dtype=torch.bool)
    bad[[3, 7, 11, 39]] = True
    assert torch.equal(drawn[~bad], fine[~bad])
    assert torch.equal(logprob[~bad], fine_logprob[~bad])
    assert not bool(logprob[bad].isfinite().any())
