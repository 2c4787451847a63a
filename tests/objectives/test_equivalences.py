"""What the methods are to each other: equalities of whole gradients, by enumeration, to rounding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tiltlm.exact import ExactTarget, exact_target, expected_gradient, weighted_gradient
from tiltlm.lm import LanguageModel, SamplingSettings
from tiltlm.objectives import (
    BUILT_IN,
    FDPG,
    GRPO,
    PPO,
    RLOO,
    AlphaDPG,
    GDCPlusPlus,
    KLControl,
    Objective,
    Record,
    Reinforce,
    TokenRecord,
    VarGrad,
)
from tiltlm.targets import TiltedTarget
from tiny_world import World, flat, near, tiny_world

BETA = 0.35


@pytest.fixture(scope="module")
def world() -> World:
    """No filter, so that every method is defined."""
    return tiny_world(strength=0.8)


@pytest.fixture(scope="module")
def policy(world: World) -> LanguageModel:
    return near(world.base, 0.03, seed=1)


def expected(objective: Objective, policy: LanguageModel, truth: ExactTarget, proposal: Tensor) -> Tensor:
    return flat(expected_gradient(objective, policy, truth, proposal))


def proposals(world: World, policy: LanguageModel) -> dict[str, Tensor]:
    laws = {"policy": policy, "base": world.base, "another": near(world.base, 0.03, seed=2)}
    return {name: world.logprob(model) for name, model in laws.items()}


def test_kl_control_descends_beta_times_the_reverse_kl_to_its_optimum(world: World, policy: LanguageModel) -> None:
    """2206.00761, theorem 1: reward maximization with a price on KL has a target all along, a · exp(r/β)."""
    sharper = TiltedTarget(tuple(replace(term, coefficient=term.coefficient / BETA) for term in world.target.terms))
    optimum = exact_target(world.base, sharper, world.samples)
    on_policy = world.logprob(policy)
    ours = expected(KLControl(beta=BETA, baseline="none"), policy, world.truth, on_policy)
    reverse_kl = expected(FDPG(divergence="reverse_kl"), policy, optimum, on_policy)
    assert ours.norm() > 0.1
    assert float((ours - BETA * reverse_kl).abs().max()) < 1e-10


@pytest.mark.parametrize("law", ["policy", "base", "another"])
@pytest.mark.parametrize("other", [FDPG(divergence="kl"), AlphaDPG(alpha=0.0)], ids=["f_dpg kl", "alpha_dpg 0"])
def test_it_is_gdc_plus_plus(world: World, policy: LanguageModel, other: Objective, law: str) -> None:
    proposal = proposals(world, policy)[law]
    ours = expected(GDCPlusPlus(), policy, world.truth, proposal)
    assert ours.norm() > 0.01
    assert float((expected(other, policy, world.truth, proposal) - ours).abs().max()) < 1e-12


@pytest.mark.parametrize("law", ["policy", "base", "another"])
def test_alpha_dpg_at_one_is_reverse_kl_and_near_one_nearly(world: World, policy: LanguageModel, law: str) -> None:
    proposal = proposals(world, policy)[law]
    reverse = expected(FDPG(divergence="reverse_kl"), policy, world.truth, proposal)
    assert float((expected(AlphaDPG(alpha=1.0), policy, world.truth, proposal) - reverse).abs().max()) < 1e-12
    near_one = expected(AlphaDPG(alpha=1 - 1e-7), policy, world.truth, proposal)
    assert float((near_one - reverse).abs().max()) < 1e-5 * float(reverse.norm())


def divergence(name: str, target: Tensor, law: Tensor) -> Tensor:
    """D_f(π‖p) from log p [N] and log π [N]; JS doubled, as its f has it."""
    p, pi = target.exp(), law.exp()
    if name == "kl":
        return (p * (target - law)).sum()
    if name == "reverse_kl":
        return (pi * (law - target)).sum()
    if name == "js":
        middle = torch.logaddexp(target, law) - math.log(2)
        return (p * (target - middle)).sum() + (pi * (law - middle)).sum()
    if name == "tv":
        return 0.5 * (p - pi).abs().sum()
    return ((p - pi).square() / (pi if name == "chi2" else p)).sum()


@pytest.mark.parametrize("law", ["policy", "base"])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "js", "tv", "chi2", "reverse_chi2"])
def test_f_dpg_descends_its_divergence(world: World, policy: LanguageModel, name: str, law: str) -> None:
    logprob = policy.logprob(world.samples, settings=SamplingSettings()).sum(-1)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(divergence(name, world.truth.logprob, logprob), parameters, allow_unused=True)
    truth_flat = torch.cat([g.flatten() for g in truth if g is not None])
    found = expected(FDPG(divergence=name), policy, world.truth, proposals(world, policy)[law])
    assert truth_flat.norm() > 0.01
    assert float((found - truth_flat).abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["kl", "js", "tv", "chi2"])
def test_f_dpg_reaches_a_target_with_filters(name: str) -> None:
    world = tiny_world()
    policy = near(world.base, 0.03, seed=1)
    logprob = policy.logprob(world.samples, settings=SamplingSettings()).sum(-1)
    p, pi = world.truth.logprob, logprob
    inside = p > -math.inf
    outside = pi[~inside].exp().sum()
    value = {
        "kl": lambda: divergence("kl", p[inside], pi[inside]),
        "js": lambda: divergence("js", p[inside], pi[inside]) + math.log(2) * outside,
        "tv": lambda: divergence("tv", p[inside], pi[inside]) + 0.5 * outside,
        "chi2": lambda: divergence("chi2", p[inside], pi[inside]) + outside,
    }[name]()
    truth = torch.autograd.grad(value, [q for q in policy.model.parameters() if q.requires_grad], allow_unused=True)
    truth_flat = torch.cat([g.flatten() for g in truth if g is not None])
    found = expected(FDPG(divergence=name), policy, world.truth, world.logprob(policy))
    assert truth_flat.norm() > 0.01
    assert float((found - truth_flat).abs().max()) < 1e-10


def test_alpha_dpg_with_a_filter_is_finite_and_zero_at_the_target() -> None:
    world = tiny_world()
    p = world.truth.logprob[world.truth.logprob > -math.inf]
    at_target = Record(p, p, p, p + 0.3, 0.3)
    for alpha in (0.0, 0.3, 0.999):
        assert AlphaDPG(alpha=alpha).coefficients(at_target).abs().max() < 1e-12
        outside = Record(p[:1], p[:1], p[:1], torch.tensor([-math.inf]), 0.3)
        assert AlphaDPG(alpha=alpha).coefficients(outside).item() == pytest.approx(-1 / (1 - alpha))
    far = Record(p[:1] - 900, p[:1], p[:1] - 900, p[:1] - 100, 0.0)
    assert AlphaDPG(alpha=0.5, clip=3.0).coefficients(far).item() == pytest.approx(3.0)


def pairs(world: World, policy: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """The probability of each ordered pair of completions, and the rows of the two."""
    logprob = world.logprob(policy)
    likeliest = logprob.argsort(descending=True)[:60]
    law = logprob[likeliest].exp() / logprob[likeliest].exp().sum()
    return torch.outer(law, law), likeliest, law


def mean_coefficient(objective: Any, world: World, policy: LanguageModel) -> tuple[Tensor, Tensor, Tensor]:
    """E[c_1 | x_1] of batches of two drawn from the likeliest completions: their rows, law, and that mean."""
    both, rows, law = pairs(world, policy)
    logprob = world.logprob(policy)
    mean = torch.zeros(len(rows), dtype=torch.float64)
    for i, first in enumerate(rows.tolist()):
        for j, second in enumerate(rows.tolist()):
            picked = torch.tensor([first, second])
            truth = world.truth
            record = Record(
                logprob[picked],
                truth.base_logprob[picked],
                logprob[picked],
                truth.target_logscore[picked],
                truth.log_z,
                reward=truth.reward[picked],
                prompt_index=torch.zeros(2, dtype=torch.long),
            )
            record = replace(record, advantage=objective.advantages(record))
            mean[i] += both[i, j] / law[i] * objective.coefficients(record)[0]
    return rows, law, mean


def pull(policy: LanguageModel, world: World, rows: Tensor, weights: Tensor) -> Tensor:
    return flat(weighted_gradient(policy, world.samples.select(rows), weights))


def test_a_baseline_changes_the_expected_gradient_by_rounding_alone_and_the_batch_mean_by_its_known_share(
    world: World, policy: LanguageModel
) -> None:
    found = {}
    for kind in ("none", "leave_one_out", "mean"):
        rows, law, mean = mean_coefficient(Reinforce(baseline=kind), world, policy)
        found[kind] = (law * mean, rows)
    # E[∇ log π] vanishes under the law of the listed rows only after their normalization is taken off.
    rows = found["none"][1]
    law = mean_coefficient(Reinforce(baseline="none"), world, policy)[1]
    reward = world.truth.reward[rows]
    centred = law * (reward - (law * reward).sum())
    # On average, leave-one-out takes the mean reward off, and the batch's mean half of that and half of the reward.
    assert float((found["leave_one_out"][0] - centred).abs().max()) < 1e-12
    assert float((found["mean"][0] - 0.5 * centred).abs().max()) < 1e-12
    assert float((found["none"][0] - law * reward).abs().max()) < 1e-12
    difference = pull(policy, world, rows, found["none"][0]) - pull(policy, world, rows, found["leave_one_out"][0])
    constant = pull(policy, world, rows, law * (law * reward).sum())
    assert float((difference - constant).abs().max()) < 1e-12


def test_over_all_completions_a_constant_baseline_adds_nothing(world: World, policy: LanguageModel) -> None:
    law = world.logprob(policy).exp()
    assert float(flat(weighted_gradient(policy, world.samples, 3.7 * law)).abs().max()) < 1e-12


def test_a_baseline_changes_the_variance_as_the_formula_says(world: World, policy: LanguageModel) -> None:
    """Var[(R − B) s] − Var[R s] = B² E[s²] − 2 B E[R s²] for one direction s of ∇ log π, as E[s] = 0."""
    logprob = policy.logprob(world.samples, settings=SamplingSettings()).sum(-1)
    weight = policy.model.transformer.ln_f.weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = torch.eye(len(logprob), dtype=torch.float64)
    (scores,) = torch.autograd.grad(logprob, weight, each, is_grads_batched=True)
    score = scores @ direction
    law, reward = logprob.detach().exp(), world.truth.reward
    best = float((law * reward * score.square()).sum() / (law * score.square()).sum())
    assert abs(float((law * score).sum())) < 1e-12

    def variance(b: float) -> float:
        pulls = (reward - b) * score
        return float((law * pulls.square()).sum() - (law * pulls).sum().square())

    for b in (0.3, best, 2.0):
        change = b**2 * (law * score.square()).sum() - 2 * b * (law * reward * score.square()).sum()
        assert variance(b) - variance(0.0) == pytest.approx(float(change), abs=1e-12)
    assert variance(best) < variance(0.0)


def test_rloo_with_two_samples_is_its_closed_form() -> None:
    policy, base = torch.tensor([-3.0, -5.0]).double(), torch.tensor([-4.0, -4.5]).double()
    record = Record(policy, base, policy, policy, 0.0, reward=torch.tensor([1.0, 0.25]), prompt_index=torch.zeros(2))
    objective = RLOO(beta=0.5)
    record = replace(record, advantage=objective.advantages(record))
    first, second = 1.0 - 0.5 * 1.0, 0.25 - 0.5 * -0.5
    assert objective.coefficients(record).tolist() == pytest.approx([first - second, second - first])


def token_record(world: World, policy: LanguageModel) -> tuple[Record, TokenRecord]:
    with torch.no_grad():
        pi, a = (m.logprob(world.samples, settings=SamplingSettings()) for m in (policy, world.base))
    tokens = TokenRecord(pi, a, pi, world.samples.mask)
    truth = world.truth
    record = Record(
        pi.sum(-1),
        a.sum(-1),
        pi.sum(-1),
        truth.target_logscore,
        truth.log_z,
        reward=truth.reward,
        prompt_index=torch.zeros(len(pi)),
        tokens=tokens,
    )
    return record, tokens


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_ppo_with_one_epoch_and_no_clip_is_the_policy_gradient(world: World, policy: LanguageModel, lam: float) -> None:
    """With λ = 1 of rewards to go; λ < 1 without values forgets the last token's reward on the way to the first."""
    record, _ = token_record(world, policy)
    objective = PPO(clip=None, beta=BETA, target_kl=None, lam=lam, whiten=False)
    record = replace(record, advantage=objective.advantages(record))
    law = record.policy_logprob.exp()[:, None]
    ppo = flat(weighted_gradient(policy, world.samples, -law * objective.coefficients(record)))
    plain = expected(KLControl(beta=BETA, baseline="none"), policy, world.truth, record.policy_logprob)
    assert plain.norm() > 0.1
    apart = float((ppo - plain).abs().max())
    assert apart < 1e-10 if lam == 1.0 else apart > 1e-4


def test_gae_with_true_values_and_any_lambda_is_the_policy_gradient(world: World, policy: LanguageModel) -> None:
    """A critic that knows the mean reward to go leaves the expected gradient as it is, for every λ."""
    record, tokens = token_record(world, policy)
    law = record.policy_logprob.exp()
    rewards = -BETA * (tokens.policy - tokens.base) * tokens.mask
    last = tokens.mask.sum(-1, keepdim=True) - 1
    rewards = rewards.scatter_add(1, last, world.truth.reward[:, None])
    to_go = rewards.flip(1).cumsum(1).flip(1)
    values = torch.zeros_like(to_go)
    ids = world.samples.completion_ids
    for t in range(to_go.shape[1]):
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(ids):
            if len(row) > t:
                groups.setdefault(tuple(row[:t]), []).append(i)
        for rows in groups.values():
            values[rows, t] = (law[rows] * to_go[rows, t]).sum() / law[rows].sum()
    objective = PPO(clip=None, beta=BETA, target_kl=None, lam=0.6, whiten=False)
    record = replace(record, tokens=replace(tokens, values=values))
    record = replace(record, advantage=objective.advantages(record))
    ppo = flat(weighted_gradient(policy, world.samples, -law[:, None] * objective.coefficients(record)))
    plain = expected(KLControl(beta=BETA, baseline="none"), policy, world.truth, record.policy_logprob)
    assert float((ppo - plain).abs().max()) < 1e-10
    returns = objective.returns(record)
    assert returns.shape == values.shape


def test_clipping_stops_only_what_moves_on() -> None:
    ratio = torch.tensor([[1.5, 0.5, 1.1, 0.9]]).double()
    tokens = TokenRecord(ratio.log(), ratio.log(), torch.zeros(1, 4).double(), torch.ones(1, 4).bool())
    record = Record(*(torch.zeros(1).double(),) * 4, 0.0, tokens=tokens)
    for advantage, pulls in ((1.0, [0.0, 0.5, 1.1, 0.9]), (-1.0, [-1.5, 0.0, -1.1, -0.9])):
        given = replace(record, advantage=torch.full((1, 4), advantage).double())
        assert PPO().coefficients(given)[0].tolist() == pytest.approx(pulls)
        grouped = replace(record, advantage=torch.full((1,), advantage).double())
        assert GRPO(length_normalized=False).coefficients(grouped)[0].tolist() == pytest.approx(pulls)


def test_grpo_standardizes_within_prompts_and_without_the_deviation_only_centres() -> None:
    reward = torch.tensor([1.0, 0.0, 5.0, 5.0]).double()
    record = Record(*(torch.zeros(4).double(),) * 4, 0.0, reward=reward, prompt_index=torch.tensor([0, 0, 1, 1]))
    scaled, plain = GRPO().advantages(record), GRPO(scale_rewards=False).advantages(record)
    assert plain.tolist() == [0.5, -0.5, 0.0, 0.0]
    assert scaled.tolist() == pytest.approx([0.5 / (0.5**0.5 + 1e-4), -0.5 / (0.5**0.5 + 1e-4), 0.0, 0.0])


def test_grpo_price_on_kl_is_the_gradient_of_its_estimate() -> None:
    """β (a/π − log a/π − 1) in the loss: by autograd."""
    log_pi = torch.tensor([[-1.0, -2.0]]).double().requires_grad_()
    log_a = torch.tensor([[-1.5, -0.5]]).double()
    loss = (0.3 * ((log_a - log_pi).exp() - (log_a - log_pi) - 1)).sum()
    (slope,) = torch.autograd.grad(loss, log_pi)
    tokens = TokenRecord(log_pi.detach(), log_a, log_pi.detach(), torch.ones(1, 2).bool())
    record = Record(*(torch.zeros(1).double(),) * 4, 0.0, tokens=tokens, advantage=torch.zeros(1).double())
    assert torch.allclose(GRPO(beta=0.3, length_normalized=False).coefficients(record), -slope)


def test_vargrad_of_many_samples_is_twice_the_reverse_kl_gradient(world: World, policy: LanguageModel) -> None:
    """On-policy, E[2 (f − mean f) ∇ log π] = −2 ∇ KL(π‖p): the mean goes to log Z − KL, a constant."""
    record, _ = token_record(world, policy)
    law = record.policy_logprob.exp()
    balance = world.truth.target_logscore - record.policy_logprob
    coefficient = 2 * (balance - (law * balance).sum())
    ours = flat(weighted_gradient(policy, world.samples, -law * coefficient))
    reverse = expected(FDPG(divergence="reverse_kl"), policy, world.truth, record.policy_logprob)
    assert float((ours - 2 * reverse).abs().max()) < 1e-10
    few = torch.tensor([0, 1, 2])
    part = Record(*(x[few] for x in (record.policy_logprob, record.base_logprob, record.policy_logprob)),
                  world.truth.target_logscore[few], 0.0)  # fmt: skip
    given = VarGrad().advantages(part)
    assert given.tolist() == pytest.approx((2 * (balance[few] - balance[few].mean())).tolist())


def test_brain_is_self_normalized_within_each_prompt_and_silent_without_a_hit() -> None:
    policy = torch.tensor([-900.0, -901.0, -3.0, -4.0]).double()
    score = torch.tensor([-900.0, -900.0, -math.inf, -math.inf]).double()
    record = Record(policy, policy, policy, score, 0.0, prompt_index=torch.tensor([7, 7, 2, 2]))
    e = math.e
    expected = [2 * (1 / (1 + e) - 0.5), 2 * (e / (1 + e) - 0.5), 0.0, 0.0]
    assert BUILT_IN["brain"]().advantages(record).tolist() == pytest.approx(expected)  # type: ignore[attr-defined]


def test_adaptive_beta_moves_toward_the_wanted_kl() -> None:
    policy = torch.tensor([-1.0, -2.0]).double()
    record = Record(policy, policy - 9.0, policy, policy, 0.0)
    assert KLControl(beta=0.2, target_kl=6, horizon=100).adapted(record).beta == pytest.approx(
        0.2 * (1 + 0.2 * 2 / 100)
    )
    assert KLControl(beta=0.2, target_kl=8.1, horizon=100).adapted(record).beta == pytest.approx(
        0.2 * (1 + (9 / 8.1 - 1) * 2 / 100)
    )
    assert KLControl(beta=0.2).adapted(record).beta == 0.2
