"""Exact values by enumeration: every completion is listed once, and sums over them agree with other computations."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from enumerable import TOKENS, tiny_model
from tiltlm.errors import UnreachableTargetError, UsageError
from tiltlm.exact import (
    enumerate_completions,
    exact_kl,
    exact_moments,
    exact_target,
    exact_tv,
    expected_gradient,
    kl_gradient,
    weighted_gradient,
)
from tiltlm.features import contains, length
from tiltlm.lm import SamplingSettings
from tiltlm.objectives import BUILT_IN, Objective
from tiltlm.targets import TiltedTarget
from tiltlm.targets.target import Term

TARGET = TiltedTarget(
    (
        Term(contains("a"), "filter"),
        Term(contains("b"), "moment", goal=0.5, coefficient=0.8),
        Term(length("words"), "reward", coefficient=-0.3),
    )
)


@pytest.fixture(scope="module")
def base():
    return tiny_model("gpt2", "several_eos")


@pytest.fixture(scope="module")
def policy():
    return tiny_model("gpt2", "several_eos", seed=1)


@pytest.fixture(scope="module")
def listed(base):
    return enumerate_completions(base, "a b", max_completion_length=3)


@pytest.fixture(scope="module")
def truth(base, listed):
    return exact_target(base, TARGET, listed)


@torch.no_grad()
def logprob(model, samples) -> torch.Tensor:
    return model.logprob(samples, settings=SamplingSettings()).sum(-1)


@pytest.mark.parametrize("tokens", TOKENS)
def test_every_completion_is_listed_once(tokens):
    model = tiny_model("gpt2", tokens)
    samples = enumerate_completions(model, ["a", "b a"], max_completion_length=3)
    expected = set()
    for sequence in itertools.product(range(model.vocab_size), repeat=3):
        end = next((i + 1 for i, token in enumerate(sequence) if token in model.eos_ids), 3)
        expected.add(sequence[:end])
    for prompt in (0, 1):
        found = samples.select(samples.prompt_index == prompt).completion_ids
        assert len(found) == len(expected)
        assert {tuple(ids) for ids in found} == expected
    assert samples.prompt_index.tolist() == sorted(samples.prompt_index.tolist())


def test_log_z_and_moments_are_sums_over_the_list(truth, base, listed):
    score = total = with_b = 0.0
    base_logprob = logprob(base, listed).tolist()
    for text, log_a in zip(listed.texts, base_logprob, strict=True):
        words = text.split()
        if "a" in words:
            score = math.exp(log_a + 0.8 * ("b" in words) - 0.3 * len(words))
            total += score
            with_b += score * ("b" in words)
    assert truth.log_z == pytest.approx(math.log(total), abs=1e-12)
    assert float(truth.logprob.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert truth.moments.tolist()[0] == pytest.approx(1.0, abs=1e-12)
    assert truth.moments.tolist()[1] == pytest.approx(with_b / total, abs=1e-12)


def test_divergences_have_their_known_values():
    halves, skewed = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.5, 0.25]).log()
    assert exact_kl(halves, halves) == 0
    assert exact_kl(halves, skewed) == pytest.approx(0.5 * math.log(2))
    assert exact_kl(skewed, halves) == math.inf
    assert exact_tv(halves, skewed) == pytest.approx(0.25)
    assert exact_tv(skewed, halves) == pytest.approx(0.25)


def test_the_kl_of_a_tilt_is_its_moments_times_coefficients_less_log_z(truth):
    coefficients = torch.tensor([0.0, 0.8, -0.3], dtype=torch.float64)
    expected = float(coefficients @ truth.moments) - truth.log_z
    assert exact_kl(truth.logprob, truth.base_logprob) == pytest.approx(expected, abs=1e-12)


def test_the_gradient_of_kl_is_the_slope_of_kl(truth, policy, listed):
    gradient = kl_gradient(policy, truth)
    name, step = "transformer.h.0.mlp.c_fc.weight", 1e-5
    moved = policy.copy()
    direction = torch.randn(gradient[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kls = []
    for sign in (1, -1):
        with torch.no_grad():
            moved.model.get_parameter(name).copy_(policy.model.get_parameter(name) + sign * step * direction)
        kls.append(exact_kl(truth.logprob, logprob(moved, listed)))
    assert float((gradient[name] * direction).sum()) == pytest.approx((kls[0] - kls[1]) / (2 * step), rel=1e-5)


def test_the_score_has_mean_zero_so_a_constant_weight_has_no_gradient(policy, listed):
    gradient = weighted_gradient(policy, listed, logprob(policy, listed).exp())
    assert max(float(g.abs().max()) for g in gradient.values()) < 1e-10


def test_weights_for_each_token_add_up_to_weights_for_sequences(policy, listed):
    weights = torch.linspace(-1, 1, len(listed), dtype=torch.float64)
    whole = weighted_gradient(policy, listed, weights)
    by_token = weighted_gradient(policy, listed, weights[:, None].expand(-1, 3))
    for name, gradient in whole.items():
        torch.testing.assert_close(by_token[name], gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("proposal", ["base", "policy", "another"])
@pytest.mark.parametrize("objective", ["dpg", "gdc", "gdc++"])
def test_each_objective_follows_the_gradient_of_kl_for_any_proposal(objective, proposal, truth, base, policy, listed):
    model = {"base": base, "policy": policy, "another": tiny_model("gpt2", "several_eos", seed=2)}[proposal]
    expected = kl_gradient(policy, truth)
    found = expected_gradient(BUILT_IN[objective](), policy, truth, logprob(model, listed))
    assert max(float(g.abs().max()) for g in expected.values()) > 0.01
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-10)


@dataclass(frozen=True)
class PerToken(Objective):
    """GDC with its coefficient repeated for each token."""

    name = "per token"

    def coefficients(self, record):
        return BUILT_IN["gdc"]().coefficients(record)[:, None].expand(-1, 3)


def test_an_objective_may_give_token_coefficients_and_a_proposal_may_miss_completions(truth, policy, base):
    drawn = torch.where(truth.samples.lengths != 2, truth.base_logprob, -torch.inf)
    one, other = (expected_gradient(o, policy, truth, drawn) for o in (PerToken(), BUILT_IN["gdc"]()))
    full = kl_gradient(policy, truth)
    for name in full:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-10)
    assert any(not torch.allclose(one[name], full[name], atol=1e-4) for name in full)


def test_a_wrong_log_z_scales_the_gradient_of_gdc(truth, policy, base, listed):
    doubled = expected_gradient(BUILT_IN["gdc"](), policy, truth, truth.base_logprob, log_z=truth.log_z - math.log(2))
    for name, gradient in kl_gradient(policy, truth).items():
        torch.testing.assert_close(doubled[name], 2 * gradient, rtol=0, atol=1e-10)


def test_gradients_with_an_adapter_are_for_the_adapter_only(truth, base):
    adapted = base.copy().with_lora(r=2, target_modules="all-linear")
    gradient = kl_gradient(adapted, truth)
    assert gradient
    assert all("lora" in name for name in gradient)
    assert any(bool(g.any()) for g in gradient.values())


def test_moments_skip_completions_of_probability_zero():
    assert exact_moments(torch.tensor([0.0, -math.inf]), torch.tensor([[2.0], [1e30]])).tolist() == [2.0]


def test_a_target_without_support_is_refused(base, listed):
    nothing = TiltedTarget((Term(contains("zebra"), "filter"),))
    with pytest.raises(UnreachableTargetError, match="completions"):
        exact_target(base, nothing, listed)


@pytest.mark.parametrize("length", [0, 7])
def test_a_length_that_cannot_be_listed_is_refused(base, length):
    with pytest.raises(UsageError, match=f"^max_completion_length: {length}"):
        enumerate_completions(base, max_completion_length=length)


def test_a_vocabulary_that_cannot_be_listed_is_refused(base):
    large = base.copy()
    large.model.resize_token_embeddings(9)
    with pytest.raises(UsageError, match=r"^model: .* 9 tokens"):
        enumerate_completions(large, max_completion_length=2)
