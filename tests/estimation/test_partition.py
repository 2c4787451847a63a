"""log Z as rounds stream in: exact cases, no bias from rare hits, bad rounds forgotten, checkpoints bit for bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from tiltlm.errors import CheckpointError, NumericalError
from tiltlm.estimation import Partition, effective_sample_size, log_partition

INF = math.inf
REPEATS = 140


def streamed(rounds: list[torch.Tensor]) -> Partition:
    state = Partition.empty()
    for log_weights in rounds:
        state = state.updated(log_weights)
    return state


def binary_rounds(rates: list[float], z: float, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Rounds of a pointwise target: a hit, of probability rate, has weight z/rate."""
    draws = [torch.rand(size, generator=generator, dtype=torch.float64) for _ in rates]
    return [torch.where(draw < rate, math.log(z / rate), -INF) for draw, rate in zip(draws, rates, strict=True)]


def lognormal_rounds(spreads: list[float], size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Rounds of log-normal weights of mean 1."""
    return [s * torch.randn(size, generator=generator, dtype=torch.float64) - s * s / 2 for s in spreads]


def repeated(make: Callable[[], list[torch.Tensor]], times: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ẑ of the partition, its reported error relative to Ẑ, and Ẑ by equal averaging, over repetitions."""
    rows = []
    for _ in range(times):
        rounds = make()
        log_z = streamed(rounds).log_z
        rows.append([math.exp(log_z.value), log_z.se, torch.cat(rounds).exp().mean().item()])
    table = torch.tensor(rows, dtype=torch.float64)
    return table[:, 0], table[:, 1], table[:, 2]


def test_one_round_is_logsumexp_with_the_error_of_its_effective_size():
    log_weights = torch.tensor([-141.0, -139.5, -INF, -140.2], dtype=torch.float64)
    log_z = log_partition(log_weights)
    assert log_z.value == pytest.approx(log_weights.logsumexp(0).item() - math.log(4), rel=1e-14)
    size = effective_sample_size(log_weights).value
    assert log_z.se == pytest.approx(math.sqrt((1 / size - 1 / 4) * 4 / 3), rel=1e-9)


def test_nothing_hit_is_a_state():
    state = streamed([torch.full((64,), -INF)] * 3)
    assert not Partition.empty().known
    assert not state.known
    assert state.log_z.value == -INF
    assert math.isnan(state.log_z.se)
    assert (state.rounds, state.samples, state.hits) == (3, 192, 0)


def test_rounds_without_hits_pull_z_down():
    hit = torch.cat([torch.zeros(1), torch.full((63,), -INF)])
    before, after = streamed([hit]), streamed([hit] + [torch.full((64,), -INF)] * 3)
    assert after.hits == 1
    assert after.log_z.value < before.log_z.value - math.log(2)


def test_hits_after_a_long_silence_do_not_forget_it():
    silence, hits = [torch.full((64,), -INF)] * 20, [torch.zeros(64)]
    assert streamed(silence + hits).log_z.value == pytest.approx(-math.log(21), abs=0.2)


def test_a_single_sample_has_no_error():
    assert log_partition(torch.tensor([-3.0])).value == -3.0
    assert math.isnan(log_partition(torch.tensor([-3.0])).se)


def test_equal_weights_are_known_exactly():
    log_z = streamed([torch.full((64,), -2.0, dtype=torch.float64)] * 5).log_z
    assert log_z.value == pytest.approx(-2.0, abs=1e-12)
    assert log_z.se == pytest.approx(0.0, abs=1e-6)


def test_scaling_the_target_shifts_log_z_and_nothing_else():
    generator = torch.Generator().manual_seed(1)
    rounds = lognormal_rounds([2.0, 1.0, 0.5], 64, generator)
    plain, shifted = streamed(rounds), streamed([r - 700.0 for r in rounds])
    assert shifted.log_z.value == pytest.approx(plain.log_z.value - 700.0, abs=1e-9)
    assert shifted.log_z.se == pytest.approx(plain.log_z.se, rel=1e-9)


def test_consistent_on_a_rare_binary_target_in_small_batches():
    generator = torch.Generator().manual_seed(2)
    z = 1e-2
    estimates, errors, _ = repeated(lambda: binary_rounds([z] * 40, z, 64, generator), REPEATS)
    sd = estimates.std().item()
    assert sd < 0.3 * z
    assert abs(estimates.mean().item() - z) < 5 * sd / math.sqrt(REPEATS)
    assert errors.mean().item() == pytest.approx(sd / z, rel=0.2)
    # Rating a round by its own hits instead would bias Z by more than half (measured +0.6 Z); this is the trap.
    long = streamed(binary_rounds([z] * 1500, z, 64, generator))
    assert long.log_z.value == pytest.approx(math.log(z), abs=0.15)


def test_bad_early_rounds_are_forgotten_binary():
    generator = torch.Generator().manual_seed(3)
    z = 1e-2
    rates = [z] * 10 + [0.5] * 30
    estimates, errors, equal = repeated(lambda: binary_rounds(rates, z, 64, generator), REPEATS)
    assert (estimates - z).square().mean() < 0.2 * (equal - z).square().mean()
    assert abs(estimates.mean().item() - z) < 5 * estimates.std().item() / math.sqrt(REPEATS)
    assert errors.mean().item() == pytest.approx(estimates.std().item() / z, rel=0.2)


def test_bad_early_rounds_are_forgotten_heavy_tailed():
    generator = torch.Generator().manual_seed(4)
    spreads = [2.5] * 10 + [0.4] * 30
    estimates, _, equal = repeated(lambda: lognormal_rounds(spreads, 64, generator), REPEATS)
    assert (estimates - 1).square().mean() < 0.1 * (equal - 1).square().mean()
    assert abs(estimates.mean().item() - 1) < 5 * estimates.std().item() / math.sqrt(REPEATS)


def test_costs_little_where_equal_averaging_is_best():
    generator = torch.Generator().manual_seed(5)
    estimates, _, equal = repeated(lambda: lognormal_rounds([1.5] * 30, 64, generator), REPEATS)
    assert (estimates - 1).square().mean() < 1.3 * (equal - 1).square().mean()
    assert abs(estimates.mean().item() - 1) < 5 * estimates.std().item() / math.sqrt(REPEATS)


@pytest.mark.parametrize("rounds", [0, 1, 7])
def test_checkpoint_is_exact_through_json_text(rounds):
    generator = torch.Generator().manual_seed(6)
    state = streamed(lognormal_rounds([1.3] * rounds, 33, generator))
    restored = Partition.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert restored == state
    more = lognormal_rounds([0.7], 33, generator)[0]
    assert restored.updated(more) == state.updated(more)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"samples": "many"}, "partition.samples"), ({"rating_sum": None}, "partition.rating_sum"), ({"x": 1}, "needs")],
)
def test_a_damaged_checkpoint_is_named(change, named):
    with pytest.raises(CheckpointError, match=named):
        Partition.from_json({**Partition.empty().to_json(), **change})


def test_nan_never_enters_the_state():
    with pytest.raises(NumericalError, match="row 1"):
        Partition.empty().updated(torch.tensor([0.0, math.nan]))
