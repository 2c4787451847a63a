"""The gradient that training accumulates from samples: its mean is that of KL(p‖π), for every objective and rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tiltlm.estimation import effective_sample_size
from tiltlm.exact import expected_gradient
from tiltlm.objectives import BUILT_IN, GDC, Objective
from tiltlm.rollouts.proposal import Proposal
from tiltlm.training.proposal_rules import RULES
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import KL_METHODS, World, as_if_uniform, build_trainer, flat, gradient, near, tiny_world, true_gradient

BATCHES, DIRECTIONS = 20, 12
# What the rule has made of the proposal after three steps: the policy, or a policy that was left behind.
EXPECTED_SOURCE = {"on_policy": "policy", "guided": "guided"} | dict.fromkeys(
    ("interval", "kl", "tv", "published"), "step 2"
)


@pytest.fixture(scope="module")
def world() -> World:
    return tiny_world()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", KL_METHODS)
def test_summed_over_the_whole_support_it_is_exact(world: World, name: str, lora: bool) -> None:
    trainer = build_trainer(world, policy=near(world.base), method=name, rule="kl", lora=lora)
    batch = RolloutBatch(as_if_uniform(world.samples), world.truth.features, Proposal.parse("step 3"))
    trainer.accumulate(batch, world.truth.log_z)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert truth.norm() > 0.1
    assert float((gradient(trainer) - truth).abs().max()) < 1e-10


@pytest.mark.parametrize("name", [name for name in KL_METHODS if name != "guided"])
def test_summed_over_samples_of_the_base_it_is_exact_without_a_pass_of_the_base(world: World, name: str) -> None:
    """Every completion as often as the base draws it: weights of the mean stand in for the counts."""
    trainer = build_trainer(world, policy=near(world.base), method=name, rule="kl")
    total = torch.zeros(sum(p.numel() for p in trainer.parameters.values()), dtype=torch.float64)
    order = world.truth.base_logprob.argsort(descending=True)
    # The likeliest alone, then all others by exact expectation: their sum is the whole.
    first, rest = order[:40], order[40:]
    for rows in first.split(8):
        for row in rows:
            one = RolloutBatch(world.samples.select(row[None]), world.truth.features[row[None]], Proposal.parse("base"))
            trainer.accumulate(one, world.truth.log_z)
            total += float(world.truth.base_logprob[row].exp()) * gradient(trainer)
    restricted = world.truth.base_logprob.clone()
    restricted[first] = -math.inf
    objective, policy = BUILT_IN[name](), trainer.roles.policy
    total += flat(expected_gradient(objective, policy, world.truth, restricted), trainer)
    assert len(rest) > 200
    assert float((total - flat(true_gradient(world, policy), trainer)).abs().max()) < 1e-10


def switch(trainer: Trainer, objective: Objective) -> None:
    """Another objective from now on, in a trainer that has a guide."""
    trainer.scorer.objective, trainer.scorer.skips_outside_support = objective, objective.zero_outside_support


def advanced(world: World, rule: str) -> Trainer:
    """A trainer three steps on, so that its policy has left its proposal, if it may."""
    trainer = build_trainer(world, rule=rule, method="guided", check_steps=2, batch_size=400)
    switch(trainer, GDC())
    if rule == "guided":
        # Its own guide hardly ever draws what the filter rejects, and what is left of E[π/q] is then never seen.
        guide = trainer.guidance.guide
        trainer.guidance.guide = replace(guide, log_value_table=guide.log_value_table.clamp_min(-2.0))
    for _ in range(3):
        trainer.train_step()
    return trainer


def directions(truth: Tensor) -> Tensor:
    """Unit vectors [1 + DIRECTIONS, D]: along the true gradient, and at random."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(DIRECTIONS, len(truth), generator=generator, dtype=torch.float64)
    together = torch.cat([truth[None], random])
    return together / together.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rule", RULES)
def test_sampled_it_is_right_on_average_for_every_objective(world: World, rule: str) -> None:
    trainer = advanced(world, rule)
    assert str(trainer.drawer.proposal) == EXPECTED_SOURCE[rule]
    check_mean_gradients(world, trainer)


def test_sampled_from_the_base_it_is_right_on_average_too(world: World) -> None:
    trainer = build_trainer(
        world, rule="kl", method="guided", policy=near(world.base), check_steps=1000, batch_size=400
    )
    assert str(trainer.drawer.proposal) == "base"
    check_mean_gradients(world, trainer)


def check_mean_gradients(world: World, trainer: Trainer) -> None:
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    along = directions(truth)
    found: dict[str, list[Tensor]] = {name: [] for name in KL_METHODS}
    log_weights = []
    for _ in range(BATCHES):
        batch = trainer.draw()
        for name in KL_METHODS:
            switch(trainer, BUILT_IN[name]())
            scores = trainer.accumulate(batch, world.truth.log_z).scores
            found[name].append(along @ gradient(trainer))
        log_weights.append(scores.target_logscore - scores.proposal_logprob)
    # Without enough effective samples, five standard errors would forgive anything.
    assert effective_sample_size(torch.cat(log_weights)).value > 1500
    for name, projections in found.items():
        column = torch.stack(projections)
        mean, error = column.mean(0), column.std(0) / math.sqrt(BATCHES)
        assert float(error[0]) < 0.1 * float(truth.norm()), name
        assert float(((mean - along @ truth).abs() / error).max()) < 5, name
