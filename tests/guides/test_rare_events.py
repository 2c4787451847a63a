"""Rare-event estimate: the pass rate of a filter that no sample passed, and a sample to fit on, against enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from enumerable import tiny_model
from tiltlm.errors import UsageError
from tiltlm.estimation import Estimate
from tiltlm.exact import enumerate_completions, exact_target
from tiltlm.features import Feature, build_feature, contains, length, measure
from tiltlm.guides import estimate_values
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.rare_events import RareEventEstimate, estimate_rare_event, rare_filters
from tiltlm.guides.token_states import build_token_states
from tiltlm.guides.value import build_guide
from tiltlm.lm import LanguageModel, SamplingSettings
from tiltlm.targets import BaseSample, draw_base_sample, fit_target, target_terms
from tiltlm.training.checkpoint import load_base_sample, save_base_sample

LENGTH = 4
# Rare phrases of the tiny vocabulary, one alone and one with a forbidden word.
FILTERS = {
    "phrase": [{"contains": "d b c"}],
    "phrase without a word": [{"contains": "c d"}, {"not": {"contains": "a"}}],
}


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


def without_hits(base: LanguageModel, features: list[Feature], n: int, seed: int) -> BaseSample:
    """Samples of the base without those that pass all features."""
    samples = base.sample(n, seed=seed, max_completion_length=LENGTH)
    samples = samples.select(~(measure(features, samples.texts) > 0).all(1))
    return BaseSample(samples, measure(features, samples.texts), LENGTH)


@pytest.mark.parametrize("name", FILTERS)
def test_it_estimates_a_pass_rate_without_a_passing_sample(base: LanguageModel, name: str) -> None:
    filters = [build_feature(form) for form in FILTERS[name]]
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    passing = (measure(filters, listed.texts) > 0).all(1)
    rate = float(listed.sequence_logprob.exp()[passing].sum())
    found = estimate_rare_event(base, filters, filters, without_hits(base, filters, 300, 1), n=400, seed=3)
    assert 0 < rate < 0.05
    assert found.hits > 20 * rate * 400
    assert abs(found.log_z.value - math.log(rate)) < 4 * found.log_z.se
    assert found.log_z.se < 0.2
    assert found.reliable


def test_a_target_fitted_on_guided_texts_is_right(base: LanguageModel, tmp_path: Path) -> None:
    """A rare filter and a moment under it: log Z, λ and E_p against enumeration."""
    terms = target_terms([(contains("d b"), 1.0), (contains("a"), 0.6)])
    features = [term.feature for term in terms]
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    few = draw_base_sample(base, features, 300, None, LENGTH, seed=1)
    assert rare_filters(terms, few) == features[:1]
    found = estimate_rare_event(base, features[:1], features, few, n=800, seed=5)
    sample = found.base_sample
    assert len(sample.samples) == len(sample.features) == 300 + 3 * 800
    fitted = fit_target(terms, sample)
    truth = exact_target(base, fitted, listed)
    assert abs(fitted.report.log_z.value - truth.log_z) < 4 * fitted.report.log_z.se < 0.4
    share = float(truth.logprob.exp() @ truth.features[:, 1])
    assert share == pytest.approx(0.6, abs=0.04)
    kl = float((truth.logprob.exp() * (truth.logprob - truth.base_logprob)).nan_to_num(0.0).sum())
    assert abs(fitted.report.kl_p_a.value - kl) < 4 * fitted.report.kl_p_a.se
    # The base's rate is estimated from all samples, each with its weight.
    rate = float(listed.sequence_logprob.exp() @ measure(features, listed.texts)[:, 0])
    assert abs(fitted.report.terms[0].base.value - rate) < 4 * fitted.report.terms[0].base.se
    own = sample.of_the_base()
    assert own.base_logprob is None
    assert torch.equal(own.samples.tokens, few.samples.tokens)
    torch.testing.assert_close(own.samples.proposal_logprob, few.samples.proposal_logprob, rtol=0, atol=1e-5)
    # A guide from these samples is nearer to the target than the base.
    values = estimate_values(base, fitted, sample)
    assert values.states.values is not None
    guide = values.guide(sample.log_weights(fitted), sample.log_ratio, fitted.log_tilt(values.states.values))
    with torch.no_grad():
        logprob = base.logprob(replace(listed, guide=guide, settings=SamplingSettings())).sum(-1)
    assert float((truth.logprob.exp() * (truth.logprob - logprob)).nan_to_num(0.0).sum()) < 0.3 * kl
    # A checkpoint keeps the sample.
    save_base_sample(tmp_path, sample)
    again = load_base_sample(tmp_path, base)
    assert again is not None
    assert torch.equal(again.log_weights(fitted), sample.log_weights(fitted))
    assert (again.plain, again.forward_passes) == (sample.plain, sample.forward_passes)


def test_weights_of_the_mixture_have_mean_one_and_a_bound(base: LanguageModel) -> None:
    filters = [build_feature({"contains": "d b c"})]
    sample = estimate_rare_event(base, filters, filters, without_hits(base, filters, 300, 1), n=300, seed=2).base_sample
    ratio = sample.log_ratio.exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=5 * float(ratio.std()) / len(ratio) ** 0.5)
    # One over the base's mixture weight bounds a/m.
    assert float(ratio.max()) <= len(ratio) / (sample.plain or 0) + 1e-9


def test_only_filters_that_few_samples_pass_are_rare(base: LanguageModel) -> None:
    for feature, rare in ((contains("a"), False), (contains("d b c"), True)):
        terms = target_terms([(feature, 1.0)])
        sample = draw_base_sample(base, [feature], 1000, None, LENGTH, seed=1)
        assert rare_filters(terms, sample) == ([feature] if rare else [])
    terms = target_terms([(contains("d b c"), 0.5)])
    assert rare_filters(terms, draw_base_sample(base, [terms[0].feature], 200, None, LENGTH)) == []


def test_with_many_prefixes_the_value_of_the_start_is_the_rate(base: LanguageModel) -> None:
    """And the guided base is normalized."""
    filters = [build_feature({"contains": "d"})]
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    rate = float(listed.sequence_logprob.exp()[measure(filters, listed.texts)[:, 0] > 0].sum())
    many = base.sample(3000, seed=2, max_completion_length=LENGTH)
    states = build_token_states(base, filters, many)
    chain = MarkovChain.empty(states, LENGTH)
    chain.add_samples(base, many)
    values = chain.values(states.passing())
    assert float(values[0, states.start]) == pytest.approx(rate, rel=0.1)
    guided = replace(listed, guide=build_guide(states, values, states.passing()), settings=SamplingSettings())
    with torch.no_grad():
        assert float(base.logprob(guided).sum(-1).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_weighted_prefixes_of_guided_samples_give_the_chain_of_the_base(base: LanguageModel) -> None:
    """Edge probabilities from guided samples, with weights, agree with those from samples of the base."""
    filters = [build_feature({"contains": "d b"})]
    samples = base.sample(4000, seed=4, max_completion_length=LENGTH)
    states = build_token_states(base, filters, samples)
    plain, guided = MarkovChain.empty(states, LENGTH), MarkovChain.empty(states, LENGTH)
    plain.add_samples(base, samples)
    guide = base.placed(build_guide(states, plain.values(states.passing()), states.passing()))
    drawn = base.sample(4000, seed=5, max_completion_length=LENGTH, guide=guide)
    with torch.no_grad():
        log_ratio = (base.logprob(drawn, settings=SamplingSettings()) - drawn.proposal_logprob).double()
    guided.add_samples(base, drawn, log_ratio.cumsum(-1) - log_ratio)
    often = (plain.visits > 300) & (guided.visits > 300)
    assert int(often.sum()) >= 2
    rows, seen = often.any(0), [chain._edge_sums() for chain in (plain, guided)]
    edges = [(one.mass / one.per_edge(one.weight).clamp_min(1e-9))[one.per_edge(rows)] for one in seen]
    assert float((edges[0] - edges[1]).abs().max()) < 0.06
    assert torch.allclose(plain.weight[often], guided.weight[often], rtol=0.25)


def test_advice_gives_the_number_of_samples_or_says_that_the_estimate_is_unreliable(base: LanguageModel) -> None:
    feature = contains("d")
    sample = draw_base_sample(base, [feature], 100, None, LENGTH, seed=0)
    guide = build_token_states(base, [feature], sample.samples).guide(torch.zeros(1, 2))
    even = torch.full((100,), math.log(1e-4), dtype=torch.float64)
    found = RareEventEstimate(guide, sample.samples, even, sample, Estimate(math.log(1e-4), 0.0))
    assert "a rate of 0.0001 (± 0 %): about 300,000 samples" in found.advice()
    uneven = torch.full((100,), -math.inf, dtype=torch.float64)
    assert "0 of 100 texts pass" in replace(found, log_weights=uneven).advice()
    uneven[3] = -20.0
    assert "(ESS 1.0): the base hardly ever writes such a text" in replace(found, log_weights=uneven).advice()
    assert not replace(found, log_weights=uneven).reliable


def test_filters_without_an_automaton_are_refused(base: LanguageModel) -> None:
    sample = draw_base_sample(base, [length("characters")], 20, None, LENGTH, seed=0)
    with pytest.raises(UsageError, match="cannot"):
        estimate_rare_event(base, [length("characters")], [length("characters")], sample)


def test_a_word_that_no_tokens_form_has_no_hits(base: LanguageModel) -> None:
    """All values are 0, so the guide is constant."""
    feature = contains("zebra")
    found = estimate_rare_event(
        base, [feature], [feature], draw_base_sample(base, [feature], 100, None, LENGTH, seed=1), n=50
    )
    assert (found.hits, found.reliable, found.log_z.value) == (0, False, -math.inf)
    assert "0 of 50 texts pass" in found.advice()
