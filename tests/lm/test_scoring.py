"""Scoring: log-probabilities and gradients agree with a plain full softmax, for any chunks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from enumerable import PROMPTS, SETTINGS, tiny_model
from tiltlm.errors import UsageError
from tiltlm.lm import LanguageModel, Samples, SamplingSettings
from tiltlm.lm.memory import Memory, even_pieces


def naive_logprob(model: LanguageModel, samples: Samples) -> list[torch.Tensor]:
    """Log-probabilities of each row's tokens, from one unpadded pass over that row alone."""
    rows = []
    for i, completion in zip(samples.prompt_index.tolist(), samples.completion_ids, strict=True):
        prompt = samples.prompts.tokens[i][samples.prompts.mask[i]].tolist()
        logits = model.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        rows.append(samples.settings.log_probabilities(logits)[range(len(completion)), completion])
    return rows


def gradients(model: LanguageModel, total: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, list(model.model.parameters())))


@pytest.fixture(params=["gpt2", "llama"])
def model(request) -> LanguageModel:
    return tiny_model(request.param, "several_eos")


@pytest.mark.parametrize("setting", ["plain", "all_three"])
def test_logprob_and_its_gradient_equal_the_naive_computation(model, setting):
    samples = model.sample(
        12,
        PROMPTS["several"],
        0,
        max_completion_length=6,
        top_p=SETTINGS[setting].top_p,
        temperature=SETTINGS[setting].temperature,
    )
    weights = torch.randn(samples.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, naive = model.logprob(samples), naive_logprob(model, samples)
    for row, expected in zip(ours, naive, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-6)
        assert (row[len(expected) :] == 0).all()
    expected_total = sum((row * w[: len(row)]).sum() for row, w in zip(naive, weights, strict=True))
    for one, other in zip(gradients(model, (ours * weights).sum()), gradients(model, expected_total), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gpt2_equals_the_naive_computation_to_the_last_digits():
    model = tiny_model("gpt2", "pad_is_eos")
    samples = model.sample(12, PROMPTS["several"], seed=0, max_completion_length=6)
    naive = naive_logprob(model, samples)
    ours = model.logprob(samples)
    torch.testing.assert_close(ours[samples.mask], torch.cat(naive), rtol=0, atol=1e-12)
    for one, other in zip(gradients(model, ours.sum()), gradients(model, torch.cat(naive).sum()), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_chunks_change_neither_values_nor_gradients(model, monkeypatch):
    samples = model.sample(40, PROMPTS["several"], seed=1, max_completion_length=8)
    whole = model.logprob(samples, batch_size=40)
    reference = gradients(model, whole.square().sum())
    monkeypatch.setattr(
        Memory,
        "bound",
        property(lambda memory: (model.memory.logits if model.output_layer is None else model.memory.activations) * 30),
    )
    bounded = model.chunks(samples)
    assert len(bounded) > 4
    assert all(len(rows) * int(samples.lengths[rows].max()) <= 30 for rows in bounded)
    for size in (None, 1, 7, 1000):
        rows = torch.cat(model.chunks(samples, size))
        assert sorted(rows.tolist()) == list(range(40))
        logprob = model.logprob(samples, batch_size=size)
        torch.testing.assert_close(logprob, whole, rtol=0, atol=1e-6 if model.name[0] == "l" else 1e-12)
        for one, other in zip(gradients(model, logprob.square().sum()), reference, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 30, 31, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_chunks_are_as_few_as_possible_with_the_largest_as_small_as_possible(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (11,), generator=generator).sort().values.tolist()

    def largest(cuts):
        pieces = itertools.pairwise([0, *cuts, len(lengths)])
        # A row by itself may exceed the budget.
        return max(((stop - start) * lengths[stop - 1] for start, stop in pieces if stop - start > 1), default=0)

    rows = even_pieces(lengths, budget)
    assert sum(rows) == len(lengths)
    ways = [itertools.combinations(range(1, len(lengths)), k) for k in range(len(lengths))]
    fewest, least = next((k + 1, m) for k, cuts in enumerate(ways) if (m := min(map(largest, cuts))) <= budget)
    assert len(rows) == fewest
    assert largest(itertools.accumulate(rows[:-1])) == least


def test_one_row_longer_than_the_bound_is_still_scored(monkeypatch):
    monkeypatch.setattr(Memory, "bound", 1)
    model = tiny_model()
    samples = model.sample(3, seed=0, max_completion_length=5)
    assert [len(rows) for rows in model.chunks(samples)] == [1, 1, 1]
    torch.testing.assert_close(model.logprob(samples).double().sum(-1), samples.sequence_logprob)


def test_without_grad_there_is_no_gradient():
    model = tiny_model()
    samples = model.sample(3, seed=0, max_completion_length=5)
    assert model.logprob(samples).requires_grad
    with torch.no_grad():
        assert not model.logprob(samples).requires_grad
    assert not samples.proposal_logprob.requires_grad


def test_samples_are_scored_under_their_own_settings_or_others():
    model = tiny_model("gpt2", "several_eos")
    samples = model.sample(50, seed=2, max_completion_length=5, temperature=0.5, top_k=2)
    with torch.no_grad():
        own, plain = model.logprob(samples), model.logprob(samples, settings=SamplingSettings())
        torch.testing.assert_close(plain, model.logprob(replace(samples, settings=SamplingSettings())), rtol=0, atol=0)
    torch.testing.assert_close(own, samples.proposal_logprob, rtol=0, atol=1e-12)
    assert plain.sum() < own.sum() - 10
    untruncated = model.sample(50, seed=2, max_completion_length=5)
    with torch.no_grad():
        narrow = model.logprob(untruncated, settings=SamplingSettings(top_k=1)).sum(-1)
    assert narrow.isneginf().any(), "a token that the settings remove has probability zero"


def test_sampling_and_scoring_agree_on_equal_logits():
    model = tiny_model("gpt2", "several_eos", torch.float32).copy()
    with torch.no_grad():
        embedding = model.model.get_input_embeddings().weight
        embedding[[1, 3, 4]] = embedding[0].clone()
    for settings in ({"top_k": 1}, {"top_k": 2}, {"top_p": 0.3}, {"top_p": 0.6}):
        samples = model.sample(200, PROMPTS["several"], seed=3, max_completion_length=6, **settings)
        with torch.no_grad():
            torch.testing.assert_close(model.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-5)


def test_dropout_is_off():
    model = tiny_model()
    assert not model.model.training
    assert model.model.config.resid_pdrop > 0
    samples = model.sample(20, seed=0, max_completion_length=5)
    with torch.no_grad():
        assert torch.equal(model.logprob(samples), model.logprob(samples))


def test_no_samples_have_no_logprobs():
    model = tiny_model()
    none = model.sample(3, seed=0, max_completion_length=5).select(torch.tensor([], dtype=torch.long))
    assert model.logprob(none).shape == none.tokens.shape


def test_a_bad_batch_size_is_named():
    model = tiny_model()
    samples = model.sample(3, seed=0, max_completion_length=5)
    with pytest.raises(UsageError, match=r"^batch_size: 0"):
        model.logprob(samples, batch_size=0)


def test_chunk_sizes_on_a_gpu_depend_on_its_total_memory_and_not_on_free_memory(monkeypatch):
    """In the second run half of the memory is in use."""
    memory = replace(tiny_model("gpt2", "several_eos").memory, device=torch.device("cuda"))
    total = 16 * 2**30
    sizes = []
    for free in (total, total // 2):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, total))
        sizes.append((memory.rows_at_once(8), memory.bound))
    assert sizes[0] == sizes[1]
