"""Guided distillation: whatever the guide and the proposal, its gradient is that of KL(p‖π), in full and on average."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from enumerable import random_guide
from tiltlm.errors import UsageError
from tiltlm.exact import weighted_gradient
from tiltlm.lm import Guide, LanguageModel, Samples, SamplingSettings
from tiltlm.objectives import Guided, GuideRecord, Objective, Record, TokenRecord, estimators, prefix_weights
from tiltlm.rollouts.proposal import Proposal
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, World, as_if_uniform, build_trainer, flat, gradient, near, tiny_world, true_gradient

PROPOSALS = ("uniform", "guided", "another guide", "base", "policy")


@pytest.fixture(scope="module")
def world() -> World:
    return tiny_world()


@torch.no_grad()
def drawn_from(model: LanguageModel, samples: Samples, guide: Guide | None = None) -> Samples:
    """The same completions as if this model, with this guide, had drawn them."""
    guided = replace(samples, guide=guide, settings=SamplingSettings())
    return replace(guided, proposal_logprob=model.logprob(guided))


def as_if_from(world: World, trainer: Trainer, proposal: str) -> RolloutBatch:
    """All completions, with the log-probabilities of a proposal."""
    assert trainer.guidance is not None
    samples = {
        "uniform": lambda: as_if_uniform(world.samples),
        "guided": lambda: drawn_from(world.base, world.samples, trainer.guidance.guide),
        "another guide": lambda: drawn_from(world.base, world.samples, random_guide(world.base, seed=7)),
        "base": lambda: drawn_from(world.base, world.samples),
        "policy": lambda: drawn_from(trainer.roles.policy, world.samples),
    }[proposal]()
    assert float(samples.sequence_logprob.exp().sum()) == pytest.approx(1, abs=1e-9)
    return RolloutBatch(
        samples, world.truth.features, Proposal.parse({"base": "base", "guided": "guided"}.get(proposal, "step 3"))
    )


def expected(trainer: Trainer, batch: RolloutBatch, log_z: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The mean gradient under the batch's distribution: the loss of each completion times its probability."""
    kind, n = type(trainer.scorer.objective), len(batch.samples)
    token_loss = kind.token_loss

    def weighted(objective: Objective, record: Record, *args: Any) -> Tensor:
        loss, mass = token_loss(objective, record, *args), record.proposal_logprob.exp() * n
        mass = mass if loss.ndim == 1 else mass[:, None]
        return torch.where(mass > 0, mass * loss, 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "token_loss", weighted)
        trainer.accumulate(batch, log_z)
    return gradient(trainer)


def wrongly_guided(world: World, method: Guided, **settings: Any) -> Trainer:
    """A trainer with a policy beside the base and a guide that knows nothing of the target."""
    trainer = build_trainer(world, policy=near(world.base), method=method, rule="guided", **settings)
    assert trainer.guidance is not None
    trainer.guidance.guide = random_guide(world.base, states=4)
    return trainer


@pytest.mark.parametrize("pieces", [None, 7])
@pytest.mark.parametrize("proposal", PROPOSALS)
def test_corrected_it_is_exact_even_with_a_wrong_guide(
    world: World, proposal: str, pieces: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = wrongly_guided(world, Guided(), per_device_train_batch_size=pieces)
    found = expected(trainer, as_if_from(world, trainer, proposal), world.truth.log_z, monkeypatch)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert truth.norm() > 0.1
    assert float((found - truth).abs().max()) < 1e-10


def test_corrected_it_is_exact_with_lora_and_its_own_guide(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(world, method="guided", rule="guided", lora=True)
    found = expected(trainer, as_if_from(world, trainer, "guided"), world.truth.log_z, monkeypatch)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert truth.norm() > 0.1
    assert float((found - truth).abs().max()) < 1e-10


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("which", [0, 1, 2, 3, None])
def test_every_form_and_every_mix_of_them_is_exact(
    world: World, proposal: str, which: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the shares of a position are, negative ones too, as long as they sum to one."""
    drawn = torch.randn(LENGTH, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    drawn[:, 0] += 1 - drawn.sum(-1)
    table = drawn if which is None else torch.eye(4).double()[[which] * LENGTH]
    trainer = wrongly_guided(world, Guided())
    monkeypatch.setattr(trainer.scorer.minimum_variance, "weights", lambda length: table[:length])
    found = expected(trainer, as_if_from(world, trainer, proposal), world.truth.log_z, monkeypatch)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert float((found - truth).abs().max()) < 1e-10


def test_shares_are_those_of_the_batches_before(world: World) -> None:
    """They change with each update, in whatever pieces it reads, and not by what only measures."""
    found = []
    for pieces in (None, 7):
        settings = {"batch_size": 60, "per_device_train_batch_size": pieces, "gradient_samples": 3}
        trainer = build_trainer(world, method="guided", rule="on_policy", **settings)
        assert trainer.scorer.minimum_variance.weights(LENGTH) is None
        shares = []
        for _ in range(2):
            trainer.train_step()
            assert trainer.scorer.minimum_variance.pending is None
            shares.append(trainer.scorer.minimum_variance.weights(LENGTH))
        found.append(torch.stack(shares))
    torch.testing.assert_close(found[0].sum(-1), torch.ones(2, LENGTH).double())
    assert float((found[0][0] - found[0][1]).abs().max()) > 1e-3
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_without_correction_nothing_is_balanced(world: World) -> None:
    trainer = build_trainer(world, method=Guided(correction=0), rule="guided", batch_size=20)
    trainer.train_step()
    assert trainer.scorer.minimum_variance.moments is None


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_without_correction_it_distills_the_guide(world: World, proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = wrongly_guided(world, Guided(correction=0))
    found = expected(trainer, as_if_from(world, trainer, proposal), world.truth.log_z, monkeypatch)
    guide = trainer.guidance.guide  # type: ignore[union-attr]
    g = drawn_from(world.base, world.samples, guide).sequence_logprob.exp()
    truth = flat(weighted_gradient(trainer.roles.policy, world.samples, -g), trainer)
    assert truth.norm() > 0.1
    assert float((found - truth).abs().max()) < 1e-10
    target = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert float((truth - target).norm()) > 0.1 * float(target.norm())


@pytest.mark.parametrize("proposal", ["guided", "base"])
def test_a_correction_in_part_lies_between(world: World, proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for correction in (0.0, 0.25, 1.0):
        trainer = wrongly_guided(world, Guided(correction=correction))
        found.append(expected(trainer, as_if_from(world, trainer, proposal), world.truth.log_z, monkeypatch))
    none, some, whole = found
    assert float((some - 0.75 * none - 0.25 * whole).abs().max()) < 1e-10


def test_a_wrong_log_z_only_scales_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's share comes out even whatever Z is."""
    trainer = wrongly_guided(world, Guided())
    batch = as_if_from(world, trainer, "guided")
    found = expected(trainer, batch, world.truth.log_z + 0.7, monkeypatch)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert float((found * math.exp(0.7) - truth).abs().max()) < 1e-10


def prefix_guide(world: World) -> Guide:
    """The guide of the target's own law: a state for every prefix, ψ its exact promise, −inf where there is none."""
    rows, eos_ids = world.samples.completion_ids, world.base.eos_ids
    open_prefixes = {tuple(row[:t]) for row in rows for t in range(len(row) + 1) if not set(row[:t]) & set(eos_ids)}
    states = {prefix: i for i, prefix in enumerate(sorted(open_prefixes))}
    # Behind what promises nothing: some law, whichever.
    nowhere, s = len(states), len(states) + 1
    transitions = torch.full((s, world.base.vocab_size), nowhere)
    for prefix, state in states.items():
        for token in range(world.base.vocab_size):
            transitions[state, token] = states.get((*prefix, token), nowhere)
    transitions[:, eos_ids] = torch.arange(s)[:, None] + s
    above, below = torch.zeros(2 * s).double(), torch.zeros(2 * s).double()
    for row, a, score in zip(rows, world.truth.base_logprob.exp(), world.truth.target_logscore.exp(), strict=True):
        passed = [states[tuple(row[:t])] for t in range(len(row))]
        for state in (*passed, int(transitions[passed[-1], row[-1]])):
            above[state] += score
            below[state] += a
    twist = (above / below).nan_to_num(1.0).log()
    transitions[twist[:s] == -math.inf] = nowhere
    transitions[:, eos_ids] = torch.arange(s)[:, None] + s
    twist[s : 2 * s][twist[:s] == -math.inf] = 0.0
    return Guide(transitions, twist.expand(LENGTH + 1, 2 * s), states[()])


def test_with_the_targets_own_guide_the_samples_have_nothing_to_correct(world: World) -> None:
    guide = prefix_guide(world)
    p = drawn_from(world.base, world.samples, guide).sequence_logprob
    reachable = world.truth.logprob > -math.inf
    assert 0 < int(reachable.sum()) < len(p)
    assert float((p - world.truth.logprob)[reachable].abs().max()) < 1e-9
    assert float(p[~reachable].exp().sum()) < 1e-12
    found = []
    for correction in (0.0, 1.0):
        trainer = build_trainer(
            world, policy=near(world.base), method=Guided(correction=correction), rule="guided", batch_size=50
        )
        trainer.guidance.guide = guide  # type: ignore[union-attr]
        batch = trainer.draw()
        trainer.accumulate(batch, world.truth.log_z)
        found.append(gradient(trainer))
    assert float((found[0] - found[1]).abs().max()) < 1e-9 < 0.1 < float(found[0].norm())


@pytest.mark.parametrize("proposal", ["uniform", "base"])
def test_a_guide_that_forbids_tokens_is_exact_too(world: World, proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals draw what the guide rules out, and such prefixes weigh nothing in its distillation."""
    trainer = wrongly_guided(world, Guided())
    trainer.guidance.guide = prefix_guide(world)  # type: ignore[union-attr]
    found = expected(trainer, as_if_from(world, trainer, proposal), world.truth.log_z, monkeypatch)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert float((found - truth).abs().max()) < 1e-9


def test_where_the_guide_is_the_policy_it_is_gdc_plus_plus(world: World) -> None:
    """Where ψ promises Z of every prefix the guide has nothing to teach, sample by sample, and a/q is π/q."""
    found: dict[str, Tensor] = {}
    for name in ("guided", "gdc++"):
        trainer = build_trainer(world, method=name, rule="kl", check_steps=99, batch_size=30)
        if trainer.guidance:
            guide = trainer.guidance.guide
            flat_table = torch.zeros_like(guide.log_value_table)
            trainer.guidance.guide = replace(guide, log_value_table=flat_table, log_scale=world.truth.log_z)
        trainer.accumulate(trainer.draw(), world.truth.log_z)
        found[name] = gradient(trainer)
    assert found["gdc++"].norm() > 0.1
    assert float((found["guided"] - found["gdc++"]).abs().max()) < 1e-10


def logs(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize("shift", [0.0, 140.0, 5000.0])
def test_corrections_and_lessons_are_the_formulas_even_where_probabilities_underflow(shift: float) -> None:
    """Two texts of two tokens, the second of them ended after one; ``shift`` is taken off log a, log q and log g."""
    base, proposal = logs([0.5, 0.4], [0.2, 1.0]) - shift, logs([0.25, 0.8], [0.4, 1.0]) - shift
    mask = torch.tensor([[True, True], [True, False]])
    base, proposal, guide = (torch.where(mask, x, 0.0) for x in (base, proposal, logs([0.5, 0.2], [0.8, 1.0]) - shift))
    promises, expected = logs([1.0, 2.0, 3.0], [1.0, 0.5, 0.5]), logs([1.1, 1.5], [0.7, 1.0])
    score = base.sum(-1) + torch.tensor([8.0, 0.0]).double().log()
    own = GuideRecord(guide, promises, expected)
    policy = base + torch.where(mask, math.log(0.5), 0.0)
    tokens = TokenRecord(policy, base, proposal, mask)
    record = Record(policy.sum(-1), base.sum(-1), proposal.sum(-1), score, math.log(2.0), own, tokens=tokens)
    # ρ is 1 and 2, then a/q 1; 0.5 in the other. The first text is worth 4 where 3 is promised, the second nothing.
    later = 2 * (1.5 - 2.0)
    corrections = torch.tensor([[later + 1.0, 1.0], [-0.25, 0.0]]).double()
    lessons = torch.tensor([[1.1, 2 * 1.5], [0.7, 0.0]]).double()
    # w is 4 and 0, π/q a quarter and a half of a/q, and g/q a half and 2.
    three = torch.tensor([[4.0, 0.0], [4 - 0.25, -0.25], [4 - 0.5, -2.0]]).double()
    all_forms, of_text = estimators(record), torch.where(mask, three[..., None], 0.0)
    torch.testing.assert_close(all_forms.residual, torch.cat([of_text, corrections[None]]))
    of_prefix = prefix_weights(guide, proposal) * mask
    torch.testing.assert_close(all_forms.distillation, torch.stack([0 * lessons, 0 * lessons, of_prefix, lessons]))
    torch.testing.assert_close(Guided().coefficients(record), corrections)
    torch.testing.assert_close(Guided().distillation_weights(record), lessons)
    torch.testing.assert_close(Guided(correction=0.25).coefficients(record), 0.25 * corrections)
    of_guide = prefix_weights(guide, proposal) * mask
    torch.testing.assert_close(
        Guided(correction=0.25).distillation_weights(record) * mask, 0.25 * lessons + 0.75 * of_guide
    )


def test_weights_of_prefixes_are_products_of_the_tokens_before() -> None:
    guide = torch.tensor([[0.5, 0.25, 0.8], [1.0, 0.0, 0.3]]).double().log()
    proposal = torch.tensor([[0.25, 0.5, 0.1], [0.5, 0.5, 0.6]]).double().log()
    weights = prefix_weights(guide, proposal)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 0.0]]).double())


@pytest.mark.parametrize("field", ["correction", "feedback"])
@pytest.mark.parametrize("value", [-0.1, 1.1, True, "1", math.nan, None])
def test_settings_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^method.args.{field}: "):
        Guided(**{field: value})


@pytest.fixture(params=["gdc++", "dpg"])
def objective(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_guided_proposal_serves_the_other_objectives(
    world: World, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(world, policy=near(world.base), method=objective, rule="guided")
    assert str(trainer.drawer.proposal) == "guided"
    assert not trainer.scorer.objective.distills
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    batch = trainer.draw()
    assert str(batch.proposal) == "guided"
    assert not batch.from_base
    with torch.no_grad():
        torch.testing.assert_close(world.base.logprob(batch.samples), batch.samples.proposal_logprob)
    found = expected(trainer, as_if_from(world, trainer, "guided"), world.truth.log_z, monkeypatch)
    assert float((found - truth).abs().max()) < 1e-10
