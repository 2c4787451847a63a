"""Rows that matter to no gradient: they cost no pass, and nothing that is learned or known changes by that."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from test_accounting import PassCounter, spent
from torch import Tensor

from tiltlm.evaluation.scores import Scores
from tiltlm.features import Feature, contains, length
from tiltlm.objectives import GDC, Guided, Objective, Record
from tiltlm.targets import Term, TiltedTarget, draw_base_sample
from tiltlm.training.metrics import StepMetrics, distances, step_metrics
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, World, build_trainer, gradient, near

SOURCES = ["policy", "base", "step 1"]
N = 80


@pytest.fixture(scope="module")
def world(world: World) -> World:
    """The same base, with a filter that bites: it rules out a third of what the base writes."""
    terms = (
        Term((~(contains("a") | contains("d"))).renamed("filter"), "filter", 1.0),
        Term(contains("b").renamed("b"), "moment", 0.6, 1.1),
        Term(length("words").renamed("words"), "reward", coefficient=0.5),
    )
    sample = draw_base_sample(world.base, [term.feature for term in terms], 300, None, LENGTH, seed=11)
    return replace(world, target=TiltedTarget(terms), base_sample=sample)


def trainer_from(world: World, source: str, method: str | Objective = "gdc", **settings: Any) -> Trainer:
    """A trainer whose policy is neither the base nor, unless that is the policy, the proposal."""
    rule = {"policy": "on_policy", "base": "kl", "step 1": "interval"}[source]
    policy = None if settings.get("lora") else near(world.base)
    check_steps = 1 if source == "step 1" else 99
    trainer = build_trainer(
        world, policy=policy, method=method, rule=rule, check_steps=check_steps, batch_size=N, **settings
    )
    if source == "step 1":
        trainer.train_step()
    assert str(trainer.drawer.proposal) == source
    return trainer


def count_possible(batch: RolloutBatch) -> int:
    """Rows that the filter, the target's first feature, lets through: here some, but not all."""
    possible = int((batch.features[:, 0] > 0).sum())
    assert 5 < possible < len(batch.samples) - 5
    return possible


def both_ways(trainer: Trainer, batch: RolloutBatch) -> list[tuple[Tensor, Scores, StepMetrics]]:
    """Gradient, scores and metrics of one batch, first with every row read, then with the impossible ones skipped."""
    assert trainer.scorer.skips_outside_support
    found = []
    for skips in (False, True):
        trainer.scorer.skips_outside_support = skips
        scores = trainer.accumulate(batch, 0.3).scores
        metrics = step_metrics(scores, batch.features, trainer.target, trainer.partition)
        found.append((gradient(trainer), scores, metrics))
    return found


@pytest.mark.parametrize("per_device", [None, 7])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", ["dpg", "gdc"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_gradient_is_that_of_all_rows(
    world: World, source: str, method: str, lora: bool, per_device: int | None
) -> None:
    trainer = trainer_from(world, source, method, lora=lora, per_device_train_batch_size=per_device)
    batch = trainer.draw()
    count_possible(batch)
    (whole, _, _), (less, _, _) = both_ways(trainer, batch)
    assert float(whole.norm()) > 0.01
    assert float((whole - less).abs().max()) < 1e-12


@pytest.mark.parametrize("source", SOURCES)
def test_scores_come_back_in_the_order_of_the_batch(world: World, source: str) -> None:
    trainer = trainer_from(world, source, per_device_train_batch_size=7)
    batch = trainer.draw()
    possible = batch.features[:, 0] > 0
    (_, whole, _), (_, less, _) = both_ways(trainer, batch)
    assert torch.equal(less.proposal_logprob, batch.samples.sequence_logprob)
    assert torch.equal(less.target_logscore.isfinite(), possible)
    for name in ("policy_logprob", "base_logprob", "target_logscore"):
        torch.testing.assert_close(
            getattr(less, name)[possible], getattr(whole, name)[possible], rtol=0, atol=1e-10, msg=name
        )
    # The policy's own is known of every row, from the sampler where no pass was taken.
    torch.testing.assert_close(less.policy_logprob, whole.policy_logprob, rtol=0, atol=1e-10)
    if source == "base":
        torch.testing.assert_close(less.base_logprob, whole.base_logprob, rtol=0, atol=1e-10)
    else:
        assert torch.equal(less.base_logprob.isnan(), ~possible)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("source", SOURCES)
def test_only_what_is_needed_is_read(world: World, source: str, lora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_from(world, source, lora=lora)
    batch = trainer.draw()
    possible = count_possible(batch)
    passes = PassCounter(monkeypatch)
    before = trainer.counter.forward_passes
    trainer.accumulate(batch, 0.0)
    read = {"policy": 2 * possible, "base": N, "step 1": possible + N}[source]
    assert passes.taken() == (0, read)
    assert trainer.counter.forward_passes - before == read
    trainer.scorer.skips_outside_support = False
    trainer.accumulate(batch, 0.0)
    assert passes.taken() == (0, N if source == "base" else 2 * N)


def test_no_backward_goes_through_an_impossible_row(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the base the policy reads all rows, but only the possible ones with a gradient."""
    trainer = trainer_from(world, "base")
    batch = trainer.draw()
    with_gradient: list[int] = []
    read = type(trainer.roles.policy).read

    def watched(model: Any, samples: Any) -> Any:
        reading = read(model, samples)
        with_gradient.append(len(samples) if reading.hidden.requires_grad else 0)
        return reading

    monkeypatch.setattr(type(trainer.roles.policy), "read", watched)
    trainer.accumulate(batch, 0.0)
    assert sum(with_gradient) == count_possible(batch)


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("gdc++", "on_policy"),
        ("guided", "on_policy"),
        ("guided", "guided"),
        (Guided(correction=0.0), "on_policy"),
        (Guided(correction=0.0), "guided"),
        ("gdc++", "guided"),
    ],
    ids=str,
)
def test_what_pulls_on_every_row_reads_every_row(
    world: World, method: str | Objective, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(world, policy=near(world.base), method=method, rule=rule, batch_size=N)
    if trainer.guidance:  # a good guide draws no impossible row
        guide = trainer.guidance.guide
        trainer.guidance.guide = replace(guide, log_value_table=0.0 * guide.log_value_table)
    passes = PassCounter(monkeypatch)
    batch = trainer.draw()
    assert bool((batch.features[:, 0] == 0).any())
    assert passes.taken() == (N, N)
    trainer.accumulate(batch, 0.0)
    assert passes.taken() == (0, 2 * N)


def test_without_a_correction_an_impossible_row_still_teaches(world: World) -> None:
    """All coefficients are 0 then, but the guide's law is learned on every prefix."""
    trainer = build_trainer(world, policy=near(world.base), method=Guided(correction=0.0), batch_size=N)
    batch = trainer.draw()
    few = impossible(batch)
    trainer.accumulate(few, 0.0)
    assert float(gradient(trainer).norm()) > 0.01


@dataclass(frozen=True)
class Bounded(Objective):
    """A third party's: a weight that is bounded, and none where the target rules a text out."""

    name: ClassVar[str] = "bounded"
    zero_outside_support: ClassVar[bool] = True

    def coefficients(self, record: Record) -> Tensor:
        possible = record.target_logscore.isfinite()
        return torch.where(possible, (record.target_logscore - record.policy_logprob - record.log_z).clamp(-1, 1), 0.0)


@dataclass(frozen=True)
class PerToken(Objective):
    """GDC's weight, once for every token."""

    name: ClassVar[str] = "per token"
    zero_outside_support: ClassVar[bool] = True

    def coefficients(self, record: Record) -> Tensor:
        return GDC().coefficients(record)[:, None].expand(-1, 1)


@dataclass(frozen=True)
class Repelled(Objective):
    """A third party's: away from everything, by π/q."""

    name: ClassVar[str] = "repelled"

    def coefficients(self, record: Record) -> Tensor:
        return -(record.policy_logprob - record.proposal_logprob).exp()


@dataclass(frozen=True)
class Proximal(Objective):
    """A third party's: back to the proposal; nothing where the policy is still there."""

    name: ClassVar[str] = "proximal"

    def coefficients(self, record: Record) -> Tensor:
        return record.proposal_logprob - record.policy_logprob


@dataclass(frozen=True)
class Constant(Objective):
    """A third party's: a baseline that asks nothing of the policy."""

    name: ClassVar[str] = "constant"

    def coefficients(self, record: Record) -> Tensor:
        return GDC().coefficients(record) - 0.5


@pytest.mark.parametrize("source", SOURCES)
def test_a_third_partys_objective_is_skipped_rightly(
    world: World, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_from(world, source, Bounded())
    batch = trainer.draw()
    (whole, _, _), (less, _, _) = both_ways(trainer, batch)
    assert float(whole.norm()) > 0.01
    assert float((whole - less).abs().max()) < 1e-12
    repelled = trainer_from(world, source, Repelled())
    batch = repelled.draw()
    passes = PassCounter(monkeypatch)
    repelled.accumulate(batch, 0.0)
    assert passes.taken() == (0, N if source == "base" else 2 * N)


@pytest.mark.parametrize("source", SOURCES)
def test_what_can_be_known_is_reported_as_before(world: World, source: str) -> None:
    trainer = trainer_from(world, source)
    batch = trainer.draw()
    count_possible(batch)
    (_, _, whole), (_, _, less) = both_ways(trainer, batch)
    for name in ("log_z", "kl_p_pi", "tv_p_pi", "ess"):
        one, other = getattr(less, name), getattr(whole, name)
        assert math.isfinite(one.value), name
        assert one.value == pytest.approx(other.value, abs=1e-9), name
        assert one.se == pytest.approx(other.se, abs=1e-9), name
    for name in ("moments", "target_moments"):
        found, expected = getattr(less, name), getattr(whole, name)
        assert found.keys() == expected.keys() == {"filter", "b", "words"}
        for key, estimate in found.items():
            assert estimate.value == pytest.approx(expected[key].value, abs=1e-9), key
    assert math.isfinite(whole.kl_pi_a.value)
    if source == "base":
        assert less.kl_pi_a == whole.kl_pi_a
    else:
        assert math.isnan(less.kl_pi_a.value)
        assert math.isnan(less.kl_pi_a.se)


@pytest.mark.parametrize("source", SOURCES)
def test_a_whole_step_learns_the_same_and_its_line_is_json(world: World, source: str) -> None:
    lines, weights = [], []
    for skips in (False, True):
        trainer = trainer_from(world, source)
        trainer.scorer.skips_outside_support = skips
        metrics = trainer.train_step()
        lines.append(json.loads(json.dumps(metrics.to_json(), allow_nan=False)))
        weights.append(torch.cat([p.detach().flatten() for p in trainer.parameters.values()]))
    assert float((weights[0] - weights[1]).abs().max()) < 1e-9
    whole, less = lines
    assert less["grad_norm"] == pytest.approx(whole["grad_norm"], abs=1e-9)
    assert less["sequences"] == whole["sequences"]
    assert (less["forward_passes"] < whole["forward_passes"]) == (source != "base")
    assert (less["kl_pi_a"] == {"value": None, "se": None}) == (source != "base")
    assert whole["kl_pi_a"]["value"] is not None


def impossible(batch: RolloutBatch, *, they: bool = True) -> RolloutBatch:
    """The rows of a batch that the filter rules out, or the others."""
    rows = ((batch.features[:, 0] == 0) == they).nonzero().squeeze(-1)
    assert len(rows) > 5
    return RolloutBatch(batch.samples.select(rows).trimmed(), batch.features[rows], batch.proposal)


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_without_any_possible_row_changes_nothing(
    world: World, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_from(world, source, optim="sgd")
    few = impossible(trainer.draw())
    monkeypatch.setattr(trainer, "draw", lambda: few)
    before = [p.detach().clone() for p in trainer.parameters.values()]
    rounds, samples = trainer.partition.rounds, trainer.partition.samples
    passes = PassCounter(monkeypatch)
    metrics = trainer.train_step()
    assert passes.taken() == (0, 0 if source == "policy" else len(few.samples))
    assert metrics.grad_norm == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))
    # It says that Z is smaller than thought, and that no sample is worth anything.
    assert (trainer.partition.rounds, trainer.partition.samples) == (rounds + 1, samples + len(few.samples))
    assert metrics.ess.value == 0
    assert metrics.moments["filter"].value == 0
    json.dumps(metrics.to_json(), allow_nan=False)
    monkeypatch.undo()
    assert trainer.train_step().grad_norm > 0.01


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_of_possible_rows_alone_skips_nothing(
    world: World, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_from(world, source)
    few = impossible(trainer.draw(), they=False)
    (whole, _, full), (less, _, metrics) = both_ways(trainer, few)
    assert torch.equal(whole, less)
    assert float(whole.norm()) > 0.01
    assert metrics == full
    assert math.isfinite(metrics.kl_pi_a.value)
    passes = PassCounter(monkeypatch)
    trainer.accumulate(few, 0.0)
    assert passes.taken() == (0, (1 if source == "base" else 2) * len(few.samples))


@pytest.mark.parametrize("source", SOURCES)
def test_distances_need_no_base_pass_of_the_impossible(
    world: World, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_from(world, source, "gdc++")
    batch = trainer.draw()
    possible = count_possible(batch)
    passes = PassCounter(monkeypatch)
    whole = trainer.scorer.score(batch)
    assert passes.taken() == (0, N if source == "base" else 2 * N)
    less = trainer.scorer.score_in_support(batch)
    assert passes.taken() == (0, {"policy": 2 * possible, "base": N, "step 1": N + possible}[source])
    assert not whole.policy_logprob.requires_grad
    assert not less.policy_logprob.requires_grad
    one, other = distances(less, trainer.partition), distances(whole, trainer.partition)
    for name in ("kl_gain", "tv_gain"):
        found, expected = getattr(one, name), getattr(other, name)
        assert found.value == pytest.approx(expected.value, abs=1e-9), name
        assert found.se == pytest.approx(expected.se, abs=1e-9), name
        assert (abs(expected.value) > 1e-4) == (source != "policy"), name


def test_an_earlier_policys_step_costs_less_by_what_is_impossible(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's own count of a whole step, with its sampling."""
    twin = trainer_from(world, "step 1")
    possible = count_possible(twin.draw())
    trainer = trainer_from(world, "step 1")
    passes = PassCounter(monkeypatch)
    assert spent(trainer) == passes.taken() == (N, 2 * N + possible)


@dataclass(frozen=True)
class AboveALevel:
    """A target of somebody's own: the base's likelier texts alone."""

    features: tuple[Feature, ...]

    def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
        return torch.where(base_logprob > -3.0, base_logprob, -math.inf)


def test_a_support_that_depends_on_the_base_is_not_guessed(world: World) -> None:
    """On-policy the base is asked before a row is called impossible."""
    gradients = []
    for skips in (True, False):
        trainer = build_trainer(world, method="gdc", policy=near(world.base, 0.05))
        trainer.scorer.target = AboveALevel(tuple(world.target.features))  # type: ignore[assignment]
        trainer.scorer.skips_outside_support = skips
        trainer.accumulate(trainer.draw(), 0.0)
        gradients.append(gradient(trainer))
    assert float(gradients[0].norm()) > 0.01
    assert float((gradients[0] - gradients[1]).abs().max()) < 1e-12


def test_momentum_goes_on_over_a_batch_that_pulls_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for skips in (True, False):
        trainer = build_trainer(world, method="gdc", optim="adam")
        trainer.scorer.skips_outside_support = skips
        trainer.train_step()
        before = torch.cat([p.detach().clone().flatten() for p in trainer.parameters.values()])
        few = impossible(trainer.draw())
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "draw", lambda few=few: few)
            trainer.train_step()
        moved.append(torch.cat([p.detach().flatten() for p in trainer.parameters.values()]) - before)
    assert float(moved[0].norm()) > 1e-3
    assert float((moved[0] - moved[1]).abs().max()) < 1e-12
