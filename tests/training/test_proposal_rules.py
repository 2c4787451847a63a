"""When the proposal becomes the policy, and when it must not."""

from __future__ import annotations

import math

import pytest
import torch

from tiltlm.errors import UsageError
from tiltlm.estimation import Estimate
from tiltlm.lm import LanguageModel
from tiltlm.rollouts.proposal import GUIDED, POLICY
from tiltlm.training.proposal_rules import (
    RULES,
    UNKNOWN_DISTANCES,
    Closer,
    Constant,
    Distances,
    Interval,
    proposal_rule,
)
from tiny_world import World, build_trainer, near


def gains(kl: float, tv: float) -> Distances:
    return Distances(Estimate(kl, 0.1), Estimate(tv, 0.1))


@pytest.mark.parametrize(
    ("name", "distances", "expected"),
    [
        ("kl", gains(0.1, -0.1), True),
        ("kl", gains(-0.1, 0.1), False),
        ("kl", gains(0.0, 0.1), False),
        ("tv", gains(-0.1, 0.1), True),
        ("tv", gains(0.1, -0.1), False),
        ("published", gains(0.1, -0.1), True),
        ("published", gains(-0.1, 0.1), False),
        ("interval", gains(-1.0, -1.0), True),
        ("on_policy", gains(1.0, 1.0), False),
        ("kl", UNKNOWN_DISTANCES, False),
        ("tv", UNKNOWN_DISTANCES, False),
        ("interval", UNKNOWN_DISTANCES, True),
    ],
)
def test_a_rule_replaces_the_proposal_by_its_own_measure(name: str, distances: Distances, expected: bool) -> None:
    assert proposal_rule(name).replaces(distances) is expected


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_asked_every_so_many_steps(name: str) -> None:
    due = [step for step in range(1, 13) if proposal_rule(name, check_steps=4).due(step)]
    assert due == ([] if name in ("on_policy", "guided") else [4, 8, 12])


def test_the_published_rule_is_kl_with_ten_batches_more() -> None:
    assert proposal_rule("published", 7) == Closer("kl", 7, 10)
    assert proposal_rule("tv", 7) == Closer("tv", 7, 0)
    assert proposal_rule("interval", 7) == Interval(7)
    assert proposal_rule("on_policy") == Constant(POLICY)
    assert proposal_rule("guided") == Constant(GUIDED)


def test_an_unknown_rule_is_an_error_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"method.proposal: 'intervall' .*'interval'"):
        proposal_rule("intervall")


@pytest.fixture(scope="module")
def closer(world: World) -> LanguageModel:
    """A policy nearer to the target than the base, in both distances."""
    trainer = build_trainer(world, method="gdc", batch_size=400)
    for _ in range(5):
        trainer.train_step()
    policy = trainer.roles.policy
    assert world.kl(policy) < world.kl(world.base) - 0.3
    assert world.tv(policy) < world.tv(world.base) - 0.2
    return policy


@pytest.fixture(scope="module")
def further(world: World) -> LanguageModel:
    """One that is further away, in both."""
    policy = near(world.base, 0.06, seed=3)
    assert world.kl(policy) > world.kl(world.base) + 0.3
    assert world.tv(policy) > world.tv(world.base) + 0.05
    return policy


@pytest.mark.parametrize("rule", ["kl", "tv", "published"])
@pytest.mark.parametrize("reuse", [False, True], ids=["fresh", "fit samples"])
def test_a_closer_policy_takes_over_and_one_further_away_does_not(
    world: World, closer: LanguageModel, further: LanguageModel, rule: str, reuse: bool
) -> None:
    arguments = {"rule": rule, "check_steps": 1, "batch_size": 500, "reuse_fit_samples": reuse}
    better = build_trainer(world, policy=closer.copy(), **arguments)
    before = world.logprob(better.roles.policy)
    metrics = better.train_step()
    assert metrics.proposal == "base"
    assert metrics.proposal_updated
    assert str(better.drawer.proposal) == "step 1"
    with better.roles.use("proposal") as proposal:
        # The policy as it was when it was judged, not as the step left it.
        assert torch.equal(world.logprob(proposal), before)
    assert not torch.equal(world.logprob(better.roles.policy), before)
    worse = build_trainer(world, policy=further.copy(), **arguments)
    assert not worse.train_step().proposal_updated
    assert str(worse.drawer.proposal) == "base"
    assert not worse.roles.has_proposal


@pytest.mark.parametrize("rule", ["kl", "tv", "published"])
def test_a_policy_that_got_worse_than_its_proposal_does_not_replace_it(
    world: World, closer: LanguageModel, further: LanguageModel, rule: str
) -> None:
    trainer = build_trainer(world, policy=closer.copy(), rule=rule, check_steps=1, batch_size=400)
    trainer.train_step()
    with torch.no_grad():
        for name, parameter in trainer.roles.policy.model.named_parameters():
            parameter.copy_(further.model.get_parameter(name))
    assert not trainer.train_step().proposal_updated
    assert str(trainer.drawer.proposal) == "step 1"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_interval_replaces_it_whatever_the_distances(world: World, lora: bool) -> None:
    trainer = build_trainer(world, rule="interval", check_steps=2, lora=lora)
    sources = []
    for _ in range(5):
        trainer.train_step()
        sources.append(str(trainer.drawer.proposal))
    assert sources == ["base", "step 2", "step 2", "step 4", "step 4"]


def test_samples_of_the_base_do_not_judge_a_later_proposal(world: World, closer: LanguageModel) -> None:
    """Fit samples still queued after the first change say how far the base is, and nothing of the proposal."""
    trainer = build_trainer(
        world, policy=closer.copy(), rule="kl", check_steps=1, batch_size=150, reuse_fit_samples=True
    )
    assert trainer.train_step().proposal_updated
    with torch.no_grad():
        # Worse than its proposal, and still much better than the base.
        for parameter in trainer.roles.policy.model.parameters():
            parameter += 0.003 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    with trainer.roles.use("proposal") as proposal:
        assert world.kl(proposal) < world.kl(trainer.roles.policy) < world.kl(world.base) - 0.1
    metrics = trainer.train_step()
    assert metrics.proposal == "base"
    assert not metrics.proposal_updated
    assert str(trainer.drawer.proposal) == "step 1"


def test_samples_come_from_the_proposal_that_was_kept(world: World, closer: LanguageModel) -> None:
    trainer = build_trainer(world, policy=closer.copy(), rule="kl", check_steps=1, batch_size=300)
    trainer.train_step()
    batch = trainer.draw()
    assert str(batch.proposal) == "step 1"
    with trainer.roles.use("proposal") as proposal, torch.no_grad():
        rescored = proposal.logprob(batch.samples).sum(-1)
    assert float((rescored - batch.samples.sequence_logprob).abs().max()) < 1e-10


def test_the_extra_batches_of_a_check_are_kept_for_log_z(world: World) -> None:
    trainer = build_trainer(world, rule="published", check_steps=1, batch_size=40)
    before = trainer.partition.samples
    trainer.train_step()
    assert trainer.partition.samples == before + 11 * 40
    assert math.isfinite(trainer.partition.log_z.se)
