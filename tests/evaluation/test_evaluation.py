"""Evaluation on fresh samples against enumerated truth, for a policy near the base and for one that has collapsed."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tiltlm.estimation import Estimate
from tiltlm.evaluation.evaluate import Evaluation, evaluate_base, evaluate_policy
from tiltlm.exact import exact_kl, exact_moments
from tiltlm.lm import LanguageModel, Roles
from tiltlm.targets import draw_base_sample
from tiny_world import LENGTH, World, near

SAMPLES = 4000


def within_five_errors(estimate: Estimate | None, truth: float) -> bool:
    assert estimate is not None
    assert 0 < estimate.se < 0.1 * max(1.0, abs(truth))
    return abs(estimate.value - truth) < 5 * estimate.se


def collapsed(base: LanguageModel, sharper: float = 3.0) -> LanguageModel:
    """The base with its logits multiplied, so that it writes a few texts over and over."""
    policy = base.copy()
    norm = policy.model.transformer.ln_f
    with torch.no_grad():
        norm.weight *= sharper
        norm.bias *= sharper
    return policy


def evaluated(world: World, policy: LanguageModel) -> Evaluation:
    return evaluate_policy(
        Roles(policy, base=world.base), world.target, SAMPLES, max_completion_length=LENGTH, seed=5, top_p=0.9
    )


@pytest.mark.parametrize("kind", ["near", "collapsed"])
def test_every_distance_is_the_enumerated_one(world: World, kind: str) -> None:
    policy = near(world.base, 0.1) if kind == "near" else collapsed(world.base)
    result = evaluated(world, policy)
    logprob = world.logprob(policy)
    assert within_five_errors(result.kl_p_pi, world.kl(policy))
    assert within_five_errors(result.tv_p_pi, world.tv(policy))
    assert within_five_errors(result.log_z, world.truth.log_z)
    assert within_five_errors(result.kl_pi_a, exact_kl(logprob, world.truth.base_logprob))
    assert within_five_errors(result.entropy, float(-(logprob.exp() * logprob).sum()))
    under_policy = exact_moments(logprob, world.truth.features)
    for k, name in enumerate(result.moments):
        assert abs(result.moments[name].value - float(under_policy[k])) < 5 * max(result.moments[name].se, 1e-3)
        p_moment = float(world.truth.moments[k])
        assert abs(result.target_moments[name].value - p_moment) < 5 * max(result.target_moments[name].se, 1e-9)


def test_a_collapsed_policy_is_far_from_the_target(world: World) -> None:
    policy = collapsed(world.base, 20.0)
    result = evaluated(world, policy)
    assert result.tv_p_pi is not None
    assert result.kl_p_pi is not None
    assert world.tv(policy) > 0.8
    assert result.tv_p_pi.value > 0.7
    assert result.kl_p_pi.value > 5


PROMPTS = [letter * count for letter in "abcd" for count in (1, 2, 3)]


@pytest.mark.parametrize("n", [5, 18])
def test_samples_too_few_or_too_many_for_the_prompts_fall_on_any_of_them(world: World, n: int) -> None:
    """Among evaluations by many seeds, the last prompts are used as often as the first; and within one, all in turn."""
    names: Counter[str] = Counter()
    roles = Roles(world.base, base=world.base)
    for seed in range(40):
        result = evaluate_policy(
            roles, world.target, n, prompts=PROMPTS, max_completion_length=2, seed=seed, top_p=0.9, texts=n
        )
        used = Counter(row["prompt"] for row in result.texts)
        assert max(used.values()) - min([used[prompt] for prompt in PROMPTS]) == 1
        names += used
    expected = 40 * n / len(PROMPTS)
    assert set(names) == set(PROMPTS)
    assert max(abs(count - expected) for count in names.values()) < 5 * math.sqrt(40 * 0.25)


def test_as_many_samples_as_prompts_take_each_once_in_their_order(world: World) -> None:
    roles = Roles(world.base, base=world.base)
    result = evaluate_policy(roles, world.target, 12, prompts=PROMPTS, max_completion_length=2, texts=12)
    assert [row["prompt"] for row in result.texts] == PROMPTS


def test_the_base_is_evaluated_and_the_target_fitted_on_any_of_the_prompts(world: World) -> None:
    fitted = draw_base_sample(world.base, world.target.features, 5, PROMPTS, 2, seed=3)
    assert set(fitted.samples.prompt_texts) - set(PROMPTS[:5])
    many = draw_base_sample(world.base, world.target.features, 48, PROMPTS, 2, seed=3)
    names: Counter[str] = Counter()
    for seed in range(20):
        names += Counter(row["prompt"] for row in evaluate_base(many, world.target, 5, texts=5, seed=seed).texts)
    assert set(names) == set(PROMPTS)
    assert evaluate_base(many, world.target, 5, seed=1) == evaluate_base(many, world.target, 5, seed=1)
    assert evaluate_base(many, world.target, 60, seed=1).samples == 48


def test_top_p_moments_are_of_another_distribution(world: World) -> None:
    result = evaluated(world, near(world.base, 0.1))
    assert set(result.moments_top_p) == set(result.moments)
    assert result.moments_top_p["words"].value != result.moments["words"].value
