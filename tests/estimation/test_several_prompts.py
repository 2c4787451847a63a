"""log Z of several prompts: with one the plain estimate, with many samples each prompt's own, shrunk in between."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from tiltlm.errors import CheckpointError, NumericalError
from tiltlm.estimation import Partition, PromptPartition, Strata, log_partition, partition_for


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tilted(log_z: Tensor, samples: int, seed: int, spread: float = 0.8) -> tuple[Tensor, Tensor]:
    """Log-weights of so many samples of each prompt, with these log Z on average, and the prompts."""
    prompts = torch.arange(len(log_z)).repeat_interleave(samples)
    noise = torch.randn(len(prompts), generator=generator(seed), dtype=torch.float64)
    return log_z[prompts] + spread * noise - spread**2 / 2, prompts


def filtered(log_z: Tensor, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same for a filter that a fraction Z of each prompt's samples passes."""
    prompts = torch.arange(len(log_z)).repeat_interleave(samples)
    passes = torch.rand(len(prompts), generator=generator(seed), dtype=torch.float64) < log_z.exp()[prompts]
    return torch.where(passes, 0.0, -math.inf).double(), prompts


def between(spread: float, seed: int, count: int = 50) -> Tensor:
    """log Z of prompts that differ."""
    drawn = spread * torch.randn(count, generator=generator(seed), dtype=torch.float64)
    return (drawn - 2).clamp_max(-0.02)


def error(estimate: Tensor | float, truth: Tensor) -> float:
    return float((torch.as_tensor(estimate) - truth).square().mean())


def test_one_prompt_has_the_plain_estimate_bit_for_bit() -> None:
    state, plain = PromptPartition.empty(1), Partition.empty()
    for seed in range(4):
        log_weights, prompts = filtered(torch.tensor([-1.0]), 50, seed)
        state, plain = state.updated(log_weights, prompts), plain.updated(log_weights)
        assert state.log_z == plain.log_z
        assert state.at(prompts).tolist() == [plain.log_z.value] * 50
        assert state.pooled == plain
    assert partition_for(1) == Partition.empty()
    assert isinstance(partition_for(2), PromptPartition)


def test_with_many_samples_each_prompt_has_its_own() -> None:
    for make in (tilted, filtered):
        truth = between(1.0, 0, count=6)
        log_weights, prompts = make(truth, 40_000, 1)
        state = PromptPartition.empty(6).updated(log_weights, prompts)
        own = torch.stack([torch.tensor(log_partition(log_weights[prompts == c]).value) for c in range(6)])
        assert (state.by_prompt - own).abs().max() < 0.01
        assert (state.by_prompt - truth).abs().max() < 0.1
    exact = PromptPartition.empty(2).updated(torch.tensor([0.5, 0.5, -3.0, -3.0]), torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(exact.by_prompt, torch.tensor([0.5, -3.0]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("samples", [2, 4, 16, 64])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("make", [tilted, filtered])
def test_the_shrunk_estimate_is_about_as_good_as_the_better_of_both(make, spread, samples) -> None:  # type: ignore[no-untyped-def]
    found: dict[str, list[float]] = {"own": [], "pooled": [], "shrunk": []}
    for seed in range(20):
        truth = between(spread, seed)
        log_weights, prompts = make(truth, samples, seed + 100)
        state = PromptPartition.empty(50).updated(log_weights, prompts)
        own = Strata(prompts, 50).logsumexp(log_weights) - math.log(samples)
        found["own"].append(error(own.clamp_min(-math.log(2 * samples)), truth))
        found["pooled"].append(error(state.pooled.log_z.value, truth))
        found["shrunk"].append(error(state.by_prompt, truth))
    own_error, pooled, shrunk = (sum(found[name]) / 20 for name in ("own", "pooled", "shrunk"))
    if make is tilted:
        assert shrunk < 1.1 * min(own_error, pooled) + 0.2 * max(own_error, pooled)
    else:  # hits are so few that the prior decides
        assert shrunk < 1.05 * max(own_error, pooled)
        assert samples < 64 or shrunk < 1.2 * min(own_error, pooled) + 0.04


def test_a_prompt_without_samples_or_a_lone_sample_each_has_the_pooled_estimate() -> None:
    log_weights, prompts = tilted(between(1.0, 3, count=5), 40, 4)
    state = PromptPartition.empty(6).updated(log_weights, prompts)
    assert state.by_prompt[5] == state.pooled.log_z.value
    assert (state.by_prompt[:5] != state.pooled.log_z.value).all()
    # Without two samples of a prompt, differences between prompts look the same as noise.
    lone = PromptPartition.empty(5).updated(log_weights[::40], prompts[::40])
    assert lone.by_prompt.tolist() == [lone.pooled.log_z.value] * 5


def test_a_prompt_without_hits_is_put_below_the_others_but_not_at_zero() -> None:
    log_weights = torch.zeros(4 * 50, dtype=torch.float64)
    log_weights[:50] = -math.inf
    log_weights[60:75] = -math.inf
    state = PromptPartition.empty(4).updated(log_weights, torch.arange(4).repeat_interleave(50))
    assert -math.log(100) <= state.by_prompt[0] < state.by_prompt[1] < state.by_prompt[2] < 1e-6
    nothing = PromptPartition.empty(2).updated(torch.full((4,), -math.inf), torch.tensor([0, 0, 1, 1]))
    assert not nothing.known
    assert nothing.by_prompt.tolist() == [-math.inf] * 2
    assert (nothing.log_z.value, math.isnan(nothing.log_z.se)) == (-math.inf, True)
    assert nothing.updated(torch.zeros(2), torch.tensor([0, 1])).known


def test_rounds_add_up_whatever_their_order_of_prompts() -> None:
    log_weights, prompts = tilted(between(0.7, 5, count=8), 60, 6)
    whole = PromptPartition.empty(8).updated(log_weights, prompts)
    order = torch.randperm(len(prompts), generator=generator(0))
    streamed = PromptPartition.empty(8)
    for rows in order.split(96):
        streamed = streamed.updated(log_weights[rows], prompts[rows])
    assert (streamed.rounds, streamed.samples) == (5, 480)
    # Rounds are rated, so it is not the same to the last digit.
    assert (streamed.by_prompt - whole.by_prompt).abs().max() < 0.2
    assert streamed.log_z.value == pytest.approx(whole.log_z.value, abs=0.1)


def test_the_error_of_the_mean_over_prompts_is_right() -> None:
    off = []
    for seed in range(200):
        truth = between(0.7, 1, count=10)
        state = PromptPartition.empty(10).updated(*tilted(truth, 100, seed))
        off.append((state.log_z.value - float(truth.mean())) / state.log_z.se)
    assert abs(sum(off) / 200) < 0.4
    assert sum(x * x for x in off) / 200 == pytest.approx(1.0, abs=0.4)


def test_a_checkpoint_gives_back_the_state_bit_for_bit() -> None:
    log_weights, prompts = filtered(between(1.0, 2, count=5), 4, 3)
    state = PromptPartition.empty(7).updated(log_weights, prompts)
    again = PromptPartition.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert torch.equal(again.by_prompt, state.by_prompt)
    later = [s.updated(log_weights.flip(0), prompts) for s in (state, again)]
    assert torch.equal(later[0].by_prompt, later[1].by_prompt)
    for damaged in ({}, {"own": {}, "pooled": state.pooled.to_json()}):
        with pytest.raises(CheckpointError, match="partition"):
            PromptPartition.from_json(damaged)
    uneven = state.to_json()
    uneven["own"]["hits"] = [1.0]
    with pytest.raises(CheckpointError, match="uneven"):
        PromptPartition.from_json(uneven)


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(NumericalError):
        PromptPartition.empty(2).updated(torch.tensor([0.0, math.nan]), torch.tensor([0, 1]))


def test_strata_are_the_plain_operations_prompt_by_prompt() -> None:
    values = torch.randn(40, generator=generator(0), dtype=torch.float64)
    values[torch.tensor([0, 7])] = -math.inf
    prompts = torch.tensor([5, 9, 5, 2] * 10)
    strata = Strata.of(prompts, 40)
    table = torch.stack([values.exp(), values.exp().square()], 1)
    weights = strata.softmax(values)
    for place, prompt in enumerate((2, 5, 9)):
        rows = prompts == prompt
        torch.testing.assert_close(strata.logsumexp(values)[place], values[rows].logsumexp(0))
        torch.testing.assert_close(weights[rows], values[rows].softmax(0) / 3)
        torch.testing.assert_close(strata.sum(table)[place], table[rows].sum(0))
        torch.testing.assert_close(strata.mean(table)[place], table[rows].mean(0))
        assert [x[place] for x in strata.extremes(values)] == [values[rows].min(), values[rows].max()]
    assert strata.sizes.tolist() == [10, 20, 10]
    some = strata.select(prompts != 5)
    assert (some.count, some.sizes.tolist()) == (2, [10, 10])
    one = Strata.of(None, 40)
    assert torch.equal(one.softmax(values), values.softmax(0))
    assert float(one.logsumexp(values)) == float(values.logsumexp(0))
    empty = Strata(torch.tensor([0, 0, 2]), 3)
    assert empty.logsumexp(torch.tensor([-math.inf, -math.inf, 0.0])).tolist() == [-math.inf, -math.inf, 0.0]
    assert empty.softmax(torch.tensor([-math.inf, -math.inf, 0.0])).tolist() == pytest.approx([0, 0, 1 / 3])
