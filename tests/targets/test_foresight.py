"""Foresight: the rate of a filter that no sample passed, against the truth of a model that can be listed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from enumerable import tiny_model
from tiltlm.errors import UsageError
from tiltlm.exact import enumerate_completions
from tiltlm.features import build_feature, length, measure
from tiltlm.lm import LanguageModel, Law
from tiltlm.targets.foresight import Chain, Foresight, foresee

LENGTH = 4
# Rare phrases of the tiny vocabulary, one alone and one beside a word that must not come.
FILTERS = {
    "phrase": [{"contains": "d b c"}],
    "phrase without a word": [{"contains": "c d"}, {"not": {"contains": "a"}}],
}


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@pytest.mark.parametrize("name", FILTERS)
def test_it_estimates_the_rate_of_what_it_has_never_seen(base: LanguageModel, name: str) -> None:
    filters = [build_feature(form) for form in FILTERS[name]]
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    passing = (measure(filters, listed.texts) > 0).all(1)
    rate = float(listed.sequence_logprob.exp()[passing].sum())
    samples = base.sample(300, seed=1, max_completion_length=LENGTH)
    samples = samples.select(~(measure(filters, samples.texts) > 0).all(1))
    found = foresee(base, filters, samples, LENGTH, n=400, seed=3)
    assert 0 < rate < 0.05
    assert found.hits > 20 * rate * 400
    assert abs(found.log_z.value - math.log(rate)) < 4 * found.log_z.se
    assert found.log_z.se < 0.2


def test_a_chain_that_saw_every_prefix_promises_what_its_states_promise(base: LanguageModel) -> None:
    """With all completions by their probability ψ of the start is the rate, up to what the states do not tell."""
    filters = [build_feature({"contains": "d"})]
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    rate = float(listed.sequence_logprob.exp()[measure(filters, listed.texts)[:, 0] > 0].sum())
    many = base.sample(3000, seed=2, max_completion_length=LENGTH)
    chain = Chain.of(base, filters)
    chain.learn(base, many)
    guide = chain.guide(LENGTH)
    assert float(guide.log_twist[0, 0].exp()) == pytest.approx(rate, rel=0.1)
    law = replace(listed, guide=guide, law=Law())
    with torch.no_grad():
        assert float(base.logprob(law).sum(-1).exp().sum()) == pytest.approx(1, abs=1e-6)


def test_prefixes_of_guided_samples_are_weighed_back_to_the_base(base: LanguageModel) -> None:
    """Learning from guided samples, weighed, gives the mean laws of the base in each state."""
    filters = [build_feature({"contains": "d b"})]
    plain, guided = Chain.of(base, filters), Chain.of(base, filters)
    samples = base.sample(4000, seed=4, max_completion_length=LENGTH)
    plain.learn(base, samples)
    drawn = base.sample(4000, seed=5, max_completion_length=LENGTH, guide=base.placed(plain.guide(LENGTH)))
    with torch.no_grad():
        log_ratio = (base.logprob(drawn, law=Law()) - drawn.proposal_logprob).double()
    guided.learn(base, drawn, log_ratio.cumsum(-1) - log_ratio)
    often = plain.visits > 300
    assert int(often.sum()) >= 2
    laws = [(chain.mean_law / chain.visits.clamp_min(1e-9)[:, None])[often] for chain in (plain, guided)]
    assert float((laws[0] - laws[1]).abs().max()) < 0.05
    assert torch.allclose(plain.visits[often] / 4000, guided.visits[often] / 4000, rtol=0.25)


def test_its_advice_says_how_many_samples_or_that_none_would_do(base: LanguageModel) -> None:
    samples = base.sample(100, seed=0, max_completion_length=LENGTH)
    guide = Chain.of(base, [build_feature({"contains": "d"})]).guide(LENGTH)
    even = torch.full((100,), math.log(1e-4), dtype=torch.float64)
    assert "a rate of 0.0001 (± 0 %): about 300,000 samples" in Foresight(guide, samples, even).advice()
    uneven = torch.full((100,), -math.inf, dtype=torch.float64)
    assert "0 of 100 texts pass" in Foresight(guide, samples, uneven).advice()
    uneven[3] = -20.0
    assert "(ESS 1.0): the base hardly ever writes it" in Foresight(guide, samples, uneven).advice()


def test_what_cannot_be_read_off_a_prefix_is_refused(base: LanguageModel) -> None:
    samples = base.sample(20, seed=0, max_completion_length=LENGTH)
    with pytest.raises(UsageError, match="cannot"):
        foresee(base, [length("characters")], samples, LENGTH)
