"""Closeness and acceptance of samplers: exact on a list of all texts, and near that on a sample of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.estimation.acceptance import (
    Closeness,
    acceptance_rate,
    accepted_closeness,
    chain_acceptance,
    chain_closeness,
    chain_repeats,
    log_beta_for_acceptance,
    log_beta_for_kl,
    proposal_closeness,
    resampled_closeness,
)

# Twelve texts: two outside of the support, two of equal weight, weights within a factor of about e^7.
GENERATOR = torch.Generator().manual_seed(0)
Q = torch.rand(12, generator=GENERATOR, dtype=torch.float64).add(0.05)
Q = Q / Q.sum()
LOG_W = 2 * torch.randn(12, generator=GENERATOR, dtype=torch.float64) - 50
LOG_W[[2, 7]] = -math.inf
LOG_W[5] = LOG_W[4]
W = (LOG_W + 50).exp()
P = Q * W / (Q @ W)
SAMPLERS: dict[str, Callable[..., Closeness]] = {
    "proposal": proposal_closeness,
    "accepted": lambda w, probabilities=None: accepted_closeness(w, -49.0, probabilities),
    "chain": lambda w, probabilities=None: chain_closeness(w, 3, probabilities),
    "resampled": lambda w, probabilities=None: resampled_closeness(w, 4, probabilities),
}


def distances(distribution: Tensor) -> tuple[float, float]:
    return float(torch.xlogy(P, P / distribution.clamp_min(1e-300)).sum()), 0.5 * float((P - distribution).abs().sum())


def assert_exact(found: Closeness, distribution: Tensor) -> None:
    assert float(distribution.sum()) == pytest.approx(1)
    assert (found.kl.value, found.tv.value) == pytest.approx(distances(distribution), abs=1e-12)
    assert (found.kl.se, found.tv.se) == (0.0, 0.0)


def transitions() -> Tensor:
    """The transition matrix of a chain; it never visits texts of weight 0."""
    moves = Q * torch.where(W[:, None] > 0, (W / W[:, None].clamp_min(1e-300)).clamp_max(1), 1.0)
    moves.fill_diagonal_(0)
    return moves + torch.diag(1 - moves.sum(1))


def test_the_proposal_itself() -> None:
    assert_exact(proposal_closeness(LOG_W, Q), Q)


@pytest.mark.parametrize("log_beta", [-60.0, -52.0, -50.0, -48.5, -40.0])
def test_quasi_rejection_is_p_beta(log_beta: float) -> None:
    kept = (W / math.exp(log_beta + 50)).clamp_max(1)
    assert_exact(accepted_closeness(LOG_W, log_beta, Q), Q * kept / (Q @ kept))
    assert acceptance_rate(LOG_W, log_beta, Q).value == pytest.approx(float(Q @ kept), abs=1e-12)


def test_rejection_under_a_bound_is_p() -> None:
    found = accepted_closeness(LOG_W, float(LOG_W.max()), Q)
    assert (found.kl.value, found.tv.value) == pytest.approx((0, 0), abs=1e-14)
    # More than the bound is accepted less often, and no better.
    rates = [acceptance_rate(LOG_W, float(LOG_W.max()) + more, Q).value for more in (0, 1)]
    assert rates[1] == pytest.approx(rates[0] / math.e)


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 40])
def test_a_chain_after_some_steps(steps: int) -> None:
    start = torch.where(W > 0, Q, 0.0)
    assert_exact(
        chain_closeness(LOG_W, steps, Q), start / start.sum() @ torch.linalg.matrix_power(transitions(), steps)
    )


def test_a_converged_chain() -> None:
    torch.testing.assert_close(P @ transitions(), P)
    leaves = P @ (Q * (W / W[:, None].clamp_min(1e-300)).clamp_max(1)).sum(1)
    assert chain_acceptance(LOG_W, Q).value == pytest.approx(float(leaves), abs=1e-12)
    # A proposal of the same text is no rejection, so it is no repeat.
    refused = (Q * (1 - (W / W[:, None].clamp_min(1e-300)).clamp_max(1))).sum(1)
    assert chain_repeats(LOG_W, 3, Q).value == pytest.approx(float(P @ refused**3), abs=1e-12)


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_resampling_from_all_pools(pool: int) -> None:
    distribution = torch.zeros(12, dtype=torch.float64)
    for rows in map(list, itertools.product(range(12), repeat=pool)):
        if W[rows].sum() > 0:
            distribution.index_add_(0, torch.tensor(rows), Q[rows].prod() * W[rows] / W[rows].sum())
    assert_exact(resampled_closeness(LOG_W, pool, Q), distribution / distribution.sum())


def test_a_large_pool_comes_to_p_by_one_over_its_size() -> None:
    near = [resampled_closeness(LOG_W, pool, Q).tv.value for pool in (1_000, 10_000)]
    assert near[0] == pytest.approx(10 * near[1], rel=0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_estimates_and_their_errors_on_samples(name: str) -> None:
    truth = SAMPLERS[name](LOG_W, Q)
    generator = torch.Generator().manual_seed(1)
    rows = torch.multinomial(Q, 150 * 500, replacement=True, generator=generator).reshape(150, -1)
    found = [SAMPLERS[name](LOG_W[row]) for row in rows]
    for what in ("kl", "tv"):
        values = torch.tensor([getattr(one, what).value for one in found])
        errors = torch.tensor([getattr(one, what).se for one in found])
        exact = getattr(truth, what).value
        assert abs(float(values.mean()) - exact) < 5 * float(values.std()) / math.sqrt(150) + 0.1 * float(values.std())
        assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.25)


def test_equal_weights_give_p_itself() -> None:
    same = torch.full((40,), -3.0)
    for closeness in SAMPLERS.values():
        found = closeness(same)
        assert (found.kl.value, found.tv.value) == pytest.approx((0, 0), abs=1e-12)
    assert chain_acceptance(same).value == pytest.approx(1)
    assert chain_repeats(same, 5).value == pytest.approx(0)


def test_without_a_hit_all_is_nan_and_one_row_has_no_error() -> None:
    for closeness in SAMPLERS.values():
        found = closeness(torch.full((60,), -math.inf))
        assert all(math.isnan(x) for x in (found.kl.value, found.kl.se, found.tv.value, found.tv.se))
        assert math.isnan(closeness(torch.zeros(1)).kl.se)
    assert acceptance_rate(torch.full((60,), -math.inf), 0.0).value == 0


def test_weights_of_any_size() -> None:
    for closeness in (proposal_closeness, lambda w: chain_closeness(w, 3), lambda w: resampled_closeness(w, 4)):
        here, there = closeness(LOG_W), closeness(LOG_W - 3_000)
        assert here.kl.value == pytest.approx(there.kl.value)
        assert here.tv.se == pytest.approx(there.tv.se)


def test_beta_reaches_the_wanted_acceptance_or_kl() -> None:
    rows = [LOG_W, LOG_W[:6] + 1]
    for acceptance in (0.2, 0.6):
        log_beta = log_beta_for_acceptance(rows, acceptance)
        assert sum(acceptance_rate(w, log_beta).value for w in rows) / 2 == pytest.approx(acceptance, rel=1e-9)
    for kl in (0.01, 0.3):
        log_beta = log_beta_for_kl(rows, kl)
        assert sum(accepted_closeness(w, log_beta).kl.value for w in rows) / 2 == pytest.approx(kl, rel=1e-9)
    # Above the largest weight a larger β changes nothing.
    assert log_beta_for_kl(rows, 0.0) == pytest.approx(float(torch.cat(rows).max()))
    assert log_beta_for_acceptance(rows, 0.02) == pytest.approx(float(torch.cat(rows).max()))
    assert log_beta_for_acceptance([torch.zeros(5)], 1.0) == 0.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: log_beta_for_acceptance([LOG_W], 0.9), "acceptance: 0.9 .* 0.833 of the draws"),
        (lambda: log_beta_for_acceptance([LOG_W], 0.0), "acceptance: 0 "),
        (lambda: resampled_closeness(LOG_W, 0), "pool: 0"),
        (lambda: chain_closeness(LOG_W, -1), "steps: -1"),
    ],
)
def test_impossible_arguments_are_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        call()


def test_a_weight_that_is_no_number_is_refused() -> None:
    with pytest.raises(NumericalError, match="row 1"):
        accepted_closeness(torch.tensor([0.0, math.nan]), 0.0)
