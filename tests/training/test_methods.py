"""Every method in the real loop: the gradient of a batch, what it costs and skips, and how it goes on after a stop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.exact import weighted_gradient
from tiltlm.features import Feature
from tiltlm.lm import SamplingSettings
from tiltlm.objectives import (
    BUILT_IN,
    GRPO,
    PPO,
    RLOO,
    GDCPlusPlus,
    KLControl,
    Objective,
    Record,
    Reinforce,
    ReinforceP,
    TokenRecord,
)
from tiltlm.targets import target_reward
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import World, build_trainer, flat, gradient, near, tiny_world

OBJECTIVES: dict[str, Objective] = {
    "reinforce": Reinforce(),
    "reinforce, alone": Reinforce(baseline="none"),
    "reinforce_p": ReinforceP(),
    "kl_control": KLControl(),
    "rloo": RLOO(),
    "grpo": GRPO(beta=0.1),
    "brain": BUILT_IN["brain"](),
    "f_dpg": BUILT_IN["f_dpg"](),
    "alpha_dpg": BUILT_IN["alpha_dpg"](),
}


def coefficients(trainer: Trainer, batch: RolloutBatch, world: World, log_z: float) -> Tensor:
    """The objective's own, from scores that two plain passes give."""
    objective, samples = trainer.scorer.objective, batch.samples
    with torch.no_grad():
        with trainer.roles.use("base") as base:
            a = base.logprob(samples, settings=SamplingSettings())
        pi = trainer.roles.policy.logprob(samples, settings=SamplingSettings())
    score = trainer.target.log_score(a.sum(-1), batch.features)
    record = Record(
        pi.sum(-1),
        a.sum(-1),
        samples.sequence_logprob,
        score,
        log_z,
        reward=target_reward(world.target, a.sum(-1), batch.features),
        prompt_index=samples.prompt_index,
        tokens=TokenRecord(pi, a, samples.proposal_logprob, samples.mask),
    )
    if objective.batchwise:
        record = replace(record, advantage=objective.advantages(record))
    return objective.coefficients(record)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("rule", ["on_policy", "kl"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_of_a_batch_is_that_of_its_coefficients(world: World, name: str, rule: str, lora: bool) -> None:
    settings: dict[str, Any] = {"batch_size": 60, "per_device_train_batch_size": 7}
    trainer = build_trainer(
        world, policy=near(world.base, 0.05), method=OBJECTIVES[name], rule=rule, lora=lora, **settings
    )
    batch = trainer.draw()
    expected = coefficients(trainer, batch, world, 0.3)
    truth = flat(weighted_gradient(trainer.roles.policy, batch.samples, -expected / 60), trainer)
    assessed, _ = trainer.scorer.assess(batch, 0.3)
    trainer.accumulate(assessed, 0.3)
    assert truth.norm() > 1e-4
    assert float((gradient(trainer) - truth).abs().max()) < 1e-10


@pytest.mark.parametrize(
    ("objective", "iterations", "passes"),
    [
        (Reinforce(), None, 3),  # sample, base, policy
        (KLControl(), None, 3),
        (RLOO(), None, 3),
        (GDCPlusPlus(), None, 3),
        (GDCPlusPlus(), 3, 5),  # the base reads a batch once
        (RLOO(), 3, 5),
        (PPO(), None, 7),  # four updates, and values before them
    ],
)
def test_passes_of_a_batch(world: World, objective: Objective, iterations: int | None, passes: int) -> None:
    trainer = build_trainer(world, method=objective, num_iterations=iterations, batch_size=50)
    before = trainer.counter.forward_passes
    trainer.train_step()
    assert trainer.counter.forward_passes - before == 50 * passes
    state = trainer.optimizer.optimizer.state[next(iter(trainer.parameters.values()))]
    assert state["step"] == trainer.replay.iterations


def test_a_text_without_reward_takes_no_pass_where_no_baseline_is_taken_off(world: World) -> None:
    only_filter = replace(world.target, terms=world.target.terms[:1])
    narrow = replace(world, target=only_filter, base_sample=replace(
        world.base_sample, features=world.base_sample.features[:, :1]))  # fmt: skip
    gradients = []
    for skipping in (True, False):
        trainer = build_trainer(narrow, method=Reinforce(baseline="none"), batch_size=80)
        trainer.scorer.skips_zero_advantage = skipping
        batch = trainer.draw()
        silent = int((batch.features[:, 0] == 0).sum())
        before = trainer.counter.forward_passes
        assessed, _ = trainer.scorer.assess(batch, 0.0)
        scores = trainer.accumulate(assessed, 0.0).scores
        assert 0 < silent < 80
        assert trainer.counter.forward_passes - before == 2 * (80 - silent * skipping)
        assert bool(scores.policy_logprob.isfinite().all())
        gradients.append(gradient(trainer))
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-12


def test_several_updates_weigh_by_the_ratio_of_the_policy_to_what_it_was(world: World) -> None:
    trainer = build_trainer(world, method=RLOO(), num_iterations=2, batch_size=60, optim="sgd", learning_rate=0.05)
    batch = trainer.draw()
    assessed, _ = trainer.scorer.assess(batch, 0.0)
    trainer.accumulate(assessed, 0.0)
    trainer.update()
    trainer.accumulate(assessed.after_update(), 0.0)
    with torch.no_grad():
        ratio = (trainer.roles.policy.logprob(batch.samples).sum(-1) - batch.samples.sequence_logprob).exp()
    assert float((ratio - 1).abs().max()) > 1e-3
    assert assessed.assessment is not None
    weights = assessed.assessment.advantage * ratio
    truth = flat(weighted_gradient(trainer.roles.policy, batch.samples, -weights / 60), trainer)
    assert float((gradient(trainer) - truth).abs().max()) < 1e-10


def test_the_critic_learns_what_the_reward_will_be(world: World) -> None:
    """With a frozen policy the value of the start comes to be the mean reward."""
    objective = PPO(beta=0.0, target_kl=None, value_coef=1.0, clip=0.0, clip_value=100.0, lam=1.0)
    trainer = build_trainer(world, method=objective, batch_size=200, learning_rate=0.02, max_grad_norm=0)
    for name, parameter in trainer.parameters.items():
        parameter.requires_grad_(name.startswith("critic."))
    for _ in range(40):
        trainer.train_step()
    batch, _ = trainer.scorer.assess(trainer.draw(), 0.0)
    assert batch.assessment is not None
    values, returns = batch.assessment.values, batch.assessment.returns
    assert values is not None
    assert returns is not None
    mask = batch.samples.mask
    assert float(values[:, 0].mean()) == pytest.approx(float(returns[:, 0].mean()), abs=0.1)
    unexplained = float((returns - values)[mask].var() / returns[mask].var())
    assert unexplained < 0.9


@pytest.mark.parametrize("method", ["ppo", "kl_control"])
def test_a_run_goes_on_bit_for_bit_with_its_critic_and_its_price(world: World, tmp_path: Path, method: str) -> None:
    objective = PPO(horizon=500.0) if method == "ppo" else KLControl(target_kl=0.01, horizon=500.0)
    settings: dict[str, Any] = {"method": objective, "batch_size": 50, "max_steps": 4, "learning_rate": 0.01}
    whole = build_trainer(world, **settings)
    whole.train()
    first = build_trainer(world, folder=tmp_path, save_steps=2, **{**settings, "max_steps": 2})
    first.train()
    second = build_trainer(world, folder=tmp_path, save_steps=0, **settings)
    assert second.resume()
    second.train()
    assert second.scorer.objective == whole.scorer.objective
    assert second.scorer.objective.beta != objective.beta
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_vargrad_says_why_it_cannot_where_texts_are_ruled_out(world: World) -> None:
    trainer = build_trainer(world, method="vargrad")
    with pytest.raises(NumericalError, match="vargrad cannot match a target with P = 0 on some texts: log P is −∞"):
        trainer.train_step()
    free = build_trainer(tiny_world(strength=0.8), method="vargrad")
    assert free.train_step().kl_p_pi.value < 1


def test_a_method_that_compares_a_batch_takes_it_once(world: World) -> None:
    with pytest.raises(UsageError, match=r"training\.num_iterations: 2 is too many for brain"):
        build_trainer(world, method="brain", num_iterations=2)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name not in ("vargrad", "guided")])
def test_it_lowers_what_it_is_meant_to(name: str) -> None:
    """Reward maximizers raise the reward, the others lower KL(p‖π), on the world's own truth."""
    world = tiny_world(strength=1.0)
    # A policy that keeps its guide begins near its target, where smaller steps are needed.
    pace = (
        {"learning_rate": 0.003, "max_steps": 30} if name == "kept_guide" else {"learning_rate": 0.006, "max_steps": 12}
    )
    trainer = build_trainer(world, method=name, batch_size=300, **pace)
    reward = world.truth.reward
    before = float(world.logprob(trainer.roles.policy).exp() @ reward), world.kl(trainer.roles.policy)
    trainer.train()
    after = float(world.logprob(trainer.roles.policy).exp() @ reward), world.kl(trainer.roles.policy)
    if name in ("reinforce", "kl_control", "rloo", "ppo", "grpo"):
        assert after[0] > before[0] + 0.1
    elif name != "reinforce_p":
        assert after[1] < before[1] - min(0.05, before[1] / 2)


@dataclass(frozen=True)
class OwnTarget:
    """A user's own target, a · exp(φ), with no reward of its own."""

    features: tuple[Feature, ...]

    def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
        return base_logprob + features[:, 0]


def test_the_reward_of_a_target_without_one_is_its_tilt(world: World) -> None:
    own = replace(world, target=OwnTarget(world.target.features[2:]), base_sample=replace(
        world.base_sample, features=world.base_sample.features[:, 2:]))  # fmt: skip
    trainer = build_trainer(own, method=Reinforce(baseline="none"), batch_size=40)
    batch = trainer.draw()
    _, record = trainer.scorer.assess(batch, 0.0)
    assert record is not None
    assert record.reward is not None
    assert torch.allclose(record.reward, batch.features[:, 0])
    assert trainer.train_step().grad_norm > 0
