"""Importance weights: exact small cases, −inf rows, and known tails."""

from __future__ import annotations

import math

import pytest
import torch

from tiltlm.errors import NumericalError, UsageError
from tiltlm.estimation import (
    effective_sample_size,
    log_importance_weights,
    no_hit,
    pareto_k,
    pareto_k_threshold,
    self_normalize,
)

INF = math.inf


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal_quantiles(n: int) -> torch.Tensor:
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def test_log_weights_keep_zero_probability_of_the_target():
    log_weights = log_importance_weights(double(-140.0, -INF, -3.0), double(-141.0, -2.0, -1.0))
    assert log_weights.tolist() == [1.0, -INF, -2.0]


def test_log_weights_are_float64_even_from_float32():
    log_weights = log_importance_weights(torch.tensor([-140.0]), torch.tensor([-139.5]))
    assert log_weights.dtype == torch.float64
    assert log_weights.item() == -0.5


@pytest.mark.parametrize(
    ("score", "proposal", "named"),
    [
        (double(-1.0, -1.0), double(-1.0, -INF), "proposal_logprob_N is -inf in row 1"),
        (double(-1.0, INF), double(-1.0, -1.0), "target_logscore_N is inf in row 1"),
        (double(math.nan, -1.0), double(-1.0, -1.0), "target_logscore_N is NaN in row 0"),
    ],
)
def test_impossible_log_probabilities_are_named(score, proposal, named):
    with pytest.raises(NumericalError, match=named):
        log_importance_weights(score, proposal)


def test_wrong_shapes_are_named():
    with pytest.raises(UsageError, match="proposal_logprob_N has 2 rows and target_logscore_N has 1"):
        log_importance_weights(double(-1.0), double(-1.0, -1.0))
    with pytest.raises(UsageError, match=r"log_weights_N has shape \[0\]"):
        self_normalize(torch.zeros(0))
    with pytest.raises(UsageError, match=r"log_weights_N has shape \[2, 2\]"):
        self_normalize(torch.zeros(2, 2))
    with pytest.raises(NumericalError, match="log_weights_N is inf in row 1"):
        self_normalize(double(0.0, INF))


def test_weights_sum_to_one_far_below_underflow():
    weights = self_normalize(double(math.log(3) - 5000.0, -INF, -5000.0))
    assert weights.tolist() == pytest.approx([0.75, 0.0, 0.25], rel=1e-12)


def test_no_hit_is_a_state_and_not_nan():
    nothing = double(-INF, -INF)
    assert no_hit(nothing)
    assert not no_hit(double(-INF, -3.0))
    assert self_normalize(nothing).tolist() == [0.0, 0.0]
    size = effective_sample_size(nothing)
    assert size.value == 0.0
    assert math.isnan(size.se)


@pytest.mark.parametrize(
    ("weights", "expected"), [([2.0, 2.0, 2.0], 3.0), ([0.0, 0.0, 5.0], 1.0), ([1.0, 3.0], 1.6), ([4.0], 1.0)]
)
def test_effective_sample_size_of_small_cases(weights, expected):
    assert effective_sample_size(double(*weights).log() - 900).value == pytest.approx(expected, rel=1e-12)


def test_equal_weights_leave_no_uncertainty_and_one_hit_leaves_all():
    assert effective_sample_size(double(1.0, 1.0, 1.0, 1.0)).se == pytest.approx(0.0, abs=1e-12)
    assert effective_sample_size(torch.tensor([0.0] + [-INF] * 999)).se == pytest.approx(1.0, rel=0.01)


def test_effective_sample_size_and_its_error_match_repetition():
    generator = torch.Generator().manual_seed(3)
    n, spread = 2000, 0.8
    rounds = [
        effective_sample_size(spread * torch.randn(n, generator=generator, dtype=torch.float64)) for _ in range(300)
    ]
    values = torch.tensor([size.value for size in rounds], dtype=torch.float64)
    assert values.mean().item() == pytest.approx(n * math.exp(-(spread**2)), rel=0.02)
    assert torch.tensor([size.se for size in rounds]).mean().item() == pytest.approx(values.std().item(), rel=0.2)


# Made once with arviz 0.19's psislw on the same log-weights.
@pytest.mark.parametrize(
    ("spread", "expected"), [(0.5, 0.12866749513154896), (1.5, 0.5030050860137399), (3.0, 1.0888606863876016)]
)
def test_pareto_k_agrees_with_another_implementation(spread, expected):
    assert pareto_k(spread * normal_quantiles(400)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_pareto_k_finds_a_known_tail(shape):
    n = 20_000
    survival = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert pareto_k(-shape * survival.log()) == pytest.approx(shape, abs=0.06)


def test_pareto_k_ignores_scale_and_zero_weights():
    log_weights = 1.5 * normal_quantiles(400)
    with_zeros = torch.cat([torch.full((4000,), -INF, dtype=torch.float64), log_weights - 2000.0])
    assert pareto_k(with_zeros) == pytest.approx(pareto_k(log_weights), abs=1e-9)


def test_pareto_k_says_nothing_on_a_binary_target_and_warns_of_few_hits():
    binary = torch.cat([torch.full((500,), -INF), torch.full((100,), 2.5)])
    assert math.isnan(pareto_k(binary))
    two_levels = torch.cat([torch.full((300,), 0.1), torch.full((300,), 2.5)])
    assert math.isnan(pareto_k(two_levels))
    assert pareto_k(normal_quantiles(20)) == INF
    assert math.isfinite(pareto_k(normal_quantiles(21)))
    assert pareto_k(double(-INF, -INF)) == INF


def test_pareto_k_threshold():
    assert pareto_k_threshold(100) == pytest.approx(0.5)
    assert pareto_k_threshold(10**6) == 0.7
    assert pareto_k_threshold(1) == -INF
