"""The pool of several proposals: its weights are exact, it knows every law that it mixes, and it forgets in order."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from enumerable import random_guide
from tiltlm.exact import expected_gradient, weighted_gradient
from tiltlm.features import contains
from tiltlm.lm import SamplingSettings
from tiltlm.objectives import BUILT_IN, Objective, Pooled, Record
from tiltlm.objectives.pooled import best_kappa
from tiltlm.rollouts.proposal import GUIDED, Proposal
from tiltlm.targets import Term, TiltedTarget, draw_base_sample
from tiltlm.training.replay.mixture_pool import MixturePool
from tiltlm.training.replay.weights import BASE_INDEX, mixture_logprob
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, World, build_trainer, flat, gradient, near, true_gradient

SETTINGS: dict[str, Any] = {
    "method": "pooled",
    "rule": "interval",
    "check_steps": 2,
    "num_iterations": 3,
    "pool": 260,
    "batch_size": 50,
    "learning_rate": 0.01,
}
FIXED = Pooled(adaptive=False, kappa=1, self_normalized=False)


def pool_of(trainer: Trainer) -> MixturePool:
    assert isinstance(trainer.replay.buffer, MixturePool)
    return trainer.replay.buffer


def proposals(world: World) -> Tensor:
    """log q [N, 4] of all completions under the base, two policies, and a guided base."""
    laws = [world.logprob(model) for model in (world.base, near(world.base, 0.05, 1), near(world.base, 0.1, 2))]
    trainer = build_trainer(world, method="gdc++", rule="guided", pool=100, batch_size=50, num_iterations=2)
    laws_of_pool = pool_of(trainer).past
    assert laws_of_pool.guidance is not None
    laws_of_pool.guidance.guide = world.base.placed(random_guide(world.base, seed=3))
    return torch.stack([*laws, laws_of_pool.logprob(GUIDED, world.samples)], -1)


# Shares of about 0.1, 0.2, 0.3 and 0.4.
def shared_out(n: int) -> Tensor:
    return torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3]).repeat(n // 10 + 1)[:n]


def test_the_mixture_is_the_weighted_sum_of_its_laws(world: World) -> None:
    under, origin = proposals(world), shared_out(341)
    shares = torch.bincount(origin).double() / 341
    mixed = mixture_logprob(under, origin)
    assert torch.allclose(mixed.exp(), under.exp() @ shares, atol=1e-14)
    assert float(mixed.exp().sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    "objective", [FIXED, Pooled(adaptive=False, kappa=0.3), BUILT_IN["dpg"](), BUILT_IN["gdc++"]()]
)
def test_over_the_support_of_the_mixture_its_gradient_is_exact(world: World, objective: Objective) -> None:
    policy = near(world.base)
    mixed = mixture_logprob(proposals(world), shared_out(341))
    truth = flat(true_gradient(world, policy))
    found = expected_gradient(objective, policy, world.truth, mixed)
    assert truth.norm() > 0.1
    assert float((flat({name: found[name] for name in true_gradient(world, policy)}) - truth).abs().max()) < 1e-10


@pytest.mark.parametrize("method", [FIXED, Pooled(adaptive=False, kappa=0.3), "dpg"])
def test_the_loop_pulls_by_the_mixture_and_not_by_what_drew_a_row(world: World, method: str | Objective) -> None:
    """With the uniform law for a mixture, a plain mean over all completions is an exact expectation."""
    settings = {**SETTINGS, "method": method, "per_device_train_batch_size": 7}
    trainer = build_trainer(world, policy=near(world.base), **settings)
    uniform = torch.full((341,), -math.log(341), dtype=torch.float64)
    trainer.accumulate(
        RolloutBatch(world.samples, world.truth.features, Proposal.parse("pool"), mixture=uniform), world.truth.log_z
    )
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert float((gradient(trainer) - truth).abs().max()) < 1e-10


def test_self_normalized_it_comes_as_near_as_one_likes_with_more_samples(world: World) -> None:
    policy, under, shares = near(world.base), proposals(world), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    truth, generator = flat(true_gradient(world, policy)), torch.Generator().manual_seed(0)
    errors = []
    for n in (1_000, 100_000):
        drawn = [
            torch.multinomial(under[:, k].exp(), int(n * s), True, generator=generator) for k, s in enumerate(shares)
        ]
        rows, origin = torch.cat(drawn), torch.repeat_interleave((n * shares).long())
        mixed = mixture_logprob(under[rows], origin)
        score, pi = world.truth.target_logscore[rows], world.logprob(policy)[rows]
        # The pool's own log Z, and no other.
        log_z = float((score - mixed).logsumexp(0)) - math.log(n)
        coefficients = Pooled().coefficients(Record(pi, world.truth.base_logprob[rows], mixed, score, log_z))
        weights = torch.zeros(341, dtype=torch.float64).index_add(0, rows, -coefficients / n)
        errors.append(float((flat(weighted_gradient(policy, world.samples, weights)) - truth).norm() / truth.norm()))
    assert errors[1] < 0.03
    assert errors[1] < errors[0] / 4


def test_kappa_is_none_without_hits_one_while_most_carry_the_policy_and_else_what_regression_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    w, r = (torch.rand(200, generator=generator, dtype=torch.float64) for _ in range(2))
    assert best_kappa(w, r) == 1
    # Few samples carry r, and more of it where w is large.
    heavy = r**8 * w * 20
    regression = float((w * heavy).sum() / heavy.square().sum())
    assert 0.05 < regression < 0.95
    assert best_kappa(w, heavy) == pytest.approx(regression)
    # No other multiple leaves less.
    left = {kappa: float((w - kappa * heavy).square().mean()) for kappa in (0.0, 0.9 * regression, regression, 1.0)}
    assert min(left, key=lambda kappa: left[kappa]) == regression
    for hits in (0, 1, 4):
        assert best_kappa(torch.where(torch.arange(200) < hits, 50.0, 0.0), r) == 0
    assert math.isnan(best_kappa(w, r * math.nan))


def test_kappa_moves_by_what_others_showed_and_stays_where_nothing_can_be_said() -> None:
    zero = torch.zeros(20).double()
    record = Record(zero, zero, zero, zero, 0.0)
    assert Pooled().adapted(record) == Pooled(kappa=0.1)
    assert Pooled(kappa=0.5).adapted(record).kappa == pytest.approx(0.55)
    assert Pooled(adaptive=False).adapted(record) == Pooled(adaptive=False)
    assert Pooled(kappa=0.5).adapted(Record(zero + 800, zero, zero, zero, 0.0)).kappa == 0.5


def exact_laws(trainer: Trainer) -> Tensor:
    """log q [N, K] of all sequences of a pool, by a plain pass under each of its laws."""
    pool = pool_of(trainer)
    assert pool.samples is not None
    found = []
    for name in pool.proposals:
        weights = pool.past.earlier.get(name)
        role = trainer.roles.use("base") if weights is None else trainer.roles.earlier(weights)
        with torch.no_grad(), role as model:
            found.append(model.logprob(pool.samples, settings=SamplingSettings()).double().sum(-1))
    return torch.stack(found, -1)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("rule", ["interval", "on_policy"])
def test_every_stored_law_is_the_law_that_drew_its_sequences(world: World, rule: str, lora: bool) -> None:
    trainer = build_trainer(world, **{**SETTINGS, "rule": rule, "lora": lora})
    for _ in range(6):
        trainer.train_step()
    pool, weights = pool_of(trainer), next(iter(trainer.parameters.values())).detach().clone()
    # In the column of the law that drew a sequence stands what the sampler said of it.
    assert torch.allclose(pool.logprobs, exact_laws(trainer), atol=1e-9)
    if rule == "on_policy":
        assert [*map(str, pool.proposals)] == ["base", *[f"policy {k}" for k in range(6)]]
        assert pool.origin[-50:].unique().tolist() == [6]
    else:
        # Steps 1 and 2 drew from the base, 3 and 4 from the policy of step 2, and so on.
        assert [*map(str, pool.proposals)] == ["base", "step 2", "step 4"]
        assert pool.origin[-100:].unique().tolist() == [2]
    assert float((pool.logprobs[:, -1] - pool.logprobs[:, 0]).abs().max()) > 0.01
    # To read as an earlier policy leaves the policy as it is.
    assert torch.equal(next(iter(trainer.parameters.values())), weights)


def test_the_oldest_leave_but_for_the_bases_share_and_laws_without_sequences_are_forgotten(world: World) -> None:
    trainer = build_trainer(world, **{**SETTINGS, "reuse_fit_samples": True})
    pool = pool_of(trainer)
    for _ in range(12):
        trainer.train_step()
        assert len(pool) <= 260
    # Twelve batches of fit samples: the last 260 of the 600.
    assert pool.samples is not None
    assert pool.samples.completion_ids == world.base_sample.samples.completion_ids[340:600]
    for _ in range(14):
        trainer.train_step()
    assert len(pool) == 260
    assert int((pool.origin == BASE_INDEX).sum()) == 26
    assert [*map(str, pool.proposals)] == ["base", "step 20", "step 22", "step 24"]
    assert list(pool.past.earlier) == pool.proposals[1:]
    drawn = pool.draw(80)
    assert len(drawn.samples) == 80
    assert drawn.mixture is not None
    assert drawn.base_logprob is not None
    with torch.no_grad():
        assert torch.allclose(
            drawn.base_logprob, world.base.logprob(drawn.samples, settings=SamplingSettings()), atol=1e-9
        )


def test_an_update_on_the_pool_costs_one_pass_and_each_law_reads_each_sequence_once(world: World) -> None:
    trainer = build_trainer(world, **SETTINGS)
    pool = pool_of(trainer)
    for step in range(1, 9):
        before = trainer.counter.sequences, trainer.counter.forward_passes
        laws, kept = list(pool.proposals), len(pool)
        trainer.train_step()
        assert trainer.counter.sequences - before[0] == 50
        # Sampled, trained on and, where it is not the base's, read by the base; then two batches of the pool.
        expected = 50 * (2 + (step > 2) + 2)
        new = [name for name in pool.proposals if name not in laws]
        # Other laws than the base and its own read the batch; a new one reads what is still there.
        expected += 50 * (len(pool.proposals) - 1 - (step > 2)) + len(new) * min(kept, 260 - 50)
        assert trainer.counter.forward_passes - before[1] == expected, step


def test_metrics_say_what_the_pool_holds_and_only_where_there_is_one(world: World) -> None:
    trainer = build_trainer(world, **SETTINGS)
    for _ in range(5):
        line = trainer.train_step().to_json()
    pool = pool_of(trainer)
    assert line["pool"]["sequences"] == len(pool) == 250
    assert line["pool"]["hits"] == int((pool.target_logscore > -math.inf).sum())
    assert line["pool"]["proposals"] == 3
    assert line["pool"]["base_share"] == pytest.approx(100 / 250)
    assert 0 < line["pool"]["ess"] <= line["pool"]["hits"]
    assert "pool" not in build_trainer(world).train_step().to_json()


@pytest.mark.parametrize(("method", "rule"), [("pooled", "interval"), ("guided", "guided")])
def test_fit_samples_of_several_laws_are_trained_on_themselves_and_not_kept(
    world: World, method: str, rule: str
) -> None:
    with torch.no_grad():
        mixed = replace(world.base_sample, base_logprob=world.base.logprob(world.base_sample.samples))
    size = len(mixed.samples) // 2
    settings = SETTINGS | {"method": method, "rule": rule, "batch_size": size, "pool": 10 * size}
    trainer = build_trainer(world, base_sample=mixed, **settings, reuse_fit_samples=True)
    pool = trainer.replay.buffer
    assert pool is not None
    for step in (1, 2, 3):
        before = trainer.counter.forward_passes
        line = trainer.train_step().to_json()
        assert trainer.counter.forward_passes - before >= 3 * size
        assert len(pool) == (size if step == 3 else 0)
        assert ("pool" in line) == (step == 3 and method == "pooled")
        assert not trainer.replay.early_stopping.stopped
    # After a rise for certain, once each.
    trainer = build_trainer(world, base_sample=mixed, **settings, reuse_fit_samples=True)
    trainer.replay.early_stopping.stopped = True
    trainer.train_step()
    before = trainer.counter.forward_passes
    trainer.train_step()
    assert trainer.counter.forward_passes - before < 3 * size


def test_after_a_rise_for_certain_the_batch_alone_is_trained_on(world: World) -> None:
    trainer = build_trainer(world, **SETTINGS)
    trainer.train_step()
    trainer.replay.early_stopping.stopped = True
    kept, passes = len(pool_of(trainer)), trainer.counter.forward_passes
    line = trainer.train_step().to_json()
    assert len(pool_of(trainer)) == kept
    assert trainer.counter.forward_passes - passes == 50 * 2
    assert "pool" not in line


def test_with_prompts_each_has_its_own_log_z(world: World) -> None:
    terms = (Term(contains("a").renamed("a"), "moment", 0.6, 1.1),)
    prompts = world.base.encode_prompts(["a b", "c", "d d"])
    sample = draw_base_sample(world.base, [t.feature for t in terms], 300, prompts, LENGTH, seed=11)
    conditional = World(world.base, TiltedTarget(terms), world.samples, world.truth, sample)
    trainer = build_trainer(conditional, base_sample=sample, **SETTINGS)
    for _ in range(5):
        trainer.train_step()
    pool = pool_of(trainer)
    assert pool.samples is not None
    log_z = pool.partition.at(pool.samples.prompt_ids)
    assert isinstance(log_z, Tensor)
    assert len(log_z) == len(pool)
    assert torch.allclose(pool.logprobs, exact_laws(trainer), atol=1e-9)


def test_a_pool_brings_the_policy_nearer_than_as_many_updates_on_each_batch(world: World) -> None:
    found = {}
    for method, pool in (("gdc++", 0), ("gdc++", 750), ("pooled", 750)):
        settings = {**SETTINGS, "method": method, "pool": pool, "num_iterations": 4, "learning_rate": 0.003}
        trainer = build_trainer(world, **settings, seed=6, max_steps=15)
        trainer.train()
        found[method, pool] = world.kl(trainer.roles.policy), trainer.counter.sequences
    assert len({sequences for _, sequences in found.values()}) == 1
    assert found["gdc++", 750][0] < 0.75 * found["gdc++", 0][0]
    # Its κ begins at 0, and has not come far after so few updates.
    assert found["pooled", 750][0] < found["gdc++", 0][0]
