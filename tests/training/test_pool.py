"""The pool: its mixture is a law, its gradients are exact, it keeps what it says, and a run goes on as before."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from enumerable import random_guide
from tiltlm.errors import UsageError
from tiltlm.estimation import mixture
from tiltlm.lm import Prompts, SamplingSettings
from tiltlm.objectives import Guided
from tiltlm.rollouts.proposal import Proposal
from tiltlm.training.replay.guided_pool import GuidedPool
from tiltlm.training.replay.schedule import EarlyStopping
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, World, as_if_uniform, build_trainer, flat, gradient, near, true_gradient

SETTINGS: dict[str, Any] = {"method": "guided", "rule": "guided", "num_iterations": 3, "pool": 300, "batch_size": 50}


def laws(world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens of all completions under base and a guided base [N, T]."""
    guided = replace(world.samples, guide=random_guide(world.base, seed=3), settings=SamplingSettings())
    with torch.no_grad():
        return world.base.logprob(world.samples, settings=SamplingSettings()), world.base.logprob(guided)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_the_mixture_is_the_weighted_sum_of_the_laws_of_whole_sequences(world: World, share: float) -> None:
    base, guide = laws(world)
    mixed = mixture([base, guide], [share, 1 - share])
    expected = share * base.sum(-1).exp() + (1 - share) * guide.sum(-1).exp()
    assert torch.allclose(mixed.sum(-1).exp(), expected, atol=1e-14)
    assert float(mixed.sum(-1).exp().sum()) == pytest.approx(1, abs=1e-9)
    assert bool((mixed[~world.samples.mask] == 0).all())


@pytest.mark.parametrize("correction", [1.0, 0.4])
@pytest.mark.parametrize("share", [0.1, 0.7])
def test_the_gradient_of_a_pool_is_exact_even_with_a_wrong_guide(
    world: World, share: float, correction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E_m of the pull: every completion weighed by the mixture, against the gradient of KL(p‖π) and of the guide's."""
    trainer = build_trainer(world, policy=near(world.base), method=Guided(correction=correction), rule="guided")
    assert trainer.guidance is not None
    trainer.guidance.guide = random_guide(world.base, seed=3)
    base, guide = laws(world)
    mass = mixture([base, guide], [share, 1 - share]).sum(-1).exp()
    found = torch.zeros(sum(p.numel() for p in trainer.parameters.values()), dtype=torch.float64)
    # The forms are mixed as batches before said, the same for all completions.
    shares = torch.randn(LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    shares[:, 0] += 1 - shares.sum(-1)
    monkeypatch.setattr(trainer.scorer.minimum_variance, "weights", lambda length: shares[:length])
    # Rows of a batch weigh alike, so each completion is a batch of its own.
    for i in range(len(world.samples)):
        one = RolloutBatch(
            world.samples.select(torch.tensor([i])),
            world.truth.features[i : i + 1],
            Proposal.parse("pool"),
            base_share=share,
        )
        trainer.accumulate(one, world.truth.log_z)
        found += float(mass[i]) * gradient(trainer)
    # What the guide alone teaches is known from the samples of the uniform law, as in test_guided.py.
    taught = build_trainer(world, policy=trainer.roles.policy, method=Guided(correction=0), rule="guided")
    assert taught.guidance is not None
    taught.guidance.guide = random_guide(world.base, seed=3)
    taught.accumulate(
        RolloutBatch(as_if_uniform(world.samples), world.truth.features, Proposal.parse("step 3")), world.truth.log_z
    )
    truth = correction * flat(true_gradient(world, trainer.roles.policy), trainer) + (1 - correction) * gradient(taught)
    assert truth.norm() > 0.1
    assert float((found - truth).abs().max()) < 1e-10


def filled(world: World, size: int, batches: int = 4) -> tuple[GuidedPool, Trainer]:
    trainer = build_trainer(world, **{**SETTINGS, "pool": 0, "reuse_fit_samples": True})
    pool = GuidedPool(size, 7, world.base_sample.samples)
    for _ in range(batches):
        pool.add(trainer.draw())
    return pool, trainer


def test_it_keeps_the_last_sequences_and_draws_each_at_most_once(world: World) -> None:
    pool, trainer = filled(world, 120)
    assert len(pool) == 120
    last = world.base_sample.samples.completion_ids[200 - 120 : 200]
    assert pool.samples is not None
    assert pool.samples.completion_ids == last
    drawn = pool.draw(90)
    assert len(drawn.samples) == 90
    kept, taken = (Counter(map(tuple, s.completion_ids)) for s in (pool.samples, drawn.samples))
    assert taken <= kept
    assert len(pool.draw(500).samples) == 120
    assert pool.base_share == 1.0
    trainer.drawer.queue.position = 10**6
    pool.add(trainer.draw())
    assert pool.base_share == pytest.approx(70 / 120)


def test_it_knows_prompts_whatever_the_order_in_which_a_batch_takes_them(world: World) -> None:
    prompts = world.base.encode_prompts(["a", "b", "c"])
    like = world.base.sample(6, prompts, seed=0, max_completion_length=4)
    pool = GuidedPool(10, 0, like)
    turned: Prompts = prompts.select([2, 0, 1])
    samples = world.base.sample(4, turned, seed=1, max_completion_length=4)
    pool.add(RolloutBatch(samples, torch.zeros(4, 1), Proposal.parse("guided")))
    assert pool.samples is not None
    assert pool.samples.prompt_texts == samples.prompt_texts == ["c", "a", "b", "c"]


def test_a_run_with_a_pool_goes_on_bit_for_bit(world: World, tmp_path: Path) -> None:
    settings = {**SETTINGS, "reuse_fit_samples": True, "learning_rate": 0.01}
    whole = build_trainer(world, **settings, max_steps=14)
    whole.train()
    build_trainer(world, **settings, folder=tmp_path, max_steps=13, save_steps=13).train()
    resumed = build_trainer(world, **settings, folder=tmp_path, max_steps=14, save_steps=0)
    assert resumed.resume()
    resumed.train()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name
    assert isinstance(whole.replay.buffer, GuidedPool)
    assert 0 < whole.replay.buffer.base_share < 1


def test_its_further_updates_cost_two_passes_and_no_sequence(world: World) -> None:
    trainer = build_trainer(world, **SETTINGS)
    for _ in range(2):
        before = trainer.counter.sequences, trainer.counter.forward_passes
        trainer.train_step()
        # Sampled, read by the base and trained on once; then twice a batch of the pool.
        assert trainer.counter.sequences - before[0] == 50
        assert trainer.counter.forward_passes - before[1] == 50 * (3 + 2 * 2)


def test_reuse_ends_where_fresh_batches_get_worse_for_certain() -> None:
    falling, noise = EarlyStopping(), torch.Generator().manual_seed(0)
    for step in range(200):
        falling.note(1.0 - step / 300 + 0.2 * float(torch.randn((), generator=noise)))
    assert not falling.stopped
    for step in range(80):
        falling.note(0.33 + step / 40 + 0.2 * float(torch.randn((), generator=noise)))
    assert falling.stopped


def test_a_pool_that_could_not_work_is_refused(world: World) -> None:
    with pytest.raises(UsageError, match=r"training\.pool: nothing trains on it; set training\.num_iterations"):
        build_trainer(world, **{**SETTINGS, "num_iterations": None})
    with pytest.raises(UsageError, match=r"training\.pool: the buffer of a guided method mixes .* or leave pool out"):
        build_trainer(world, **{**SETTINGS, "rule": "on_policy"})
    with pytest.raises(UsageError, match=r"training\.pool: 50 sequences are no more than training\.batch_size 50"):
        build_trainer(world, **{**SETTINGS, "pool": 50})
    with pytest.raises(UsageError, match=r"training\.pool: rloo compares the samples of one batch"):
        build_trainer(world, **{**SETTINGS, "method": "rloo", "rule": "on_policy"})
    with pytest.raises(UsageError, match=r"training\.pool: proposal published draws further batches"):
        build_trainer(world, **{**SETTINGS, "method": "gdc++", "rule": "published"})


def test_with_a_pool_the_policy_ends_nearer_with_no_more_sequences(world: World) -> None:
    found = {}
    for pool in (0, 400):
        settings = {**SETTINGS, "method": Guided(correction=0), "pool": pool, "num_iterations": 4 if pool else None}
        trainer = build_trainer(world, **settings, learning_rate=0.003, max_steps=15)
        trainer.train()
        found[pool] = world.kl(trainer.roles.policy), trainer.counter.sequences
    assert found[400][1] == found[0][1]
    assert found[400][0] < 0.7 * found[0][0]
