"""One step: what it computes does not depend on how it is cut up, and what it costs is what it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.lm import LanguageModel, Roles
from tiltlm.objectives import GDC, Objective, Record
from tiltlm.targets import draw_base_sample
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, LORA, World, build_trainer, flat, gradient, near, true_gradient


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("rule", ["on_policy", "kl"])
@pytest.mark.parametrize("size", [1, 7, 200])
def test_accumulation_does_not_change_the_gradient(world: World, size: int, rule: str, lora: bool) -> None:
    found = []
    for per_device in (None, size):
        trainer = build_trainer(world, rule=rule, lora=lora, per_device_train_batch_size=per_device, batch_size=61)
        batch = trainer.draw()
        scores = trainer.accumulate(batch, world.truth.log_z).scores
        found.append((gradient(trainer), scores))
    (whole, one), (pieces, other) = found
    assert float(whole.norm()) > 0.01
    assert float((whole - pieces).abs().max()) < 1e-10
    # The rows of the scores come back in the order of the batch.
    for name in ("policy_logprob", "base_logprob", "proposal_logprob"):
        assert float((getattr(one, name) - getattr(other, name)).abs().max()) < 1e-10
    assert torch.equal(one.proposal_logprob, batch.samples.sequence_logprob)


def test_a_whole_step_is_the_same_however_it_is_cut_up(world: World) -> None:
    weights = []
    for per_device in (None, 7):
        trainer = build_trainer(world, per_device_train_batch_size=per_device, batch_size=61, optim="sgd")
        for _ in range(3):
            trainer.train_step()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.parameters.values()]))
    assert float((weights[0] - weights[1]).abs().max()) < 1e-9


@dataclass(frozen=True)
class PerToken(Objective):
    """GDC's weight on every token of the longest rows' width, which must come to the same as one a sequence."""

    name: ClassVar[str] = "per token"
    width: int

    def coefficients(self, record: Record) -> Tensor:
        return GDC().coefficients(record)[:, None].expand(-1, self.width)


def test_a_coefficient_for_every_token_counts_for_that_token(world: World) -> None:
    vectors = []
    for method in (GDC(), PerToken(LENGTH)):
        trainer = build_trainer(world, method=method, policy=near(world.base))
        batch = trainer.draw()
        longest = batch.samples.lengths == LENGTH
        assert int(longest.sum()) > 10
        few = type(batch)(batch.samples.select(longest), batch.features[longest], "policy")
        trainer.accumulate(few, 0.0)
        vectors.append(gradient(trainer))
    assert float((vectors[0] - vectors[1]).abs().max()) < 1e-12


class PassCounter:
    """Counts the sequences that really go through sampling and scoring of any language model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        sample, score = LanguageModel.sample, LanguageModel.read

        def counted_sample(model: LanguageModel, n: int, *args: Any, **kwargs: Any) -> Any:
            self.counts["sampled"] += n
            return sample(model, n, *args, **kwargs)

        def counted_score(model: LanguageModel, samples: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts["scored"] += len(samples)
            return score(model, samples, *args, **kwargs)

        monkeypatch.setattr(LanguageModel, "sample", counted_sample)
        monkeypatch.setattr(LanguageModel, "read", counted_score)

    def taken(self) -> tuple[int, int]:
        counts = self.counts["sampled"], self.counts["sampled"] + self.counts["scored"]
        self.counts.clear()
        return counts


def spent(trainer: Trainer) -> tuple[int, int]:
    """Sequences and forward passes of one step by the trainer's own count."""
    sequences, passes = trainer.counter.sequences, trainer.counter.forward_passes
    metrics = trainer.train_step()
    assert metrics.progress is not None
    assert (metrics.progress.sequences, metrics.progress.forward_passes) == (
        trainer.counter.sequences,
        trainer.counter.forward_passes,
    )
    return trainer.counter.sequences - sequences, trainer.counter.forward_passes - passes


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_step_costs_three_passes_on_policy_and_two_from_the_base(
    world: World, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_policy, from_base = (build_trainer(world, rule=rule, lora=lora, check_steps=9) for rule in ("on_policy", "kl"))
    passes = PassCounter(monkeypatch)
    assert spent(on_policy) == passes.taken() == (200, 600)
    assert spent(from_base) == passes.taken() == (200, 400)


def test_an_earlier_policy_as_proposal_costs_three(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(world, rule="interval", check_steps=1)
    trainer.train_step()
    passes = PassCounter(monkeypatch)
    assert str(trainer.drawer.proposal) == "step 1"
    assert spent(trainer) == passes.taken() == (200, 600)


def test_a_published_check_costs_ten_batches_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(world, rule="published", check_steps=2, batch_size=50)
    passes = PassCounter(monkeypatch)
    assert spent(trainer) == passes.taken() == (50, 100)
    assert spent(trainer) == passes.taken() == (50 + 500, 100 + 10 * 100)
    assert str(trainer.drawer.proposal) == "step 2"
    assert spent(trainer) == passes.taken() == (50, 150)
    sequences, forward = spent(trainer)
    assert (sequences, forward) == passes.taken()
    assert sequences == 50 + 500
    # What the filter rejects takes no part in a distance to the target, and no base pass.
    assert 150 + 10 * 100 < forward < 150 + 10 * 150


def test_fit_samples_train_the_policy_once_and_are_counted_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    n = len(world.base_sample.samples)
    trainer = build_trainer(world, reuse_fit_samples=True, batch_size=250)
    assert (n, trainer.counter.sequences, trainer.counter.forward_passes) == (600, 600, 600)
    before = trainer.partition
    passes = PassCounter(monkeypatch)
    for _ in range(2):
        assert spent(trainer) == passes.taken() == (0, 250)
    # 100 are left, too few for a batch.
    assert spent(trainer) == passes.taken() == (250, 750)
    assert trainer.partition.samples == before.samples + 250 == 850


def test_reused_samples_are_the_first_rows_in_order_and_count_for_log_z_only_once(world: World) -> None:
    trainer = build_trainer(world, reuse_fit_samples=True, batch_size=250)
    first, second = trainer.draw(), trainer.draw()
    kept = world.base_sample
    assert torch.equal(torch.cat([first.features, second.features]), kept.features[:500])
    drawn = torch.cat([first.samples.sequence_logprob, second.samples.sequence_logprob])
    assert torch.equal(drawn, kept.samples.sequence_logprob[:500])
    assert first.from_base
    assert first.reused
    trainer = build_trainer(world, reuse_fit_samples=True, batch_size=250)
    before = trainer.partition
    metrics = trainer.train_step()
    assert metrics.proposal == "base"
    assert trainer.partition == before
    assert metrics.log_z == before.log_z


def test_batches_smaller_than_the_list_of_prompts_use_all_of_them(world: World) -> None:
    prompts = ["a", "b a", None, "d", "b"]
    sample = draw_base_sample(world.base, world.target.features, 12, prompts, LENGTH, seed=0)
    trainer = build_trainer(world, base_sample=sample, batch_size=2)
    drawn = []
    for _ in range(5):
        batch = trainer.draw()
        drawn += batch.samples.prompt_texts
        with torch.no_grad():
            rescored = world.base.logprob(batch.samples).sum(-1)
        assert float((rescored - batch.samples.sequence_logprob).abs().max()) < 1e-10
    # Two whole rounds, going on where the base's twelve had stopped, in the order that chance had given.
    order = sample.samples.prompts.texts
    assert Counter(order) == Counter(prompts)
    assert drawn == [order[i % 5] for i in range(12, 22)]


def test_the_first_estimate_of_log_z_is_that_of_the_fit(world: World) -> None:
    log_z = build_trainer(world).partition.log_z
    assert log_z.value == pytest.approx(world.truth.log_z, abs=5 * log_z.se)
    assert log_z.se < 0.15


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_no_proposal_is_kept_on_policy(world: World, lora: bool) -> None:
    trainer = build_trainer(world, lora=lora, check_steps=1)
    for _ in range(3):
        metrics = trainer.train_step()
        assert metrics.proposal == "policy"
        assert not metrics.proposal_updated
    assert not trainer.roles.has_proposal
    assert not [name for name, _ in trainer.roles.policy.model.named_parameters() if "proposal" in name]


def test_with_lora_the_base_stays_as_it_was(world: World) -> None:
    trainer = build_trainer(world, lora=True, rule="interval", check_steps=1)
    before = {name: p.detach().clone() for name, p in trainer.roles.policy.model.named_parameters()}
    for _ in range(3):
        trainer.train_step()
    changed = [n for n, p in trainer.roles.policy.model.named_parameters() if n in before and not p.equal(before[n])]
    assert set(changed) == set(trainer.parameters)
    assert all("lora_" in name for name in changed)
    with trainer.roles.use("base") as base:
        assert float((world.logprob(base) - world.truth.base_logprob).abs().max()) < 1e-12


@pytest.mark.parametrize(("limit", "expected"), [(0.0, None), (0.25, 0.25), (1e9, None)])
def test_gradients_are_clipped_to_the_norm_and_never_with_zero(
    world: World, limit: float, expected: float | None
) -> None:
    trainer = build_trainer(world, optim="sgd", learning_rate=1.0, max_grad_norm=limit)
    before = torch.cat([p.detach().clone().flatten() for p in trainer.parameters.values()])
    trainer.accumulate(trainer.draw(), world.truth.log_z)
    pulled = gradient(trainer, clear=False)
    norm = trainer.update()
    moved = before - torch.cat([p.detach().flatten() for p in trainer.parameters.values()])
    assert norm == pytest.approx(float(pulled.norm()))
    assert float(moved.norm()) == pytest.approx(norm if expected is None else expected, rel=1e-4)
    assert float(moved @ pulled) == pytest.approx(float(moved.norm() * pulled.norm()))


def test_a_step_without_any_pull_changes_nothing(world: World) -> None:
    """All gradients zero: a norm of 0 must not divide anything."""
    trainer = build_trainer(world, optim="sgd", max_grad_norm=0.0)
    for parameter in trainer.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in trainer.parameters.values()]
    assert trainer.update() == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))


@dataclass(frozen=True)
class Broken(Objective):
    """An objective that gives no number from a certain call on."""

    name: ClassVar[str] = "broken"
    value: float

    def coefficients(self, record: Record) -> Tensor:
        return torch.full_like(record.policy_logprob, self.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_coefficient_that_is_no_number_stops_before_the_weights_change(world: World, value: float) -> None:
    trainer = build_trainer(world, method=Broken(value))
    before = [p.detach().clone() for p in trainer.parameters.values()]
    with pytest.raises(NumericalError, match="step 1: broken gave a coefficient") as caught:
        trainer.train_step()
    assert "learning_rate" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(world: World) -> None:
    trainer = build_trainer(world)
    trainer.accumulate(trainer.draw(), 0.0)
    next(iter(trainer.parameters.values())).grad.view(-1)[0] = float("nan")  # type: ignore[union-attr]
    before = [p.detach().clone() for p in trainer.parameters.values()]
    with pytest.raises(NumericalError, match="gradient is not finite"):
        trainer.update()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))


def test_training_brings_the_policy_to_the_target(world: World) -> None:
    trainer = build_trainer(world, batch_size=400, max_steps=25, lr_scheduler_type="cosine", learning_rate=2e-3)
    assert world.kl(trainer.roles.policy) > 0.9
    outcome = trainer.train()
    assert outcome.status == "done"
    assert outcome.progress.step == 25
    assert world.kl(trainer.roles.policy) < 0.2


def test_the_roles_of_a_lora_policy_share_their_weights(world: World) -> None:
    roles = Roles(world.base.copy().with_lora(**LORA))
    assert roles.shared
    assert all(p.requires_grad for p in roles.trainable().values())
    assert flat(true_gradient(world, roles.policy)).numel() == sum(p.numel() for p in roles.trainable().values())
