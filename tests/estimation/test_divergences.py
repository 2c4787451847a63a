"""Divergences and moments against the enumerated truth of a small asymmetric world."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation import (
    Estimate,
    effective_sample_size,
    kl_difference,
    kl_from_target,
    kl_policy_base,
    log_importance_weights,
    log_partition,
    mean,
    moment_under_policy,
    moment_under_target,
    tv_difference,
    tv_from_target,
)

INF = math.inf
OUTCOMES, BATCH, REPEATS = 300, 2000, 250
SCALE = -90.0  # log P is known only up to this, so a forgotten log Z shows


class World:
    """Base a, target P = a·b·exp(1.2 φ)·scale, policy between them, proposal between those: 300 outcomes in float64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(11)
        normal = torch.randn(4, OUTCOMES, generator=generator, dtype=torch.float64)
        self.base = normal[0].log_softmax(0)
        self.feature = (normal[1] > 0.5).double() + 0.5 * (normal[1] < -1)
        allowed = torch.arange(OUTCOMES) % 5 > 0
        self.target = torch.where(allowed, self.base + 1.2 * self.feature + SCALE, -INF)
        self.log_z = self.target.logsumexp(0).item()
        self.p = (self.target - self.log_z).exp()
        self.policy = (self.base + 1.2 * self.feature - 0.3 * normal[2].square()).log_softmax(0)
        self.proposal = (self.base + 0.2 * self.feature - 0.4 * normal[3]).log_softmax(0)

    def kl_p(self, reference: Tensor) -> float:
        hit = self.p > 0
        return (self.p[hit] * (self.target[hit] - self.log_z - reference[hit])).sum().item()

    def tv_p(self, reference: Tensor) -> float:
        return 0.5 * (self.p - reference.exp()).abs().sum().item()


WORLD = World()
W = WORLD
KL_PI_A = (W.policy.exp() * (W.policy - W.base)).sum().item()
Case = tuple[float, Tensor, Callable[[Tensor], Estimate]]
CASES: dict[str, Case] = {
    "log_z": (W.log_z, W.proposal, lambda i: log_partition(log_importance_weights(W.target[i], W.proposal[i]))),
    "moment under p": (
        (W.p * W.feature).sum().item(),
        W.proposal,
        lambda i: moment_under_target(W.feature[i], W.target[i], W.proposal[i]),
    ),
    "moment under pi off-policy": (
        (W.policy.exp() * W.feature).sum().item(),
        W.proposal,
        lambda i: moment_under_policy(W.feature[i], W.policy[i], W.proposal[i]),
    ),
    "moment under pi on-policy": (
        (W.policy.exp() * W.feature).sum().item(),
        W.policy,
        lambda i: moment_under_policy(W.feature[i]),
    ),
    "KL(p, pi)": (
        W.kl_p(W.policy),
        W.proposal,
        lambda i: kl_from_target(W.target[i], W.proposal[i], W.policy[i]),
    ),
    "KL(p, pi) with Z": (
        W.kl_p(W.policy),
        W.proposal,
        lambda i: kl_from_target(W.target[i], W.proposal[i], W.policy[i], W.log_z),
    ),
    "KL(p, q)": (
        W.kl_p(W.proposal),
        W.proposal,
        lambda i: kl_from_target(W.target[i], W.proposal[i], W.proposal[i]),
    ),
    "KL(p, a)": (W.kl_p(W.base), W.proposal, lambda i: kl_from_target(W.target[i], W.proposal[i], W.base[i])),
    "KL(p, pi) on-policy": (
        W.kl_p(W.policy),
        W.policy,
        lambda i: kl_from_target(W.target[i], W.policy[i], W.policy[i]),
    ),
    "KL difference": (
        W.kl_p(W.proposal) - W.kl_p(W.policy),
        W.proposal,
        lambda i: kl_difference(W.target[i], W.proposal[i], W.policy[i]),
    ),
    "TV(p, pi)": (
        W.tv_p(W.policy),
        W.proposal,
        lambda i: tv_from_target(W.target[i], W.proposal[i], W.policy[i]),
    ),
    "TV(p, pi) with Z": (
        W.tv_p(W.policy),
        W.proposal,
        lambda i: tv_from_target(W.target[i], W.proposal[i], W.policy[i], W.log_z),
    ),
    "TV difference": (
        W.tv_p(W.proposal) - W.tv_p(W.policy),
        W.proposal,
        lambda i: tv_difference(W.target[i], W.proposal[i], W.policy[i]),
    ),
    "KL(pi, a) off-policy": (KL_PI_A, W.proposal, lambda i: kl_policy_base(W.policy[i], W.base[i], W.proposal[i])),
    "KL(pi, a) on-policy": (KL_PI_A, W.policy, lambda i: kl_policy_base(W.policy[i], W.base[i])),
}


def draw(logprob: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logprob.exp(), n, replacement=True, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_mean_is_the_enumerated_truth_and_the_error_is_the_standard_deviation(name):
    truth, logprob, estimate = CASES[name]
    generator = torch.Generator().manual_seed(5)
    batches = [draw(logprob, BATCH, generator) for _ in range(REPEATS)]
    sizes = [effective_sample_size(log_importance_weights(W.target[i], logprob[i])).value for i in batches[:20]]
    assert min(sizes) > 0.4 * BATCH
    estimates = [estimate(i) for i in batches]
    values = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    deviation = values.std().item()
    assert abs(values.mean().item() - truth) < 5 * deviation / math.sqrt(REPEATS)
    assert torch.tensor([e.se for e in estimates]).mean().item() == pytest.approx(deviation, rel=0.17)
    assert deviation < 0.1


def test_the_world_is_asymmetric():
    assert abs(KL_PI_A - (W.base.exp() * (W.base - W.policy)).sum().item()) > 0.015
    assert W.kl_p(W.proposal) > W.kl_p(W.policy) + 0.05
    assert abs(W.kl_p(W.base) - W.kl_p(W.proposal)) > 0.02


def test_every_outcome_once_gives_the_truth_exactly():
    uniform = torch.full((OUTCOMES,), -math.log(OUTCOMES), dtype=torch.float64)
    assert kl_from_target(W.target, uniform, W.policy).value == pytest.approx(W.kl_p(W.policy), abs=1e-12)
    assert tv_from_target(W.target, uniform, W.policy).value == pytest.approx(W.tv_p(W.policy), abs=1e-12)
    assert kl_policy_base(W.policy, W.base, uniform).value == pytest.approx(KL_PI_A, abs=1e-12)


@pytest.mark.parametrize("estimator", [kl_from_target, tv_from_target, kl_difference, tv_difference])
def test_scaling_the_target_changes_nothing(estimator):
    i = draw(W.proposal, 500, torch.Generator().manual_seed(1))
    plain = estimator(W.target[i], W.proposal[i], W.policy[i])
    scaled = estimator(W.target[i] + 37.5, W.proposal[i], W.policy[i])
    assert (scaled.value, scaled.se) == pytest.approx((plain.value, plain.se), rel=1e-9)


def test_rows_outside_the_support_contribute_zero_whatever_else_they_hold():
    score = torch.tensor([-1.0, -2.0, -INF], dtype=torch.float64)
    proposal = torch.tensor([-1.5, -1.2, -0.3], dtype=torch.float64)
    policy = torch.tensor([-1.1, -1.9, -INF], dtype=torch.float64)
    for log_z in (None, -0.5, Estimate(-0.5, 0.1)):
        value = kl_from_target(score, proposal, policy, log_z)
        assert math.isfinite(value.value)
        assert math.isfinite(value.se)
    assert math.isfinite(kl_policy_base(policy, torch.tensor([-1.0, -1.0, -INF]), proposal).value)
    weights = (score - proposal).exp()[:2]
    expected = (weights / weights.sum() * torch.tensor([5.0, 7.0])).sum().item()
    assert moment_under_target(torch.tensor([5.0, 7.0, INF]), score, proposal).value == pytest.approx(expected)


def test_a_policy_that_misses_a_hit_is_infinitely_far():
    score, proposal = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    far = kl_from_target(score, proposal, torch.tensor([-1.0, -INF]))
    assert far.value == INF
    assert math.isnan(far.se)
    assert kl_difference(score, proposal, torch.tensor([-1.0, -INF])).value == -INF


def test_nothing_hit_is_nan_and_never_a_number():
    score, logprob = torch.full((4,), -INF), torch.full((4,), -2.0)
    for estimate in (
        kl_from_target(score, logprob, logprob),
        kl_from_target(score, logprob, logprob, -1.0),
        kl_from_target(-logprob, logprob, logprob, Estimate(-INF, math.nan)),
        kl_difference(score, logprob, logprob),
        tv_from_target(score, logprob, logprob),
        moment_under_target(torch.ones(4), score, logprob),
    ):
        assert math.isnan(estimate.value)
        assert math.isnan(estimate.se)
    # With Z known, no hit is honest evidence: half of π's mass is all that TV sees.
    assert tv_from_target(score, logprob, logprob, -1.0).value == pytest.approx(0.5)


def test_a_single_row_or_hit_has_a_value_and_no_error():
    one = torch.tensor([-2.0], dtype=torch.float64)
    for estimate in (
        kl_from_target(one, one - 1, one + 0.5),
        kl_difference(one, one - 1, one + 0.5),
        tv_from_target(one, one - 1, one + 0.5),
        kl_policy_base(one, one - 0.3),
        mean(one),
    ):
        assert math.isfinite(estimate.value)
        assert math.isnan(estimate.se)
    one_hit = moment_under_target(torch.ones(3), torch.tensor([-1.0, -INF, -INF]), torch.full((3,), -1.0))
    assert one_hit.value == 1.0
    assert math.isnan(one_hit.se)


def test_the_error_of_log_z_enters():
    i = draw(W.proposal, 400, torch.Generator().manual_seed(2))
    exact = kl_from_target(W.target[i], W.proposal[i], W.policy[i], W.log_z)
    unsure = kl_from_target(W.target[i], W.proposal[i], W.policy[i], Estimate(W.log_z, 0.2))
    assert unsure.value == exact.value
    assert unsure.se == pytest.approx(math.hypot(exact.se, 0.2))
    step = 1e-5
    tv = [tv_from_target(W.target[i], W.proposal[i], W.policy[i], W.log_z + d).value for d in (-step, step)]
    slope = (tv[1] - tv[0]) / (2 * step)
    sharp = tv_from_target(W.target[i], W.proposal[i], W.policy[i], W.log_z)
    blurred = tv_from_target(W.target[i], W.proposal[i], W.policy[i], Estimate(W.log_z, 0.2))
    assert blurred.se == pytest.approx(math.hypot(sharp.se, 0.2 * slope), rel=1e-4)


def test_rao_blackwell_has_the_same_mean_and_less_variance():
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(2, 2, 6, 6, generator=generator, dtype=torch.float64)
    policy_first, base_first = logits[:, 0, 0].log_softmax(-1)
    policy_next, base_next = logits[:, 1].log_softmax(-1)
    first_kl = (policy_first.exp() * (policy_first - base_first)).sum()
    next_kl = (policy_next.exp() * (policy_next - base_next)).sum(1)
    truth = (first_kl + (policy_first.exp() * next_kl).sum()).item()
    policy = (policy_first[:, None] + policy_next).flatten()
    base = (base_first[:, None] + base_next).flatten()
    sums = (first_kl + next_kl)[:, None].expand(6, 6).flatten()
    for proposal_logprob in (policy, base):
        i = draw(proposal_logprob, 20_000, generator)
        proposal = None if proposal_logprob is policy else proposal_logprob[i]
        plain = kl_policy_base(policy[i], base[i], proposal)
        smooth = kl_policy_base(policy[i], base[i], proposal, rao_blackwell_N=sums[i])
        assert abs(plain.value - truth) < 5 * plain.se
        assert abs(smooth.value - truth) < 5 * smooth.se
        if proposal_logprob is policy:
            assert smooth.se < 0.7 * plain.se


def test_half_given_log_probabilities_are_refused():
    with pytest.raises(UsageError, match="proposal_logprob_N"):
        moment_under_policy(torch.ones(2), torch.zeros(2))
