"""Guided sampling: for any guide probabilities sum to 1, and sampling and scoring use the same distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_sampling import as_arguments, chi_squared

from enumerable import PROMPTS, SETTINGS, TOKENS, random_guide, tiny_model
from tiltlm.exact import enumerate_completions
from tiltlm.lm import Guide, LanguageModel, Samples, SamplingSettings, next_token, sampling

LENGTH = 4


@torch.no_grad()
def guided(model: LanguageModel, guide: Guide, prompts=None, settings: SamplingSettings | None = None) -> Samples:
    """Every completion of every prompt with its log-probabilities under the guided distribution."""
    listed = enumerate_completions(model, prompts, max_completion_length=LENGTH, settings=settings)
    listed = replace(listed, guide=guide)
    return replace(listed, proposal_logprob=model.logprob(listed))


@torch.no_grad()
def by_hand(model: LanguageModel, guide: Guide, ids: list[int], prompt: list[int]) -> float:
    """log g of one completion, token by token, from the definition."""
    total, state = 0.0, guide.start
    for t, token in enumerate(ids):
        logits = model.model(torch.tensor([prompt + ids[:t]])).logits[0, -1]
        weights = (
            logits.softmax(-1) * torch.stack([guide.log_value_table[t + 1, s] for s in guide.transitions[state]]).exp()
        )
        total += float((weights[token] / weights.sum()).log())
        state = int(guide.transitions[state, token])
    return total


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_guided_probabilities_of_every_prompt_sum_to_one(tokens, setting):
    model = tiny_model("gpt2", tokens)
    truth = guided(model, random_guide(model), PROMPTS["several"], SETTINGS[setting])
    plain = enumerate_completions(model, PROMPTS["several"], max_completion_length=LENGTH, settings=SETTINGS[setting])
    mass = torch.zeros(4, dtype=torch.float64).index_add_(0, truth.prompt_index, truth.sequence_logprob.exp())
    assert float((mass - 1).abs().max()) < 1e-9
    assert float((truth.sequence_logprob.exp() - plain.sequence_logprob.exp()).abs().sum()) > 0.1


@pytest.mark.parametrize("tokens", ["several_eos", "no_bos"])
def test_guided_probabilities_agree_with_their_definition(tokens):
    model = tiny_model("gpt2", tokens)
    guide = random_guide(model)
    truth = guided(model, guide, "a b")
    prompt = truth.prompts.tokens[0].tolist()
    for row in range(0, len(truth), len(truth) // 60):
        expected = by_hand(model, guide, truth.completion_ids[row], prompt)
        assert float(truth.sequence_logprob[row]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_sampled_logprobs_equal_rescored_ones(architecture, tokens):
    model = tiny_model(architecture, tokens)
    guide, changes = random_guide(model, states=5, rows=9), 0.0
    for prompts in PROMPTS.values():
        for settings in SETTINGS.values():
            samples = model.sample(60, prompts, 1, max_completion_length=8, guide=guide, **as_arguments(settings))
            assert samples.guide is not None
            with torch.no_grad():
                rescored, unguided = model.logprob(samples), model.logprob(samples, settings=settings)
            torch.testing.assert_close(samples.proposal_logprob, rescored, rtol=0, atol=1e-12)
            changes = max(changes, float((unguided - rescored).abs().max()))
    assert changes > 0.1


@pytest.mark.parametrize("prompts", ["none", "several"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_follow_the_enumerated_guided_distribution(setting, prompts):
    model = tiny_model("gpt2", "several_eos")
    guide = random_guide(model)
    samples = model.sample(
        4000, PROMPTS[prompts], 4, max_completion_length=LENGTH, guide=guide, **as_arguments(SETTINGS[setting])
    )
    assert chi_squared(samples, guided(model, guide, PROMPTS[prompts], SETTINGS[setting])) > 1e-4


def test_frequencies_reject_another_guide():
    model = tiny_model("gpt2", "several_eos")
    guide = random_guide(model)
    samples = model.sample(4000, seed=4, max_completion_length=LENGTH, guide=guide)
    little = replace(guide, log_value_table=guide.log_value_table + 0.3 * random_guide(model, seed=1).log_value_table)
    for other in (little, replace(guide, start=2), replace(guide, log_value_table=guide.log_value_table.roll(1, 0))):
        assert chi_squared(samples, guided(model, other)) < 1e-6


@pytest.mark.parametrize("prompts", ["none", "several"])
def test_the_distribution_is_the_same_with_compaction_at_every_step_and_without(monkeypatch, prompts):
    model = tiny_model("llama", "pad_is_eos")
    guide = random_guide(model, states=4)
    truth = guided(model, guide, PROMPTS[prompts])
    assert float(truth.sequence_logprob.exp()[truth.lengths < LENGTH].sum()) > 0.5 * len(truth.prompts.texts)
    for share in (0.0, 2.0):
        monkeypatch.setattr(sampling, "COMPACT_BELOW", share)
        samples = model.sample(3000, PROMPTS[prompts], 7, max_completion_length=LENGTH, guide=guide)
        assert chi_squared(samples, truth) > 1e-4
        with torch.no_grad():
            torch.testing.assert_close(samples.proposal_logprob, model.logprob(samples), rtol=0, atol=1e-12)


def test_logit_bias_is_the_same_with_more_states_than_rows_and_with_fewer():
    """log ψ is looked up by row or by state, with the same result."""
    model = tiny_model("gpt2", "several_eos")
    guide = random_guide(model, states=7)
    for t in range(LENGTH + 3):
        few, many = torch.tensor([6, 0, 3]), torch.tensor([6, 0, 3] * 3)
        torch.testing.assert_close(guide.logit_bias(few, t).repeat(3, 1), guide.logit_bias(many, t), rtol=0, atol=0)
        after = guide.log_value_table[min(t + 1, LENGTH)]
        expected = [[float(after[s]) for s in guide.transitions[row]] for row in few.tolist()]
        assert guide.logit_bias(few, t).tolist() == expected
    one, all_rows = guided(model, guide, PROMPTS["several"]), []
    for row in range(0, len(one), 97):
        alone = one.select(torch.tensor([row]))
        with torch.no_grad():
            all_rows.append(float((model.logprob(alone) - alone.proposal_logprob).abs().max()))
    assert max(all_rows) < 1e-12


@pytest.mark.parametrize("constant", [0.0, -37.5])
def test_a_constant_value_changes_nothing(constant):
    model = tiny_model("gpt2", "several_eos")
    guide = random_guide(model)
    # A constant for each number of tokens read, the same for open and ended states.
    flat = replace(
        guide, log_value_table=constant + torch.arange(LENGTH + 1.0)[:, None].expand_as(guide.log_value_table)
    )
    plain = enumerate_completions(model, PROMPTS["several"], max_completion_length=LENGTH)
    torch.testing.assert_close(guided(model, flat, PROMPTS["several"]).proposal_logprob, plain.proposal_logprob)
    one, other = (model.sample(200, PROMPTS["several"], 3, max_completion_length=LENGTH, guide=g) for g in (flat, None))
    assert one.completion_ids == other.completion_ids
    torch.testing.assert_close(one.proposal_logprob, other.proposal_logprob)


def test_tokens_of_value_zero_are_never_drawn():
    model = tiny_model("gpt2", "pad_is_eos")
    transitions = torch.zeros(1, 5, dtype=torch.long)
    transitions[:, model.eos_ids] = 1
    # EOS has value 0, so every text has full length.
    log_values = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64).expand(LENGTH + 1, 2)
    samples = model.sample(300, seed=0, max_completion_length=LENGTH, guide=Guide(transitions, log_values))
    assert samples.lengths.tolist() == [LENGTH] * 300
    assert bool(torch.isfinite(samples.proposal_logprob).all())


def test_states_precede_each_token_and_stay_after_the_end():
    model = tiny_model("gpt2", "pad_is_eos")
    guide = random_guide(model, states=3)
    tokens = torch.tensor([[1, 2, 3, 4], [4, 0, 2, 1], [0, 0, 0, 0]])
    states = guide.states(tokens)
    assert states.shape == tokens.shape
    for row, before in zip(tokens.tolist(), states.tolist(), strict=True):
        state = guide.start
        for token, found in zip(row, before, strict=True):
            assert found == state
            if state < 3:
                state = int(guide.transitions[state, token])
    assert states[1, 2:].min() >= 3
    assert states[2].tolist() == [1, 4, 4, 4]


def test_other_settings_are_scored_without_the_guide_and_next_token_with_a_given_one():
    model = tiny_model("gpt2", "several_eos")
    guide = random_guide(model)
    samples = model.sample(50, PROMPTS["several"], 5, max_completion_length=LENGTH, guide=guide)
    with torch.no_grad():
        own, other = model.logprob(samples), model.logprob(samples, settings=SamplingSettings())
        plain = model.logprob(replace(samples, guide=None))
        forward = model.read(samples)
        both = next_token(samples, forward, forward, guide)
        base_logprobs = forward.logits(slice(None)).log_softmax(-1)
    assert both.guide is not None
    torch.testing.assert_close(both.guide, own, rtol=0, atol=1e-12)
    torch.testing.assert_close(other, plain, rtol=0, atol=0)
    states = guide.states(samples.tokens)
    for logprobs, row, t in zip(base_logprobs, samples.flat_rows.tolist(), samples.flat_columns.tolist(), strict=True):
        weights = guide.logit_bias(states[row, t][None], t)[0]
        token = samples.tokens[row, t]
        assert float(own[row, t]) == pytest.approx(float((logprobs + weights).log_softmax(-1)[token]), abs=1e-12)


def test_gradients_of_a_guided_distribution_reach_the_model_and_not_the_guide():
    """Σ g ∇ log g = 0 over all completions; over some it is not 0."""
    model = tiny_model("gpt2", "several_eos").copy()
    truth = guided(model, random_guide(model), "a b")
    logprob = model.logprob(truth).sum(-1)
    mass = truth.sequence_logprob.exp()
    weight = model.model.get_parameter("transformer.h.0.mlp.c_fc.weight")
    zero = torch.autograd.grad((mass * logprob).sum(), weight, retain_graph=True)[0]
    some = torch.autograd.grad((mass * logprob)[:20].sum(), weight)[0]
    assert float(zero.abs().max()) < 1e-10 < 1e-3 < float(some.abs().max())


def test_selected_trimmed_and_joined_samples_keep_their_guide():
    model = tiny_model("gpt2", "several_eos")
    samples = model.sample(30, "a", 6, max_completion_length=LENGTH, guide=random_guide(model), batch_size=7)
    short = samples.select(samples.lengths < LENGTH).trimmed()
    assert short.tokens.shape[1] < LENGTH
    for part in (short, Samples.concatenate([short, samples])):
        with torch.no_grad():
            torch.testing.assert_close(model.logprob(part), part.proposal_logprob, rtol=0, atol=1e-12)
