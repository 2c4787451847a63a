"""What an objective declares of itself is true: all built-in ones, with all settings that change a declaration."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.objectives import (
    BUILT_IN,
    FDPG,
    GRPO,
    PPO,
    RLOO,
    AlphaDPG,
    Guided,
    GuideRecord,
    KLControl,
    Objective,
    Pooled,
    Record,
    Reinforce,
    TokenRecord,
)
from tiltlm.training.proposal_rules import RULES

N, T = 6, 3
OTHER_SETTINGS: list[Objective] = [
    *(FDPG(divergence) for divergence in ("kl", "reverse_kl", "tv", "chi2", "reverse_chi2")),
    *(AlphaDPG(alpha, clip) for alpha in (0.0, 1.0) for clip in (None, 5.0)),
    Guided(correction=0.0, feedback=0.3),
    Pooled(self_normalized=False, kappa=0.5),
    KLControl(beta=0.0),
    KLControl(target_kl=3.0),
    RLOO(beta=0.0),
    PPO(beta=0.0),
    GRPO(beta=0.1),
    Reinforce("none"),
]
OBJECTIVES = [*(kind() for kind in BUILT_IN.values()), *OTHER_SETTINGS]
EVERY = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


def record(seed: int = 0) -> Record:
    """A record of N samples of two prompts, with tokens, guide and reward."""
    generator = torch.Generator().manual_seed(seed)

    def logprobs(*shape: int) -> Tensor:
        return -4 * torch.rand(*shape, dtype=torch.float64, generator=generator)

    mask = torch.arange(T) < torch.tensor([3, 3, 2, 1, 3, 2])[:, None]
    policy, base, proposal, guide = (logprobs(N, T) * mask for _ in range(4))
    return Record(
        policy_logprob=policy.sum(-1),
        base_logprob=base.sum(-1),
        proposal_logprob=proposal.sum(-1),
        target_logscore=base.sum(-1) + logprobs(N),
        log_z=-0.7,
        guide=GuideRecord(guide, logprobs(N, T + 1), logprobs(N, T)),
        reward=logprobs(N),
        prompt_index=torch.tensor([0, 0, 0, 1, 1, 1]),
        tokens=TokenRecord(policy, base, proposal, mask, logprobs(N, T) if seed else None),
    )


def with_advantage(objective: Objective, given: Record) -> Record:
    return replace(given, advantage=objective.advantages(given)) if objective.batchwise else given


@EVERY
def test_coefficients_have_a_row_for_each_sequence(objective: Objective) -> None:
    found = objective.coefficients(with_advantage(objective, record()))
    assert found.shape in ((N,), (N, T))
    assert bool(found.isfinite().all())


@EVERY
def test_names_and_defaults_are_those_of_the_run_file(objective: Objective) -> None:
    assert BUILT_IN[objective.name] is type(objective)
    assert objective.default_proposal in RULES
    assert not objective.only_on_policy or objective.default_proposal == "on_policy"
    assert objective.default_iterations >= 1
    assert objective.max_iterations is None or objective.max_iterations >= objective.default_iterations


@EVERY
def test_outside_the_support_the_coefficient_is_zero_if_that_is_declared(objective: Objective) -> None:
    outside = replace(record(), target_logscore=torch.full((N,), -math.inf, dtype=torch.float64))
    if objective.needs_full_support:
        found = objective.coefficients(with_advantage(objective, outside))
        assert not bool(found.isfinite().all()) or isinstance(objective, AlphaDPG)
        return
    found = objective.coefficients(with_advantage(objective, outside))
    if objective.zero_outside_support:
        assert not objective.distills
        # Whatever the models say: NaN stands for a pass that was left out.
        unknown = replace(outside, policy_logprob=torch.full((N,), math.nan), base_logprob=torch.full((N,), math.nan))
        assert bool((objective.coefficients(unknown) == 0).all())
    elif not objective.batchwise and not objective.distills and objective != Pooled():
        assert bool((found != 0).any())


@EVERY
def test_with_advantage_zero_the_coefficient_is_zero_if_that_is_declared(objective: Objective) -> None:
    if not objective.batchwise:
        assert not objective.zero_without_advantage
        return
    given = record()
    silent = replace(given, advantage=torch.zeros_like(objective.advantages(given)))
    assert bool((objective.coefficients(silent) == 0).all()) == objective.zero_without_advantage


@EVERY
def test_advantages_change_with_the_base_only_if_that_is_declared(objective: Objective) -> None:
    if not objective.batchwise:
        return
    given, other = record(), record(seed=3)
    assert given.tokens is not None
    assert other.tokens is not None
    moved = replace(
        given,
        base_logprob=other.base_logprob,
        target_logscore=other.target_logscore,
        tokens=replace(given.tokens, base=other.tokens.base),
    )
    same = torch.equal(objective.advantages(given), objective.advantages(moved))
    assert same != objective.advantages_read_base


@EVERY
def test_a_coefficient_of_a_row_depends_on_that_row_alone_once_advantages_are_known(objective: Objective) -> None:
    given = with_advantage(objective, record())
    assert given.tokens is not None
    assert given.guide is not None
    assert given.prompt_index is not None
    rows = torch.tensor([1, 4])
    tokens = TokenRecord(
        *(x[rows] for x in (given.tokens.policy, given.tokens.base, given.tokens.proposal)),
        mask=given.tokens.mask[rows],
    )
    guide = GuideRecord(
        *(x[rows] for x in (given.guide.token_logprobs, given.guide.log_values, given.guide.log_expected))
    )
    part = Record(
        given.policy_logprob[rows],
        given.base_logprob[rows],
        given.proposal_logprob[rows],
        given.target_logscore[rows],
        given.log_z,
        guide,
        given.reward[rows] if given.reward is not None else None,
        given.prompt_index[rows],
        tokens,
        given.advantage[rows] if given.advantage is not None else None,
    )
    torch.testing.assert_close(objective.coefficients(part), objective.coefficients(given)[rows])


@EVERY
def test_the_gradient_of_the_token_loss_is_minus_the_coefficient(objective: Objective) -> None:
    given = with_advantage(objective, record())
    coefficients = objective.coefficients(given)
    policy = torch.zeros(N, T, dtype=torch.float64, requires_grad=True)
    objective.token_loss(given, coefficients, policy, None).sum().backward()
    wide = coefficients if coefficients.ndim == 2 else coefficients[:, None].expand(N, T)
    torch.testing.assert_close(policy.grad, -wide)


@EVERY
def test_only_an_objective_that_distills_has_a_loss_on_the_guide(objective: Objective) -> None:
    given = with_advantage(objective, record())
    coefficients = objective.coefficients(given)
    policy, guide = (torch.zeros(N, T, dtype=torch.float64, requires_grad=True) for _ in range(2))
    objective.token_loss(given, coefficients, policy, guide).sum().backward()
    assert (guide.grad is not None) == objective.distills
    assert (objective.estimators(given) is not None) <= objective.distills
    assert objective.distills or objective.moment_feedback == 0


@EVERY
def test_a_critic_has_goals_and_a_loss_with_gradient(objective: Objective) -> None:
    if not objective.has_critic:
        return
    given = record(seed=1)
    returns = objective.returns(given)
    assert returns.shape == (N, T)
    values = torch.zeros(N, T, dtype=torch.float64, requires_grad=True)
    objective.value_loss(values, torch.zeros(N, T), returns).sum().backward()
    assert values.grad is not None
    assert bool((values.grad != 0).any())


@EVERY
def test_what_adapts_is_one_number_that_a_checkpoint_holds(objective: Objective) -> None:
    adapted = objective.adapted(record())
    if objective.adaptive_field is None:
        assert adapted is objective
        assert objective.state_dict() == {}
        assert objective.with_state_dict({}) is objective
        return
    moved = replace(objective, **{objective.adaptive_field: 0.123})  # type: ignore[type-var]
    assert objective.with_state_dict(moved.state_dict()) == moved
    assert type(adapted) is type(objective)


def test_at_least_one_objective_makes_each_declaration() -> None:
    flags = ("batchwise", "has_critic", "distills", "keeps_guide", "maximizes_reward", "only_on_policy")
    properties = ("zero_outside_support", "zero_without_advantage", "advantages_read_base", "normalized_by_replay")
    for name in (*flags, *properties, "needs_full_support", "adaptive_field", "max_iterations", "moment_feedback"):
        values = {bool(getattr(objective, name)) for objective in OBJECTIVES}
        assert values == {True, False}, name


def test_a_method_without_its_declaration_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(UsageError, match=r"Forgetful: batchwise = False does not fit its method advantages\(\)"):

        class Forgetful(Objective):
            name: ClassVar[str] = "forgetful"

            def advantages(self, record: Record) -> Tensor:
                return record.policy_logprob

            def coefficients(self, record: Record) -> Tensor:
                return record.policy_logprob
