"""Coefficients from moments: against closed forms, another solver, and their own standard errors."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from tiltlm.errors import FeatureError, UnreachableTargetError
from tiltlm.targets import fit_moments
from tiltlm.targets.moments import log_mean_exp


def flat(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def draw(n: int, seed: int) -> Tensor:
    """A rare binary column, a binary one that goes with it, and a skewed continuous one [N, 3]."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    rare = (uniform[:, 0] < 0.2).double()
    related = (uniform[:, 1] < 0.3 + 0.4 * rare).double()
    skewed = -uniform[:, 2].log() * (1 + related)
    return torch.stack([rare, related, skewed], 1)


def achieved(features: Tensor, log_weights: Tensor, coefficients: Tensor) -> Tensor:
    return (log_weights + features @ coefficients).softmax(0) @ features


@pytest.mark.parametrize(
    ("hits", "goal"), [(3, 0.5), (3, 0.03), (3, 0.0001), (1, 0.999), (97, 0.5), (50, 0.5), (1, 0.01)]
)
def test_a_binary_feature_gets_the_difference_of_the_log_odds(hits: int, goal: float) -> None:
    features = torch.zeros(100, 1, dtype=torch.float64)
    features[:hits] = 1
    fit = fit_moments(features, flat(100), [goal], ["female"])
    assert float(fit.coefficients) == pytest.approx(logit(goal) - logit(hits / 100), abs=1e-8)
    assert fit.residual < 1e-9


def test_one_hit_in_ten_thousand_can_carry_nine_tenths() -> None:
    features = torch.zeros(10_000, 1, dtype=torch.float64)
    features[0] = 1
    fit = fit_moments(features, flat(10_000), [0.9], ["rare"])
    assert float(fit.coefficients) == pytest.approx(logit(0.9) - logit(1e-4), abs=1e-8)


def test_independent_features_do_not_disturb_each_other() -> None:
    table = torch.tensor([[a, b] for a in (0, 0, 0, 1) for b in (0, 0, 1, 1, 1)], dtype=torch.float64)
    fit = fit_moments(table, flat(20), [0.6, 0.3], ["a", "b"])
    expected = [logit(0.6) - logit(0.25), logit(0.3) - logit(0.6)]
    assert fit.coefficients.tolist() == pytest.approx(expected, abs=1e-8)


def test_a_correlated_pair_matches_its_closed_form() -> None:
    """Of two exclusive features with rates a and b, λ_a = log(μ_a/a) − log((1 − μ_a − μ_b)/(1 − a − b))."""
    counts = {(1.0, 0.0): 6, (0.0, 1.0): 41, (0.0, 0.0): 53}
    table = torch.tensor([row for row, n in counts.items() for _ in range(n)], dtype=torch.float64)
    fit = fit_moments(table, flat(100), [0.235, 0.235], ["female", "male"])
    rest = math.log(0.53 / 0.53)
    expected = [math.log(0.235 / 0.06) - rest, math.log(0.235 / 0.41) - rest]
    assert fit.coefficients.tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("seed", range(5))
def test_it_agrees_with_a_general_minimizer(seed: int) -> None:
    features = draw(500, seed)
    goal = torch.tensor([0.5, 0.4, 2.5], dtype=torch.float64)
    # A filter and a reward beside the moments.
    log_weights = torch.where(features[:, 2] < 4, 0.7 * features[:, 2].sin(), -math.inf)
    goal[2] = 1.7
    fit = fit_moments(features, log_weights, goal.tolist(), ["rare", "related", "skewed"])

    def dual(c: list[float]) -> float:
        coefficients = torch.as_tensor(c, dtype=torch.float64)
        return float((log_weights + (features - goal) @ coefficients).logsumexp(0))

    other = minimize(dual, [0.0, 0.0, 0.0], method="BFGS", options={"gtol": 1e-9})
    assert fit.coefficients.tolist() == pytest.approx(other.x.tolist(), abs=2e-5)
    assert float((achieved(features, log_weights, fit.coefficients) - goal).abs().max()) < 1e-9
    assert fit.residual < 1e-9


def test_a_moment_that_holds_already_needs_no_coefficient() -> None:
    features = draw(300, 0)
    fit = fit_moments(features, flat(300), features.mean(0).tolist(), ["a", "b", "c"])
    assert float(fit.coefficients.abs().max()) < 1e-9


def test_the_scale_of_a_feature_only_scales_its_coefficient() -> None:
    features, goal = draw(400, 1), torch.tensor([0.4, 0.6, 2.0], dtype=torch.float64)
    factor = torch.tensor([1.0, 1e6, 1e-6], dtype=torch.float64)
    names = ["a", "b", "c"]
    plain = fit_moments(features, flat(400), goal.tolist(), names)
    scaled = fit_moments(features * factor + 3, flat(400), (goal * factor + 3).tolist(), names)
    assert (scaled.coefficients * factor).tolist() == pytest.approx(plain.coefficients.tolist(), rel=1e-6)
    errors = scaled.covariance.diagonal().sqrt() * factor
    assert errors.tolist() == pytest.approx(plain.covariance.diagonal().sqrt().tolist(), rel=1e-6)


def test_far_outliers_do_not_throw_it_off() -> None:
    """A lognormal feature with a goal below its median, where a plain Newton step lands far outside."""
    heavy = (3 * torch.randn(3000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).exp()
    for goal in (0.5, 3.0, 300.0):
        fit = fit_moments(heavy, flat(3000), [goal], ["heavy"])
        assert float(achieved(heavy, flat(3000), fit.coefficients)) == pytest.approx(
            goal, abs=1e-9 * float(heavy.std())
        )


def test_rows_outside_of_the_filter_do_not_count() -> None:
    features, log_weights = draw(400, 3), flat(400)
    log_weights[::2] = -math.inf
    fit = fit_moments(features, log_weights, [0.4, 0.5, 2.0], ["a", "b", "c"])
    only = fit_moments(features[1::2], flat(200), [0.4, 0.5, 2.0], ["a", "b", "c"])
    assert fit.coefficients.tolist() == pytest.approx(only.coefficients.tolist(), abs=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_standard_error_is_the_standard_deviation_over_many_samples(weighted: bool) -> None:
    fits = []
    for seed in range(200):
        features = draw(600, 1000 + seed)
        # A reward on the first two, by which samples weigh differently from the start.
        log_weights = features[:, 0] - 0.5 * features[:, 1] if weighted else flat(600)
        fits.append(fit_moments(features, log_weights, [0.4, 0.6, 1.8], ["rare", "related", "skewed"]))
    coefficients = torch.stack([fit.coefficients for fit in fits])
    reported = torch.stack([fit.covariance for fit in fits]).mean(0)
    assert coefficients.std(0).tolist() == pytest.approx(reported.diagonal().sqrt().tolist(), rel=0.2)
    # The off-diagonal entries too: what λ_0 + λ_1 + λ_2 does.
    total = coefficients.sum(1).std()
    assert float(total) == pytest.approx(float(reported.sum().sqrt()), rel=0.2)


HALF = torch.tensor([0.0, 1.0] * 50, dtype=torch.float64)
STEPS = torch.arange(100, dtype=torch.float64)
FOURTH = (STEPS % 4 == 0).double()


@pytest.mark.parametrize(
    ("columns", "goals", "names", "parts"),
    [
        ([0 * HALF], [0.5], ["sports"], ["'sports'", "0 in all 100", "0.03", "1,000 samples", "target.samples"]),
        ([0 * HALF + 1], [0.5], ["sports"], ["'sports'", "1 in all 100", "leave it out"]),
        ([0 * HALF + 40], [50], ["words"], ["'words'", "40 in all 100", "50"]),
        ([HALF], [1.2], ["female"], ["'female'", "1.2", "0 to 1", "strictly between"]),
        ([HALF], [1.0], ["female"], ["'female'", "moment 1 ", "filter"]),
        ([STEPS], [99], ["words"], ["'words'", "99", "0 to 99", "draw more samples"]),
        ([STEPS], [-3], ["words"], ["'words'", "-3", "strictly between"]),
        ([HALF, 1 - HALF], [0.3, 0.3], ["even", "odd"], ["'even'", "'odd'", "Remove one"]),
        ([HALF, STEPS, HALF + STEPS], [0.3, 50, 60], ["a", "b", "sum"], ["'a'", "'b'", "'sum'", "Remove one"]),
        ([HALF, STEPS, STEPS.sin(), 2 * STEPS], [0.3, 50, 0, 99], ["a", "b", "c", "twice"], ["'b'", "'twice'"]),
        # One of the two holds in a quarter of the texts, never both.
        ([FOURTH, HALF], [0.7, 0.6], ["a", "b"], ["a = 0.7", "b = 0.6", "exclude each other", "Relax"]),
        # Together they would leave no text without either: the edge, where λ is infinite.
        ([FOURTH, HALF], [0.4, 0.6], ["a", "b"], ["a = 0.4", "b = 0.6", "edge", "Relax"]),
        ([HALF], [1e-12], ["rare"], ["'rare'", "1e-12", "edge", "0.5", "target.samples"]),
    ],
)
def test_goals_that_the_samples_cannot_reach_are_refused_by_name(
    columns: list[Tensor], goals: list[float], names: list[str], parts: list[str]
) -> None:
    with pytest.raises(UnreachableTargetError) as caught:
        fit_moments(torch.stack(columns, 1), flat(100), goals, names)
    for part in parts:
        assert part in str(caught.value)


def test_a_message_on_collinear_features_names_no_other() -> None:
    columns = torch.stack([HALF, STEPS, STEPS.sin(), 2 * STEPS], 1)
    with pytest.raises(UnreachableTargetError) as caught:
        fit_moments(columns, flat(100), [0.3, 50, 0, 99], ["a", "b", "c", "twice"])
    assert "'a'" not in str(caught.value)
    assert "'c'" not in str(caught.value)


def test_features_that_are_close_but_not_collinear_are_fitted() -> None:
    features = draw(2000, 5)[:, :1]
    almost = torch.cat([features, features], 1)
    almost[0, 1] = 1 - almost[0, 1]
    goal = almost.mean(0) * 1.5
    goal[1] += 2e-4
    fit = fit_moments(almost, flat(2000), goal.tolist(), ["a", "nearly a"])
    assert float((achieved(almost, flat(2000), fit.coefficients) - goal).abs().max()) < 1e-9


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error_of_its_feature(wrong: float) -> None:
    features = draw(50, 0)
    features[7, 1] = wrong
    with pytest.raises(FeatureError, match="'related'"):
        fit_moments(features, flat(50), [0.3, 0.5, 1.5], ["rare", "related", "skewed"])


def test_the_range_of_a_moment_is_that_of_the_texts_that_pass_the_filter() -> None:
    log_weights = torch.where(HALF > 0, 0.0, -math.inf)
    with pytest.raises(UnreachableTargetError, match="'even': it was 1 in all 50"):
        fit_moments(HALF[:, None], log_weights, [0.5], ["even"])


def test_log_mean_exp_is_right_where_exp_underflows() -> None:
    assert log_mean_exp(torch.tensor([-1000.0, -1000.0], dtype=torch.float64)) == pytest.approx(-1000)
    assert log_mean_exp(torch.tensor([-math.inf, 0.0], dtype=torch.float64)) == pytest.approx(-math.log(2))
    assert log_mean_exp(torch.full((3,), -math.inf, dtype=torch.float64)) == -math.inf
