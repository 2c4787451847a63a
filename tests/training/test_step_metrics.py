"""What a step reports against the enumerated truth, on-policy, from the base and from an earlier policy."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tiltlm.estimation import Estimate, Partition
from tiltlm.exact import exact_kl
from tiltlm.training.metrics import StepMetrics, step_metrics
from tiltlm.training.trainer import Trainer
from tiny_world import World, build_trainer, near

SOURCES = ["policy", "base", "step 1"]


def trainer_from(world: World, source: str, batch_size: int) -> Trainer:
    """A trainer whose policy differs from the base, and from the proposal unless that is the policy."""
    rule = "on_policy" if source == "policy" else "interval"
    trainer = build_trainer(
        world, policy=near(world.base, 0.005, seed=1), rule=rule, check_steps=100, batch_size=batch_size, seed=9
    )
    if source == "step 1":
        trainer.roles.keep_proposal()
        trainer.drawer.proposal = source
        with torch.no_grad():
            for parameter in trainer.roles.policy.model.parameters():
                parameter += 0.005 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    return trainer


def truth_of(world: World, trainer: Trainer) -> dict[str, float]:
    policy, target = trainer.roles.policy, world.truth
    logprob = world.logprob(policy)
    names = [feature.name for feature in world.target.features]
    return {
        "log_z": target.log_z,
        "kl_p_pi": world.kl(policy),
        "kl_pi_a": exact_kl(logprob, target.base_logprob),
        "tv_p_pi": world.tv(policy),
        **{f"moment {n}": float(v) for n, v in zip(names, logprob.exp() @ target.features, strict=True)},
        **{f"target {n}": float(v) for n, v in zip(names, target.moments, strict=True)},
    }


def estimates(metrics: StepMetrics) -> dict[str, Estimate]:
    return {
        **{name: getattr(metrics, name) for name in ("log_z", "kl_p_pi", "kl_pi_a", "tv_p_pi")},
        **{f"moment {name}": value for name, value in metrics.moments.items()},
        **{f"target {name}": value for name, value in metrics.target_moments.items()},
    }


@pytest.mark.parametrize("source", SOURCES)
def test_one_large_step_reports_the_truth_before_its_update(world: World, source: str) -> None:
    trainer = trainer_from(world, source, batch_size=4000)
    truth = truth_of(world, trainer)
    found = estimates(trainer.train_step())
    assert set(found) == set(truth)
    for name, estimate in found.items():
        # An error of 5 se says little unless the se is small.
        assert 0 <= estimate.se < 0.12, name
        assert estimate.value == pytest.approx(truth[name], abs=5 * estimate.se + 1e-9), name


@pytest.mark.parametrize("source", SOURCES)
def test_the_standard_errors_are_those_of_many_steps(world: World, source: str) -> None:
    trainer = trainer_from(world, source, batch_size=400)
    truth = truth_of(world, trainer)
    z: dict[str, list[float]] = {name: [] for name in truth}
    earlier = None
    for _ in range(61):
        batch = trainer.draw()
        scores = trainer.scorer.score(batch)
        log_weights = scores.target_logscore - scores.proposal_logprob
        if earlier is not None:
            # log Z from other samples, so that its error is independent of the rest.
            metrics = step_metrics(scores, batch.features, world.target, Partition.empty().updated(earlier))
            for name, estimate in estimates(metrics).items():
                if estimate.se > 1e-9:
                    z[name].append((estimate.value - truth[name]) / estimate.se)
        earlier = log_weights
    # The filter holds in every text of the target.
    assert [name for name, values in z.items() if not values] == ["target no c"]
    del z["target no c"]
    for name, values in z.items():
        column = torch.tensor(values)
        assert abs(float(column.mean())) < 0.5, name
        assert 0.75 < float(column.std()) < 1.3, name


def test_rao_blackwell_needs_the_laws_of_the_base_and_lowers_the_error(world: World) -> None:
    trainer = trainer_from(world, "policy", batch_size=2000)
    batch = trainer.draw()
    scores = trainer.scorer.score(batch)
    assert scores.kl_to_base is not None
    plain = (scores.policy_logprob - scores.base_logprob).std() / math.sqrt(2000)
    blackwell = step_metrics(scores, batch.features, world.target, trainer.partition).kl_pi_a.se
    assert blackwell < 0.8 * float(plain)
    from_base = trainer_from(world, "base", batch_size=100)
    assert from_base.scorer.score(from_base.draw()).kl_to_base is None


def test_ess_is_that_of_the_batch(world: World) -> None:
    trainer = trainer_from(world, "base", batch_size=4000)
    weight = (world.truth.logprob - world.truth.base_logprob).exp()
    share = 1 / float((world.truth.base_logprob.exp() * weight.square()).sum())
    ess = trainer.train_step().ess
    assert ess.value == pytest.approx(4000 * share, abs=5 * ess.se)


def test_log_z_tightens_as_samples_stream_in(world: World) -> None:
    trainer = trainer_from(world, "base", batch_size=600)
    errors = [trainer.train_step().log_z.se for _ in range(6)]
    # Seven times the samples of the fit alone.
    assert errors[-1] == pytest.approx(trainer_from(world, "base", 600).partition.log_z.se / math.sqrt(7), rel=0.2)


def test_a_step_is_a_line_of_json(world: World) -> None:
    metrics = trainer_from(world, "step 1", batch_size=100).train_step()
    line = json.loads(json.dumps(metrics.to_json(), allow_nan=False))
    assert list(line) == [
        "step",
        "sequences",
        "forward_passes",
        "log_z",
        "kl_p_pi",
        "kl_pi_a",
        "tv_p_pi",
        "ess",
        "moments",
        "target_moments",
        "mismatch",
        "passes_per_token",
        "grad_norm",
        "learning_rate",
        "proposal",
        "proposal_updated",
        "seconds",
    ]
    assert line["step"] == 1
    assert line["proposal"] == "step 1"
    assert line["learning_rate"] == 0.001
    assert line["grad_norm"] > 0
    assert line["moments"]["a"] == metrics.moments["a"].to_json()
    assert set(line["seconds"]) == {"sample", "features", "base", "policy", "step"}
    assert all(seconds > 0 for seconds in line["seconds"].values())
