"""The variance of single samples' gradients, against gradients taken one by one by hand."""

from __future__ import annotations

import pytest
import torch

from tiltlm.lm import SamplingSettings
from tiltlm.training.gradient_noise import measure_gradient_noise
from tiny_world import World, build_trainer, gradient, near, tiny_world

N = 24


@pytest.fixture(scope="module")
def world() -> World:
    return tiny_world()


def test_it_is_the_trace_of_the_covariance_of_single_gradients(world: World) -> None:
    policy = near(world.base)
    trainer = build_trainer(world, policy=policy, method="gdc++", batch_size=N)
    batch = trainer.draw()
    log_z = trainer.partition.log_z.value
    parameters = list(trainer.parameters.values())
    logprob = policy.logprob(batch.samples, settings=SamplingSettings()).sum(-1)
    with torch.no_grad():
        base = world.base.logprob(batch.samples, settings=SamplingSettings()).double().sum(-1)
    weight = (world.target.log_score(base, batch.features) - log_z - logprob.detach().double()).exp()
    coefficients = weight - 1
    rows = []
    for c, one in zip(coefficients.tolist(), logprob, strict=True):
        parts = torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, parts, strict=True)]
        rows.append(c * torch.cat([g.flatten() for g in flat]).double())
    expected = torch.stack(rows).var(0).sum()

    spread = measure_gradient_noise(trainer.scorer, batch, log_z, None, N)

    assert spread.gradient_variance == pytest.approx(float(expected), rel=1e-4)
    assert spread.advantage_variance == pytest.approx(float(coefficients.var()), rel=1e-4)
    assert spread.advantage_mean_abs == pytest.approx(float(coefficients.abs().mean()), rel=1e-4)
    assert spread.advantage_max == pytest.approx(float(coefficients.abs().max()), rel=1e-4)
    assert spread.samples == N
    assert not gradient(trainer).any()


@pytest.mark.parametrize("method", ["gdc++", "dpg", "kl_control", "ppo", "guided", "brain", "pooled"])
def test_looking_changes_nothing(world: World, method: str) -> None:
    rule = {"guided": "guided", "pooled": "interval"}.get(method, "on_policy")
    runs = []
    for few in (0, 5):
        trainer = build_trainer(world, method=method, rule=rule, batch_size=16, max_steps=2, gradient_samples=few)
        metrics = [trainer.train_step() for _ in range(2)]
        weights = torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
        runs.append((weights, trainer.counter.forward_passes, metrics))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert runs[0][2][0].noise is None
    spread = runs[1][2][1].noise
    assert spread is not None
    assert spread.samples == 5
    assert "spread" not in runs[0][2][0].to_json()
    assert spread.advantage_max > 0
    assert spread.gradient_variance > 0
