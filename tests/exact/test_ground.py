"""``benchmarks/ground``: the mean of its sampled gradients is the exact gradient of KL(p‖π)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from ground.distilled import (
    Distilled,
    Guides,
    guides_of,
    keep_guide,
    learn_mixture_weights,
    mixture_of,
    records_of,
    surrogate_coefficients,
)
from ground.policies import Adam, KeptGuidePolicy
from ground.pooled import FromPool, SequencePool
from ground.runs import Budget, Drawn, Runs
from ground.sampled import Sampled, SampledLoop
from ground.worlds import World, enumerable, rare_phrase

from tiltlm.exact import MarkovModel, MarkovTarget, markov_target
from tiltlm.objectives import GDCPlusPlus, Guided, MinimumVariance, Pooled

RUNS, SAMPLES = 100, 2000


def on_policy(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    return sampled(runs, log_z, table, table)


def from_the_base(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    return sampled(runs, log_z, table, runs.base)


def sampled(runs: Runs, log_z: Tensor, table: Tensor, proposal: Tensor) -> Tensor:
    batch = runs.score(runs.draw(proposal, SAMPLES))
    records = runs.records(batch, batch.drawn.under(table), log_z)
    return runs.total_coefficients(batch.drawn, torch.stack([GDCPlusPlus().coefficients(record) for record in records]))


def guided(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    guides = guides_of(runs)
    return distilled(runs, log_z, table, guides, runs.draw(guides.logprobs, SAMPLES))


def mixed(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    """With the mixture weights of the estimators learned on other samples."""
    guides, balances = guides_of(runs), [MinimumVariance() for _ in range(RUNS)]
    before = runs.draw(guides.logprobs, 100)
    records = records_of(runs, before, table, guides, log_z, balances)
    learn_mixture_weights(balances, records, before, table, guides.logprobs)
    return distilled(runs, log_z, table, guides, runs.draw(guides.logprobs, SAMPLES), balances)


def distilled(
    runs: Runs,
    log_z: Tensor,
    table: Tensor,
    guides: Guides,
    drawn: Drawn,
    balances: list[MinimumVariance] | None = None,
) -> Tensor:
    records = records_of(runs, drawn, table, guides, log_z, balances or [MinimumVariance()] * RUNS)
    return surrogate_coefficients(runs, Guided(), drawn, guides, records)


def from_the_pool(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    guides = guides_of(runs)
    kept = Drawn.joined([runs.draw(runs.base, SAMPLES // 4), runs.draw(guides.logprobs, SAMPLES - SAMPLES // 4)])
    kept = replace(kept, logprob=mixture_of(runs, kept, guides.logprobs, 0.25))
    return distilled(runs, log_z, table, guides, kept)


def from_all_proposals(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    """A quarter from the base and the others from the policy, weighted by their mixture."""
    pool = SequencePool(runs)
    pool.add(runs.score(runs.draw(runs.base, SAMPLES // 4)), 0)
    pool.proposals.append(table)
    pool.add(runs.score(runs.draw(table, SAMPLES - SAMPLES // 4)), 1)
    mixed = pool.mixed()
    records = runs.records(mixed, mixed.drawn.under(table), log_z)
    objective = Pooled(kappa=0.7, adaptive=False)
    return runs.total_coefficients(mixed.drawn, torch.stack([objective.coefficients(record) for record in records]))


def toward_the_target(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    """A guide from exact values, for a target that no sample of the base reaches."""
    log_values = 0.9 * runs.world.log_values
    logprobs = runs.world.graph.tilted(runs.world.base, log_values).float()
    guides = Guides(logprobs.expand(RUNS, -1, -1), log_values.expand(RUNS, -1))
    return distilled(runs, log_z, table, guides, runs.draw(guides.logprobs, SAMPLES))


def near(world: World, steps: int) -> World:
    """The world with a policy trained on the exact gradient as the start, so that samples reach the target."""
    policy = world.network.copies(1)
    optimizer = Adam(policy.parameters, torch.tensor([0.03]))
    for _ in range(steps):
        divergence = world.kl(policy.log_table()).sum()
        optimizer.step(list(torch.autograd.grad(divergence, policy.parameters)))
    return replace(world, network=policy)


# A guide alone is tested on a target with small weights; in the pool the base bounds them.
@pytest.mark.parametrize(
    ("method", "target"),
    [
        (on_policy, "hybrid"),
        (from_the_base, "hybrid"),
        (guided, "moment"),
        (mixed, "moment"),
        (from_the_pool, "hybrid"),
        (from_all_proposals, "hybrid"),
        (on_policy, "rare"),
        (toward_the_target, "rare"),
    ],
)
def test_mean_of_sampled_gradients_is_exact(method: Callable[[Runs, Tensor, Tensor], Tensor], target: str) -> None:
    world = near(rare_phrase(vocabulary=12, length=12), 30) if target == "rare" else enumerable(target)
    runs = Runs(world, RUNS, [0.01], SAMPLES)
    # All runs have the target with its exact coefficients; only their samples differ.
    runs.log_tilt = world.target.log_tilt(world.values).expand_as(runs.log_tilt)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in runs.policy.parameters:
            parameter += 0.05 * torch.randn(parameter.shape[1:], generator=generator)
    table = runs.policy.log_table()
    log_z = torch.full((RUNS,), world.log_z, dtype=torch.float64)

    coefficients = method(runs, log_z, table.detach())
    found = torch.cat([g.flatten(1) for g in runs.gradients(table, coefficients)], 1).double()
    divergence = world.kl(runs.policy.log_table()).sum()
    exact = torch.cat([g[0].flatten() for g in torch.autograd.grad(divergence, runs.policy.parameters)]).double()

    mean, error = found.mean(0), found.std(0) / RUNS**0.5
    assert float(error.norm()) < 0.1 * float(exact.norm())
    assert float((mean - exact).norm()) < 1.7 * float(error.norm())


@pytest.fixture(scope="module")
def rare() -> World:
    return rare_phrase()


def markov(world: World) -> MarkovTarget:
    """The same target, by the library's recursion over contexts and states."""
    token = world.network.node[:, 0]
    logprobs = torch.full((world.graph.vocabulary,) * 2, math.nan, dtype=torch.float64)
    logprobs[token] = world.base
    assert torch.equal(logprobs[token], world.base)
    return markov_target(MarkovModel(logprobs, world.graph.length), world.automaton, world.terms)


def test_a_rare_phrase_has_the_z_of_the_markov_model(rare: World) -> None:
    assert rare.log_z == pytest.approx(markov(rare).log_z, abs=1e-10)
    assert math.exp(rare.log_z) == pytest.approx(1e-5, rel=0.02)


def test_its_kl_to_the_base_is_minus_log_z(rare: World) -> None:
    assert float(rare.kl(rare.base[None])) == pytest.approx(-rare.log_z, abs=1e-10)


def test_its_kl_to_policies_is_the_markov_model_s(rare: World) -> None:
    policy = rare.network.copies(1)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        table = policy.log_table()
    truth = markov(rare)
    token, state, position = policy.node.unbind(-1)
    logprobs = torch.zeros(
        rare.graph.length, *truth.log_value_table.shape[1:], rare.graph.vocabulary, dtype=torch.float64
    )
    logprobs[position, token, state] = table[0].double()
    assert float(rare.kl(table)) == pytest.approx(truth.kl(logprobs), abs=1e-10)


def test_its_policies_approximate_it_but_cannot_represent_it(rare: World) -> None:
    assert 1e-4 < float(rare.kl(near(rare, 200).network.log_table().detach())) < 0.1


@pytest.mark.parametrize("target", ["pointwise-2", "hybrid"])
def test_a_policy_that_keeps_the_exact_guide_is_the_target(target: str) -> None:
    world = enumerable(target)
    kept = KeptGuidePolicy(world.network.copies(2), world.graph, world.log_values.float().expand(2, -1))
    with torch.no_grad():
        assert world.kl(kept.log_table()).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)


def test_a_kept_guide_costs_one_pass_over_the_fit_and_starts_at_the_guided_base() -> None:
    """The base scores the fit samples once; the policy is then the guided base."""
    runs = Runs(enumerable("moment"), 2, [0.01], SAMPLES)
    before = runs.passes.clone()
    guides = keep_guide(runs)
    assert (runs.passes - before).tolist() == [SAMPLES, SAMPLES]
    with torch.no_grad():
        torch.testing.assert_close(runs.policy.log_table(), guides.logprobs, atol=1e-5, rtol=0)
    assert bool((runs.curve[-1].kl < 0.7 * runs.curve[0].kl).all())


@pytest.mark.parametrize(
    "method",
    [
        Sampled(GDCPlusPlus()),
        Sampled(GDCPlusPlus(), "published", reuse=True),
        Distilled(Guided()),
        FromPool(Pooled()),
        FromPool(GDCPlusPlus(), rule="on_policy", keeps_guide=True),
    ],
    ids=["on-policy", "published", "guided", "pooled", "guide-kept"],
)
def test_every_kind_of_method_trains(method: Sampled | Distilled | FromPool) -> None:
    runs = Runs(enumerable("moment"), 2, [0.01], SAMPLES)
    method.train(runs, Budget(4000, 4000))
    assert not bool(runs.failed.any())
    assert bool((runs.curve[-1].kl < 0.9 * runs.curve[0].kl).all())


def test_on_policy_batches_are_drawn_from_the_policy() -> None:
    loop = SampledLoop(Sampled(GDCPlusPlus()), Runs(enumerable("moment"), 2, [0.1], SAMPLES))
    loop.turn()
    policy = loop.runs.policy.log_table().detach()
    loop.turn()
    assert torch.equal(loop.proposal, policy)
    assert not torch.equal(policy[:1], loop.runs.base)
