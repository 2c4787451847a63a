"""Refitting with guided texts, where few samples of the base carry the target's weight."""

from __future__ import annotations

import math

import pytest
import torch

from enumerable import tiny_model
from tiltlm.exact import enumerate_completions
from tiltlm.features import contains, measure
from tiltlm.guides.refit import needs_refit, refit
from tiltlm.lm import LanguageModel
from tiltlm.targets import FittedTarget, draw_base_sample, fit_target, target_terms

LENGTH = 5


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


def test_weights_are_unbiased_though_guides_come_from_the_same_samples(base: LanguageModel) -> None:
    """Weighted means over the mixture, averaged over many small fits, are those of the base."""
    terms = target_terms([(contains("d b"), 0.3), (contains("c a"), 0.25)])
    features = [term.feature for term in terms]
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    mass, phi = listed.sequence_logprob.double().exp(), measure(features, listed.texts).double()
    truth = torch.stack([mass @ phi[:, 0], mass @ phi[:, 1], mass @ (phi[:, 0] * phi[:, 1]), mass.sum()])
    found = []
    for seed in range(40):
        drawn = draw_base_sample(base, features, 160, None, LENGTH, seed=seed)
        if float(drawn.features.sum(0).min()) > 0:
            sample = refit(base, fit_target(terms, drawn), n=80, seed=1000 * seed).base_sample
            assert len(sample.samples) == 160 + 2 * 80
            assert sample.plain == 160
            weights, x = sample.log_ratio.exp(), sample.features.double()
            both = torch.stack([x[:, 0], x[:, 1], x[:, 0] * x[:, 1], torch.ones(len(x))])
            found.append((weights * both).mean(1))
    table = torch.stack(found)
    error = table.std(0) / math.sqrt(len(table))
    assert bool(((table.mean(0) - truth).abs() < 3.5 * error).all())


def test_a_fit_is_nearer_to_the_truth_after_refitting(base: LanguageModel) -> None:
    terms = target_terms([(contains("d b"), 0.3), (contains("c a"), 0.25)])
    features = [term.feature for term in terms]
    drawn = draw_base_sample(base, features, 160, None, LENGTH, seed=3)
    before = fit_target(terms, drawn)
    after = refit(base, before, n=400, seed=5)
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    base_logprob = listed.sequence_logprob.double()
    phi = measure(features, listed.texts).double()

    def error(target: FittedTarget) -> float:
        p = target.log_score(base_logprob, phi).softmax(0)
        return float((p @ phi - torch.tensor([0.3, 0.25])).abs().max())

    assert error(after) < error(before)
    assert after.report.ess.value > before.report.ess.value


def test_only_a_fit_whose_weight_a_few_texts_carry_needs_refitting(base: LanguageModel) -> None:
    rare, common = contains("d b"), contains("a")
    few = draw_base_sample(base, [rare], 160, None, LENGTH, seed=0)
    many = draw_base_sample(base, [common], 640, None, LENGTH, seed=0)
    assert needs_refit(fit_target(target_terms([(rare, 0.3)]), few))
    assert not needs_refit(fit_target(target_terms([(common, 0.6)]), many))
    assert not needs_refit(fit_target(target_terms([(rare, 1.0)]), few))  # filters have the rare-event estimate
