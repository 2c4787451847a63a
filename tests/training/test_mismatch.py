"""The mismatch of sampler and scoring pass: zero in float64, and exactly the error that a test adds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltlm.evaluation.evaluate import evaluate_base, evaluate_policy, score_against_base
from tiltlm.evaluation.scores import LARGEST_MEAN_MISMATCH, Mismatch, Scores
from tiltlm.lm import LanguageModel, Roles, Samples
from tiltlm.objectives import Guided
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, LORA, World, build_trainer, near

N = 60


def trainer_of(world: World, **settings: Any) -> Trainer:
    policy = None if settings.get("lora") else near(world.base)
    return build_trainer(world, policy=policy, batch_size=N, **settings)


def rescored(scores: Scores) -> Tensor:
    assert scores.rescored is not None
    return scores.rescored


# A step whose scoring pass reads the distribution that drew its samples.
MEASURED: dict[str, dict[str, Any]] = {
    "on-policy": {"rule": "on_policy"},
    "on-policy, lora": {"rule": "on_policy", "lora": True},
    "on-policy, in pieces": {"rule": "on_policy", "per_device_train_batch_size": 7},
    "on-policy, distilled": {"rule": "on_policy", "method": "guided"},
    "guided": {"rule": "guided", "method": "guided"},
    "guided, lora": {"rule": "guided", "method": Guided(correction=0.0), "lora": True},
    "from the base, distilled": {"rule": "kl", "check_steps": 9, "method": "guided"},
}
# A step without such a pass: the base is not read, or not under its guide; an earlier policy never is.
UNMEASURED: dict[str, dict[str, Any]] = {
    "from the base": {"rule": "kl", "check_steps": 9},
    "from the base, lora": {"rule": "kl", "check_steps": 9, "lora": True},
    "from the base, gdc": {"rule": "kl", "check_steps": 9, "method": "gdc"},
    "guided, not distilled": {"rule": "guided", "method": "gdc++"},
}


@pytest.mark.parametrize("name", MEASURED)
def test_the_mismatch_is_zero_in_float64(world: World, name: str) -> None:
    trainer = trainer_of(world, **MEASURED[name])
    for _ in range(2):
        mismatch = trainer.train_step().mismatch
        assert mismatch is not None
        assert 0 <= mismatch.mean <= mismatch.worst < 1e-9
        assert not mismatch.is_large


@pytest.mark.parametrize("name", UNMEASURED)
def test_without_a_scoring_pass_there_is_no_mismatch(world: World, name: str) -> None:
    trainer = trainer_of(world, **UNMEASURED[name])
    batch = trainer.draw()
    assert trainer.accumulate(batch, 0.0).scores.rescored is None
    metrics = trainer.train_step()
    assert metrics.mismatch is None
    assert metrics.to_json()["mismatch"] is None


def test_an_earlier_policy_has_no_mismatch(world: World) -> None:
    trainer = trainer_of(world, rule="interval", check_steps=1)
    for source in ("base", "step 1"):
        metrics = trainer.train_step()
        assert (metrics.proposal, metrics.mismatch) == (source, None)


def test_a_reused_sample_of_the_base_is_not_compared_with_the_policy(world: World) -> None:
    trainer = trainer_of(world, rule="on_policy", reuse_fit_samples=True)
    metrics = trainer.train_step()
    assert (metrics.proposal, metrics.mismatch) == ("base", None)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_evaluation_reports_the_mismatch(world: World, lora: bool) -> None:
    policy = world.base.copy().with_lora(**LORA) if lora else near(world.base)
    roles = Roles(policy) if lora else Roles(policy, base=world.base)
    mismatch = evaluate_policy(roles, world.target, N, max_completion_length=LENGTH).mismatch
    assert mismatch is not None
    assert 0 <= mismatch.mean <= mismatch.worst < 1e-9


def test_an_evaluation_without_a_model_has_no_mismatch(world: World) -> None:
    assert evaluate_base(world.base_sample, world.target, N).mismatch is None


def apart(n: int) -> Tensor:
    """The error of each of n rows in nats: some too low, some too high, the last one largest."""
    return torch.linspace(-0.3, 0.5, n, dtype=torch.float64)


def off(samples: Samples) -> Samples:
    """The same samples with these errors added to the log-probability of their first token."""
    recorded = samples.proposal_logprob.clone()
    recorded[:, 0] += apart(len(samples)).to(recorded)
    return replace(samples, proposal_logprob=recorded)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that records wrong log-probabilities."""
    sample = LanguageModel.sample
    monkeypatch.setattr(LanguageModel, "sample", lambda *args, **kwargs: off(sample(*args, **kwargs)))


EXPECTED = Mismatch(mean=float(apart(N).abs().mean()), worst=0.5)


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.usefixtures("wrong")
def test_a_step_measures_the_mismatch(world: World, name: str) -> None:
    trainer = trainer_of(world, **MEASURED[name])
    metrics = trainer.train_step()
    assert metrics.mismatch is not None
    assert metrics.mismatch.mean == pytest.approx(EXPECTED.mean, abs=1e-9)
    assert metrics.mismatch.worst == pytest.approx(EXPECTED.worst, abs=1e-9)
    assert EXPECTED.mean > LARGEST_MEAN_MISMATCH
    assert metrics.mismatch.is_large


@pytest.mark.parametrize("pieces", [None, 7])
@pytest.mark.usefixtures("wrong")
def test_every_row_is_compared_with_itself(world: World, pieces: int | None) -> None:
    trainer = trainer_of(world, rule="on_policy", per_device_train_batch_size=pieces)
    batch = trainer.draw()
    for scores in (trainer.scorer.score(batch), trainer.accumulate(batch, 0.0).scores):
        torch.testing.assert_close(batch.samples.sequence_logprob - rescored(scores), apart(N), rtol=0, atol=1e-9)
        # On-policy that pass is the policy's own.
        assert torch.equal(rescored(scores), scores.policy_logprob)
        assert not rescored(scores).requires_grad


@pytest.mark.usefixtures("wrong")
def test_an_evaluation_measures_the_mismatch(world: World) -> None:
    roles = Roles(near(world.base), base=world.base)
    mismatch = evaluate_policy(roles, world.target, N, max_completion_length=LENGTH).mismatch
    assert mismatch is not None
    assert mismatch.mean == pytest.approx(EXPECTED.mean, abs=1e-9)
    assert mismatch.worst == pytest.approx(EXPECTED.worst, abs=1e-9)
    samples = roles.policy.sample(N, seed=0, max_completion_length=LENGTH)
    assert Mismatch.of(score_against_base(roles, samples)) == mismatch


def test_a_line_of_metrics_carries_it(world: World) -> None:
    metrics = trainer_of(world, rule="on_policy").train_step()
    line = replace(metrics, mismatch=Mismatch(0.125, 0.5)).to_json()
    assert json.loads(json.dumps(line, allow_nan=False))["mismatch"] == {"mean": 0.125, "worst": 0.5}
    assert metrics.mismatch is not None
    written = metrics.to_json()["mismatch"]
    assert written == {"mean": metrics.mismatch.mean, "worst": metrics.mismatch.worst}


def test_its_mean_decides_whether_it_is_large() -> None:
    assert not Mismatch(LARGEST_MEAN_MISMATCH, 50.0).is_large
    assert Mismatch(LARGEST_MEAN_MISMATCH * 1.001, 0.3).is_large
    assert str(Mismatch(0.25, 1.5)) == "0.25 nats a sequence on average, 1.5 at worst"


def test_rows_without_a_scoring_pass_are_left_out() -> None:
    column = torch.zeros(3, dtype=torch.float64)
    unknown = Scores(column, column, column, column, None)
    known = unknown.with_rescored(torch.ones(3, 2))
    assert rescored(known).tolist() == [2.0, 2.0, 2.0]
    both = Scores.concatenate([known, known], torch.tensor([5, 4, 3, 2, 1, 0]))
    assert rescored(both).tolist() == [2.0] * 6
    assert Mismatch.of(both) == Mismatch(2.0, 2.0)
    half = Scores.concatenate([known, unknown])
    assert rescored(half).isnan().tolist() == [False] * 3 + [True] * 3
    assert Mismatch.of(half) == Mismatch(2.0, 2.0)
    assert Scores.concatenate([unknown, unknown]).rescored is None
    assert Mismatch.of(unknown) is None
