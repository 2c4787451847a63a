"""The ground of ``benchmarks/estimators.py``: the mean of its sampled gradients is the exact gradient of KL(p‖π)."""

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

from ground.distilled import Guides, guides_of, keep_guide, learn_shares, mixture_of, pulls, records_of
from ground.policies import Adam, GuideKept
from ground.pooled import Kept
from ground.runs import Drawn, Runs
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
    return runs.pull(batch.drawn, torch.stack([GDCPlusPlus().coefficients(record) for record in records]))


def guided(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    guides = guides_of(runs)
    return distilled(runs, log_z, table, guides, runs.draw(guides.law, SAMPLES))


def mixed(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    """With the shares that other samples gave to each form."""
    guides, balances = guides_of(runs), [MinimumVariance() for _ in range(RUNS)]
    before = runs.draw(guides.law, 100)
    records = records_of(runs, before, table, guides, log_z, balances)
    learn_shares(balances, records, before, table, guides.law)
    return distilled(runs, log_z, table, guides, runs.draw(guides.law, SAMPLES), balances)


def distilled(
    runs: Runs,
    log_z: Tensor,
    table: Tensor,
    guides: Guides,
    drawn: Drawn,
    balances: list[MinimumVariance] | None = None,
) -> Tensor:
    records = records_of(runs, drawn, table, guides, log_z, balances or [MinimumVariance()] * RUNS)
    return pulls(runs, Guided(), drawn, guides, records)


def from_the_pool(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    guides = guides_of(runs)
    kept = Drawn.joined([runs.draw(runs.base, SAMPLES // 4), runs.draw(guides.law, SAMPLES - SAMPLES // 4)])
    kept = replace(kept, logprob=mixture_of(runs, kept, guides.law, 0.25))
    return distilled(runs, log_z, table, guides, kept)


def from_all_proposals(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    """A quarter from the base and the others from the policy, as drawn from their mixture."""
    kept = Kept(runs)
    kept.add(runs.score(runs.draw(runs.base, SAMPLES // 4)), 0)
    kept.laws.append(table)
    kept.add(runs.score(runs.draw(table, SAMPLES - SAMPLES // 4)), 1)
    mixed = kept.mixed()
    records = runs.records(mixed, mixed.drawn.under(table), log_z)
    objective = Pooled(kappa=0.7, adaptive=False)
    return runs.pull(mixed.drawn, torch.stack([objective.coefficients(record) for record in records]))


def toward_the_target(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    """A guide that knows the truth, for a target that no sample of the base shows."""
    promises = 0.9 * runs.world.promise
    law = runs.world.graph.tilted(runs.world.base, promises).float()
    guides = Guides(law.expand(RUNS, -1, -1), promises.expand(RUNS, -1))
    return distilled(runs, log_z, table, guides, runs.draw(guides.law, SAMPLES))


def near(world: World, steps: int) -> World:
    """The world with an exactly trained policy for a start, whose samples show the target."""
    policy = world.network.copies(1)
    optimizer = Adam(policy.parameters, torch.tensor([0.03]))
    for _ in range(steps):
        divergence = world.kl(policy.log_table()).sum()
        optimizer.step(list(torch.autograd.grad(divergence, policy.parameters)))
    return replace(world, network=policy)


# A guide alone is tried where its weights are small; in the pool the base bounds them.
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
    # The same target for all, with its exact coefficients: only what is drawn differs.
    runs.log_tilt = world.target.log_tilt(world.values).expand_as(runs.log_tilt)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in runs.policy.parameters:
            parameter += 0.05 * torch.randn(parameter.shape[1:], generator=generator)
    table = runs.policy.log_table()
    log_z = torch.full((RUNS,), world.log_z, dtype=torch.float64)

    pulled = method(runs, log_z, table.detach())
    found = torch.cat([g.flatten(1) for g in runs.gradients(table, pulled)], 1).double()
    divergence = world.kl(runs.policy.log_table()).sum()
    wanted = torch.cat([g[0].flatten() for g in torch.autograd.grad(divergence, runs.policy.parameters)]).double()

    mean, error = found.mean(0), found.std(0) / RUNS**0.5
    assert float(error.norm()) < 0.1 * float(wanted.norm())
    assert float((mean - wanted).norm()) < 1.7 * float(error.norm())


@pytest.fixture(scope="module")
def rare() -> World:
    return rare_phrase()


def markov(world: World) -> MarkovTarget:
    """The same target, by the library's recursion over contexts and states."""
    token = world.network.node[:, 0]
    law = torch.full((world.graph.vocabulary,) * 2, math.nan, dtype=torch.float64)
    law[token] = world.base
    assert torch.equal(law[token], world.base)
    return markov_target(MarkovModel(law, world.graph.length), world.automaton, world.terms)


def test_a_rare_phrase_has_the_z_of_the_markov_model(rare: World) -> None:
    assert rare.log_z == pytest.approx(markov(rare).log_z, abs=1e-10)
    assert math.exp(rare.log_z) == pytest.approx(1e-5, rel=0.02)


def test_its_kl_to_the_base_is_less_log_z(rare: World) -> None:
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
    laws = torch.zeros(rare.graph.length, *truth.log_value_table.shape[1:], rare.graph.vocabulary, dtype=torch.float64)
    laws[position, token, state] = table[0].double()
    assert float(rare.kl(table)) == pytest.approx(truth.kl(laws), abs=1e-10)


def test_its_policies_come_near_it_but_do_not_hold_it(rare: World) -> None:
    assert 1e-4 < float(rare.kl(near(rare, 200).network.log_table().detach())) < 0.1


@pytest.mark.parametrize("target", ["pointwise-2", "hybrid"])
def test_a_policy_that_keeps_the_exact_promise_is_the_target(target: str) -> None:
    world = enumerable(target)
    kept = GuideKept(world.network.copies(2), world.graph, world.promise.float().expand(2, -1))
    with torch.no_grad():
        assert world.kl(kept.log_table()).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)


def test_what_a_kept_guide_costs_and_where_it_begins() -> None:
    """The base reads the fit's samples once; the policy is then the guided base."""
    runs = Runs(enumerable("moment"), 2, [0.01], SAMPLES)
    before = runs.passes.clone()
    guides = keep_guide(runs)
    assert (runs.passes - before).tolist() == [SAMPLES, SAMPLES]
    with torch.no_grad():
        torch.testing.assert_close(runs.policy.log_table(), guides.law, atol=1e-5, rtol=0)
    assert bool((runs.curve[-1].kl < 0.7 * runs.curve[0].kl).all())
