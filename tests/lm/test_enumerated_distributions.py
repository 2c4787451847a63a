"""The probabilities of all completions sum to 1 for all special tokens, prompts, positions and sampling settings."""

from __future__ import annotations

import pytest
import torch

from enumerable import FLOAT32_ONLY, PROMPTS, SETTINGS, SIZES, TOKENS, tiny_model
from tiltlm.exact import enumerate_completions
from tiltlm.lm import Samples, SamplingSettings

OTHERS = [name for name in SIZES if name not in ("gpt2", "llama")]


def totals(samples: Samples) -> torch.Tensor:
    """Σ_x p(x) for each prompt."""
    sums = torch.zeros(len(samples.prompts.texts), dtype=torch.float64)
    return sums.index_add(0, samples.prompt_index, samples.sequence_logprob.exp())


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_probabilities_sum_to_one_for_each_prompt_and_setting(architecture, tokens, prompts):
    model, length = tiny_model(architecture, tokens), 3 if prompts == "several" else 4
    for name, settings in SETTINGS.items():
        samples = enumerate_completions(model, PROMPTS[prompts], max_completion_length=length, settings=settings)
        sums = totals(samples)
        torch.testing.assert_close(
            sums, torch.ones_like(sums), rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("setting", ["plain", "all_three"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_probabilities_sum_to_one_for_other_kinds_of_positions_and_caches(architecture, setting):
    model = tiny_model(architecture, "several_eos")
    samples = enumerate_completions(model, PROMPTS["several"], max_completion_length=4, settings=SETTINGS[setting])
    sums = totals(samples)
    tolerance = 1e-5 if architecture in FLOAT32_ONLY else 1e-9
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", SIZES)
def test_padding_on_the_left_does_not_change_its_distribution(architecture):
    model = tiny_model(architecture, "pad_is_not_eos")
    together = enumerate_completions(model, PROMPTS["several"], max_completion_length=3)
    assert together.prompts.ragged
    for i, prompt in enumerate(PROMPTS["several"]):
        alone = enumerate_completions(model, prompt, max_completion_length=3)
        assert not alone.prompts.ragged
        one = together.select(together.prompt_index == i)
        # Some normalizations and softmaxes compute in float32 whatever the weights are.
        tolerance = 1e-4 if architecture in FLOAT32_ONLY else 1e-5
        torch.testing.assert_close(one.sequence_logprob, alone.sequence_logprob, rtol=0, atol=tolerance)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_tested_models_are_far_from_uniform_and_depend_on_the_whole_prefix(architecture):
    model = tiny_model(architecture, "several_eos")
    samples = enumerate_completions(model, ["a b", "b b", "b a"], max_completion_length=4)
    logprob = samples.sequence_logprob.reshape(3, -1)
    assert logprob.max(-1).values.exp().min() > 5 / logprob.shape[1]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert 0.5 * (logprob[one].exp() - logprob[other].exp()).abs().sum() > 0.1


def test_a_pad_token_of_the_vocabulary_can_be_sampled():
    model = tiny_model("gpt2", "pad_is_not_eos")
    samples = enumerate_completions(model, max_completion_length=2)
    holds_pad = ((samples.tokens == model.pad_id) & samples.mask).any(-1)
    assert holds_pad.any()
    assert 0 < samples.sequence_logprob[holds_pad].exp().sum() < 1


def reference_log_probabilities(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:
    """Log-probabilities of one vector [V] without ties, token by token from the definitions of the settings."""
    scaled = (logits / settings.temperature).tolist()
    kept = sorted(range(len(scaled)), key=lambda v: -scaled[v])
    if settings.top_k:
        kept = kept[: settings.top_k]
    mass = torch.tensor([scaled[v] for v in kept], dtype=torch.float64).softmax(0).tolist()
    nucleus, total = [], 0.0
    for v, share in zip(kept, mass, strict=True):
        if total >= settings.top_p:
            break
        nucleus.append(v)
        total += share
    result = torch.full_like(logits, -torch.inf)
    result[nucleus] = torch.tensor([scaled[v] for v in nucleus], dtype=torch.float64).log_softmax(0)
    return result


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 12, 99])
def test_settings_keep_the_tokens_that_their_definition_keeps(top_k, top_p):
    logits = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    settings = SamplingSettings(temperature=0.7, top_k=top_k, top_p=top_p)
    expected = torch.stack([reference_log_probabilities(row, settings) for row in logits])
    torch.testing.assert_close(settings.log_probabilities(logits), expected)


def test_of_equal_logits_the_lower_id_is_kept_even_if_rounding_orders_them_otherwise():
    tied = torch.tensor([[1.0, 2.0, 2.0, 2.0], [1.0, 2.0 - 1e-6, 2.0, 2.0 + 1e-6]])
    for settings in (SamplingSettings(top_k=2), SamplingSettings(top_p=0.5)):
        kept = settings.log_probabilities(tied).isfinite().tolist()
        assert kept == [[False, True, True, False]] * 2


def test_log_probabilities_are_float32_or_better():
    assert SamplingSettings().log_probabilities(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert SamplingSettings(top_p=0.5).log_probabilities(torch.zeros(2, 3, dtype=torch.float64)).dtype == torch.float64
