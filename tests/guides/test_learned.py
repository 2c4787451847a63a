"""Learned states: they guide toward features without an automaton, and noise gives none."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from enumerable import tiny_model
from tiltlm.exact import ExactTarget, enumerate_completions, exact_kl, exact_target
from tiltlm.features import Feature, callable_feature, contains, length, regex
from tiltlm.guides import estimate_values
from tiltlm.guides.learned import LEVELS
from tiltlm.lm import Guide, LanguageModel, SamplingSettings
from tiltlm.targets import BaseSample, Term, TiltedTarget, draw_base_sample, measure_samples

LENGTH = 5
MANY = 8_000


def lead_of_a(texts: list[str]) -> list[float]:
    return [float(text.count("a") - text.count("c")) for text in texts]


TARGETS: dict[str, TiltedTarget] = {
    "filter": TiltedTarget((Term(regex("c"), "filter"),)),
    "without": TiltedTarget((Term(callable_feature(lambda texts: [float("a" not in t) for t in texts]), "filter"),)),
    "moment": TiltedTarget((Term(regex("d"), "moment", 0.8, 2.5),)),
    "reward": TiltedTarget((Term(callable_feature(lead_of_a), "reward", coefficient=0.9),)),
    "characters": TiltedTarget((Term(length("characters"), "reward", coefficient=0.3),)),
    "two": TiltedTarget((Term(regex("c"), "moment", 0.5, 1.5), Term(callable_feature(lead_of_a), "reward", None, 0.7))),
    "mixed": TiltedTarget((Term(contains("a"), "filter"), Term(regex("d"), "moment", 0.8, 2.5))),
}


@cache
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@cache
def drawn(name: str, n: int = MANY) -> BaseSample:
    return draw_base_sample(base(), TARGETS[name].features, n, None, LENGTH, seed=3)


@cache
def truth(name: str) -> ExactTarget:
    return exact_target(base(), TARGETS[name], enumerate_completions(base(), max_completion_length=LENGTH))


@cache
def guide(name: str, n: int = MANY) -> Guide:
    target, sample = TARGETS[name], drawn(name, n)
    return estimate_values(base(), target, sample).guide(target.log_tilt(sample.features))


@torch.no_grad()
def guided(name: str, with_guide: Guide) -> Tensor:
    """log g [N] of every completion."""
    return base().logprob(replace(truth(name).samples, guide=with_guide, settings=SamplingSettings())).sum(-1)


def ess_share(name: str, logprob: Tensor) -> float:
    """The exact ESS/N of weights P/q."""
    p = truth(name).logprob
    return 1 / float(torch.where(p.isfinite(), 2 * p - logprob, -math.inf).exp().sum())


@pytest.mark.parametrize("name", TARGETS)
def test_the_guided_base_is_nearer_and_its_weights_are_more_even(name: str) -> None:
    known = truth(name)
    own = guided(name, guide(name))
    before, after = exact_kl(known.logprob, known.base_logprob), exact_kl(known.logprob, own)
    assert before > 0.05
    assert 0 <= after < 0.7 * before
    assert ess_share(name, own) > ess_share(name, known.base_logprob) + 0.04


@pytest.mark.parametrize("name", ["filter", "without"])
def test_far_more_texts_pass_a_filter_without_an_automaton(name: str) -> None:
    hits = truth(name).features[:, 0] > 0
    by_base, by_guide = (
        float(logprob.exp()[hits].sum()) for logprob in (truth(name).base_logprob, guided(name, guide(name)))
    )
    assert 1 - by_guide < 0.6 * (1 - by_base)
    samples = base().sample(500, seed=0, max_completion_length=LENGTH, guide=guide(name))
    assert float(TARGETS[name].features[0](samples.texts).mean()) == pytest.approx(by_guide, abs=0.05)


def test_learned_states_add_to_the_automaton() -> None:
    """For a word and a regular expression, the guide is nearer than with the automaton of the word alone."""
    known, sample = truth("mixed"), drawn("mixed")
    word_only = TiltedTarget(TARGETS["mixed"].terms[:1])
    states = estimate_values(base(), word_only, BaseSample(sample.samples, sample.features[:, :1], LENGTH))
    automaton_only = guided("mixed", states.guide(TARGETS["mixed"].log_tilt(sample.features)))
    own = guided("mixed", guide("mixed"))
    assert exact_kl(known.logprob, own) < 0.7 * exact_kl(known.logprob, automaton_only)
    assert float(own.exp()[known.features[:, 0] > 0].sum()) > 0.95


@pytest.mark.parametrize("n", [60, 200, 1000])
def test_with_few_samples_the_guide_is_not_farther_than_the_base(n: int) -> None:
    for name in ("filter", "reward"):
        known = truth(name)
        assert exact_kl(known.logprob, guided(name, guide(name, n))) < exact_kl(known.logprob, known.base_logprob)


def noise(n: int, seed: int, filtered: bool) -> tuple[TiltedTarget, BaseSample]:
    """Values independent of the texts."""
    feature: Feature = regex("x").renamed("noise") if filtered else callable_feature(lead_of_a)
    target = TiltedTarget((Term(feature, "filter") if filtered else Term(feature, "reward", None, 1.0),))
    samples = drawn("filter", n).samples
    values = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return target, BaseSample(samples, (values < 0.05).double() if filtered else 2 * values, LENGTH)


@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("n", [100, 1000])
def test_noise_gives_no_learned_states(n: int, filtered: bool) -> None:
    learned = [estimate_values(base(), *noise(n, seed, filtered)).learned for seed in range(20)]
    assert sum(states is not None for states in learned) <= 2


def test_both_halves_need_a_passing_text() -> None:
    target, sample = noise(100, 0, True)
    one = torch.zeros_like(sample.features)
    one[7] = 1
    values_of_states = estimate_values(base(), target, replace(sample, features=one))
    assert len(values_of_states.states.transitions) == 1
    assert values_of_states.learned is None
    assert bool(torch.isfinite(values_of_states.guide(target.log_tilt(one)).log_value_table).all())


@pytest.mark.parametrize("name", ["reward", "mixed"])
def test_with_few_states_the_guided_base_is_still_normalized(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    many = guide(name)  # before the limit changes: it is cached for other tests
    monkeypatch.setattr("tiltlm.guides.estimate.MAX_STATES", 3)
    target, sample = TARGETS[name], drawn(name)
    few = estimate_values(base(), target, sample).guide(target.log_tilt(sample.features))
    assert len(few.transitions) < len(many.transitions)
    logprob = guided(name, few)
    assert float(logprob.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert exact_kl(truth(name).logprob, logprob) < exact_kl(truth(name).logprob, truth(name).base_logprob)


def test_the_same_samples_give_the_same_states() -> None:
    target, sample = TARGETS["reward"], drawn("reward")
    again = estimate_values(base(), target, sample).guide(target.log_tilt(sample.features))
    assert torch.equal(again.transitions[:], guide("reward").transitions[:])
    assert torch.equal(again.log_value_table, guide("reward").log_value_table)
    assert 2 < len(again.transitions) <= LEVELS + 2


def test_features_with_automata_need_no_learned_states() -> None:
    word = TiltedTarget((Term(contains("c"), "filter"),))
    sample = draw_base_sample(base(), word.features, 500, None, LENGTH, seed=3)
    assert estimate_values(base(), word, sample).learned is None


def test_a_stronger_tilt_spreads_the_values_of_levels() -> None:
    sample, values = drawn("reward"), drawn("reward").features[:, 0]
    values_of_states = estimate_values(base(), TARGETS["reward"], sample)
    spread = [
        float(values_of_states.guide(strength * values).log_value_table[1].std()) for strength in (0.0, 0.4, 0.9, 1.4)
    ]
    assert spread[0] < 0.1 * spread[2]
    assert spread == sorted(spread)


def test_samples_of_another_distribution_count_by_their_weights() -> None:
    target, known = TARGETS["reward"], truth("reward")
    mixed = base().sample(MANY, seed=5, max_completion_length=LENGTH, guide=guide("reward"))
    with torch.no_grad():
        base_logprob = base().logprob(replace(mixed, guide=None), settings=SamplingSettings())
    sample = BaseSample(mixed, measure_samples(target.features, mixed), LENGTH, base_logprob)
    own = estimate_values(base(), target, sample).guide(sample.log_weights(target), sample.log_ratio)
    assert exact_kl(known.logprob, guided("reward", own)) < 0.4 * exact_kl(known.logprob, known.base_logprob)
