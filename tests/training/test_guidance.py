"""A guided run: what leans, how far, what it costs, and that it goes on as if it had never stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accounting import PassCounter, spent
from test_resume import Lines, assert_same, build, state
from torch import Tensor

from enumerable import random_guide
from tiltlm.features import build_feature
from tiltlm.guides import estimate_values
from tiltlm.lm import SamplingSettings
from tiltlm.objectives import Guided
from tiltlm.targets import Term, TiltedTarget, draw_base_sample, fit_target
from tiltlm.training.guidance import MOST_OFFSET, Guidance
from tiltlm.training.trainer import Trainer
from tiltlm.training.whole_batch import WholeBatch
from tiny_world import LENGTH, World, build_trainer, near

STEPS = 7


def guidance(trainer: Trainer) -> Guidance:
    assert trainer.guidance is not None
    return trainer.guidance


@torch.no_grad()
def guided_mean(world: World, trainer: Trainer, column: int = 1) -> float:
    """E_g[φ] of the guided base, exactly; column 1 is the moment."""
    listed = replace(world.samples, guide=guidance(trainer).guide, settings=SamplingSettings())
    return float(world.base.logprob(listed).sum(-1).exp() @ world.truth.features[:, column])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_guided_step_costs_three_passes_and_a_reused_one_two(
    world: World, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(world, method="guided", rule="guided", lora=lora, reuse_fit_samples=True, batch_size=250)
    # Drawn for the fit, and read for the guide.
    assert (trainer.counter.sequences, trainer.counter.forward_passes) == (600, 1200)
    passes = PassCounter(monkeypatch)
    for _ in range(2):
        assert spent(trainer) == passes.taken() == (0, 500)
    assert spent(trainer) == passes.taken() == (250, 750)
    assert trainer.partition.samples == 600 + 250


@pytest.mark.parametrize(("method", "rule", "cost"), [("gdc++", "guided", 3), ("guided", "kl", 3), ("gdc", "kl", 2)])
def test_the_base_is_scored_only_where_its_law_is_needed(
    world: World, method: str, rule: str, cost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(world, method=method, rule=rule, check_steps=9, batch_size=40)
    passes = PassCounter(monkeypatch)
    assert spent(trainer) == passes.taken() == (40, 40 * cost)


def test_batches_say_that_they_are_guided_and_log_z_comes_out_right(world: World) -> None:
    """Weights P/q of guided samples count in log Z, and spread less than the base's own."""
    trainer = build_trainer(world, method="guided", rule="guided", batch_size=400, learning_rate=1e-12)
    before = trainer.partition.log_z
    for _ in range(5):
        metrics = trainer.train_step()
        assert metrics.proposal == "guided"
        assert not metrics.proposal_updated
    log_z = trainer.partition.log_z
    assert log_z.se < 0.5 * before.se
    assert log_z.value == pytest.approx(world.truth.log_z, abs=4 * log_z.se)
    # ESS of guided samples is beyond what the base reaches.
    assert metrics.ess.value > 0.6 * 400
    base = build_trainer(world, method="gdc", rule="kl", check_steps=99, batch_size=400).train_step()
    assert base.ess.value < 0.4 * 400


def follow(world: World, trainer: Trainer) -> tuple[Tensor, float]:
    """Follow one fresh batch; gives where the leaning goes by the formula, and E_π[φ] of the batch."""
    own = guidance(trainer)
    batch = trainer.draw()
    scores = trainer.scorer.score(batch)
    weights = (scores.policy_logprob - scores.proposal_logprob).softmax(0)
    reached = float(weights @ batch.features[:, 1].double())
    fit = world.base_sample
    logprob = fit.samples.sequence_logprob
    p = (world.target.log_score(logprob, fit.features) - logprob).softmax(0)
    goal = 0.6
    variance = float(p @ (fit.features[:, 1].double() - goal).square())
    expected = own.offsets + own.feedback * (goal - reached) / variance
    own.follow(WholeBatch(scores, batch.features))
    return expected, reached


def test_the_guide_leans_by_what_the_policy_lacks(world: World) -> None:
    trainer = build_trainer(world, method=Guided(feedback=0.3), rule="guided", batch_size=400)
    own, before = guidance(trainer), guided_mean(world, trainer)
    for _ in range(2):
        expected, reached = follow(world, trainer)
        assert own.offsets.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    # The policy is still the base, which writes "a" too seldom.
    assert reached < 0.55
    assert 0.05 < float(own.offsets) < MOST_OFFSET
    assert guided_mean(world, trainer) > before + 0.01


def test_it_leans_back_where_the_policy_has_too_much(world: World) -> None:
    policy = world.base.copy()
    with torch.no_grad():
        a = world.base.tokenizer.convert_tokens_to_ids("a")
        bias = torch.zeros(world.base.vocab_size, dtype=torch.float64)
        bias[a] = 3.0
    inner = policy.model.forward

    def more(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        output.logits = output.logits + bias
        return output

    policy.model.forward = more
    trainer = build_trainer(world, policy=policy, method=Guided(feedback=0.3), rule="guided", batch_size=400)
    before = guided_mean(world, trainer)
    expected, reached = follow(world, trainer)
    assert reached > 0.65
    assert float(guidance(trainer).offsets) < -0.05
    assert float(guidance(trainer).offsets) == pytest.approx(float(expected), abs=1e-12)
    assert guided_mean(world, trainer) < before - 0.01


@pytest.mark.parametrize("far", [5.0, -5.0])
def test_it_leans_no_further_than_a_bound(world: World, far: float) -> None:
    trainer = build_trainer(world, method=Guided(feedback=0.3), rule="guided")
    own = guidance(trainer)
    own.set_offsets(torch.tensor([far], dtype=torch.float64))
    assert own.offsets.tolist() == [MOST_OFFSET if far > 0 else -MOST_OFFSET]
    at_the_bound = own.guide
    own.set_offsets(torch.tensor([2 * far], dtype=torch.float64))
    assert torch.equal(own.guide.log_value_table, at_the_bound.log_value_table)
    own.set_offsets(torch.zeros(1, dtype=torch.float64))
    assert not torch.equal(own.guide.log_value_table, at_the_bound.log_value_table)


def test_without_feedback_nothing_leans_and_the_target_stays_whatever_leans(world: World) -> None:
    for feedback in (0.0, 0.5):
        trainer = build_trainer(world, method=Guided(feedback=feedback), rule="guided", batch_size=100)
        first, target = guidance(trainer).guide, trainer.target
        for _ in range(2):
            trainer.train_step()
        assert (float(guidance(trainer).offsets) != 0) == (feedback > 0)
        assert torch.equal(first.log_value_table, guidance(trainer).guide.log_value_table) == (feedback == 0)
        assert trainer.target is target is world.target


def test_a_step_leans_by_its_batch_before_the_update(world: World) -> None:
    """The next batch, not this one, comes from the guide that has leant."""
    trainer = build_trainer(world, method=Guided(feedback=0.5), rule="guided", batch_size=50)
    twin = build_trainer(world, method=Guided(feedback=0.5), rule="guided", batch_size=50)
    trainer.train_step()
    expected, _ = follow(world, twin)
    assert guidance(trainer).offsets.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    batch = trainer.draw()
    with torch.no_grad():
        listed = replace(batch.samples, guide=guidance(trainer).guide)
        torch.testing.assert_close(world.base.logprob(listed), batch.samples.proposal_logprob, rtol=0, atol=1e-12)


@torch.no_grad()
def policy_mean(world: World, trainer: Trainer) -> float:
    """E_π[φ] of the moment, exactly, with a policy that keeps its guide."""
    logprob = trainer.roles.policy.logprob(replace(world.samples, guide=None, settings=SamplingSettings())).sum(-1)
    return float(logprob.exp() @ world.truth.features[:, 1])


def test_a_kept_guide_leans_until_the_policy_has_its_moment(world: World) -> None:
    """The weights hardly move: what brings the moment is the guide, and it is the policy's own."""
    settings: dict[str, Any] = {"rule": "on_policy", "keep_guide": True, "batch_size": 800, "learning_rate": 1e-12}
    trainer = build_trainer(world, method=Guided(feedback=0.5), **settings)
    own = guidance(trainer)
    own.set_offsets(torch.tensor([-1.0], dtype=torch.float64))
    trainer._keep_guide()
    goal = float(world.truth.moments[1])
    before = policy_mean(world, trainer)
    for _ in range(12):
        trainer.train_step()
        assert trainer.roles.policy.guide is not None
        assert torch.equal(trainer.roles.policy.guide.log_value_table, own.guide.log_value_table)
    assert abs(policy_mean(world, trainer) - goal) < 0.2 * abs(before - goal)


def test_the_trainer_lets_any_policy_keep_its_guide(world: World) -> None:
    """Also under a method that has none of its own; the base reads the fit's samples for it."""
    trainer = build_trainer(world, method="gdc++", keep_guide=True)
    plain = build_trainer(world, method="gdc++")
    assert trainer.guidance is None
    assert trainer.roles.policy.guide is not None
    assert world.kl(trainer.roles.policy) < 0.5 * world.kl(plain.roles.policy)
    assert trainer.counter.forward_passes - plain.counter.forward_passes == 600


def test_a_target_without_moments_has_nothing_to_lean(world: World) -> None:
    target = TiltedTarget(world.target.terms[:1])
    sample = replace(world.base_sample, features=world.base_sample.features[:, :1])
    own = Guidance(world.base, target, sample, estimate_values(world.base, target, sample), 0.5)
    assert own.offsets.tolist() == []
    assert own.moments == []
    batch_guide = own.guide
    own.follow(WholeBatch(None, world.base_sample.features[:, :1]))  # type: ignore[arg-type]
    assert own.guide is batch_guide


RUNS: dict[str, dict[str, Any]] = {
    "guided": {"method": "guided", "rule": "guided"},
    "feedback": {"method": Guided(feedback=0.3), "rule": "guided"},
    "feedback, lora": {"method": Guided(feedback=0.3, correction=0.5), "rule": "guided", "lora": True},
    "fit samples first": {"method": "guided", "rule": "guided", "reuse_fit_samples": True, "batch_size": 130},
    "feedback, guide kept": {"method": Guided(feedback=0.3), "rule": "on_policy", "keep_guide": True},
    "from the policy": {"method": Guided(feedback=0.3), "rule": "interval", "check_steps": 2},
    "another objective": {"method": "gdc++", "rule": "guided"},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_guided_run_is_the_uninterrupted_one(world: World, tmp_path: Path, name: str) -> None:
    whole_lines, lines = Lines(), Lines()
    whole = build(world, tmp_path / "whole", whole_lines, RUNS[name])
    whole.train()
    for steps in (2, 2, STEPS - 4):
        trainer = build(world, tmp_path / "parts", lines, RUNS[name])
        assert trainer.resume() is bool(lines.lines)
        for _ in range(steps):
            metrics = trainer.train_step()
            lines.on_step_end(trainer.progress, metrics)
        trainer.save()
    assert lines.lines == whole_lines.lines
    assert_same(state(trainer), state(whole))
    assert torch.equal(guidance(trainer).offsets, guidance(whole).offsets)
    assert torch.equal(guidance(trainer).guide.log_value_table, guidance(whole).guide.log_value_table)
    for one in (trainer, whole):
        kept = one.roles.policy.guide
        assert (kept is not None) == ("kept" in name)
        assert kept is None or torch.equal(kept.log_value_table, guidance(one).guide.log_value_table)
    assert (float(guidance(whole).offsets) != 0) == ("feedback" in name or "policy" in name)


def test_training_brings_the_policy_to_the_target(world: World) -> None:
    trainer = build_trainer(world, method="guided", rule="guided", batch_size=200, max_steps=15, learning_rate=2e-3)
    assert world.kl(trainer.roles.policy) > 0.9
    trainer.train()
    assert world.kl(trainer.roles.policy) < 0.15


def test_a_wrong_guide_still_brings_it_there(world: World) -> None:
    trainer = build_trainer(world, method="guided", rule="kl", check_steps=4, batch_size=400, max_steps=25)
    guide = random_guide(world.base)
    guidance(trainer).guide = replace(guide, log_value_table=0.3 * guide.log_value_table)
    trainer.train()
    assert world.kl(trainer.roles.policy) < 0.4


def test_features_that_no_automaton_reads_are_learned_and_the_run_begins(world: World) -> None:
    terms = [
        Term(build_feature({"regex": "a"}), "moment", 0.6),
        Term(build_feature({"length": "tokens"}), "reward", None, 0.1),
    ]
    sample = draw_base_sample(world.base, [t.feature for t in terms], 600, None, LENGTH, seed=0)
    unreadable = replace(world, target=fit_target(terms, sample), base_sample=sample)
    for method, rule in (("guided", "guided"), ("gdc", "guided")):
        trainer = build_trainer(unreadable, method=method, rule=rule, policy=near(world.base), batch_size=100)
        # There is no chain to learn, so nobody reads the fit's samples for a guide.
        assert (trainer.counter.sequences, trainer.counter.forward_passes) == (600, 600)
        log_z = trainer.train_step().log_z
        assert abs(log_z.value - sample.log_weights(unreadable.target).logsumexp(0).item() + math.log(600)) < 0.3
