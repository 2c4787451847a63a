"""Sampling: each token comes with the log-probability it was drawn with, and frequencies agree with it."""

from __future__ import annotations

import functools
import math
from collections import Counter

import pytest
import scipy.stats
import torch

from enumerable import FLOAT32_ONLY, POSITIONS, PROMPTS, SETTINGS, SIZES, TOKENS, tiny_model
from tiltlm.errors import NumericalError, UsageError
from tiltlm.exact import enumerate_completions
from tiltlm.lm import Samples, SamplingSettings, sampling


def as_arguments(settings: SamplingSettings) -> dict[str, float]:
    return {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}


def chi_squared(samples: Samples, truth: Samples, fewest: float = 5.0) -> float:
    """p-value of the frequencies of samples under the enumerated distribution; rare completions share a cell."""
    drawn = Counter(zip(samples.prompt_index.tolist(), map(tuple, samples.completion_ids), strict=True))
    drawn_per_prompt = torch.bincount(samples.prompt_index, minlength=len(truth.prompts.texts))
    expected = (drawn_per_prompt[truth.prompt_index] * truth.sequence_logprob.exp()).tolist()
    listed = list(zip(truth.prompt_index.tolist(), map(tuple, truth.completion_ids), strict=True))
    assert set(drawn) <= {key for key, mean in zip(listed, expected, strict=True) if mean > 0}
    observed_cells, expected_cells = [0.0], [0.0]
    for mean, key in sorted(zip(expected, listed, strict=True)):
        if expected_cells[-1] >= fewest:
            observed_cells.append(0.0)
            expected_cells.append(0.0)
        observed_cells[-1] += drawn[key]
        expected_cells[-1] += mean
    assert len(expected_cells) > 3, "too few cells to distinguish distributions"
    assert min(expected_cells) >= fewest
    return float(scipy.stats.chisquare(observed_cells, expected_cells).pvalue)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_sampled_logprobs_equal_rescored_ones_in_float64(architecture, tokens):
    model = tiny_model(architecture, tokens)
    for prompts in PROMPTS.values():
        for settings in SETTINGS.values():
            samples = model.sample(60, prompts, seed=1, max_completion_length=5, **as_arguments(settings))
            with torch.no_grad():
                rescored = model.logprob(samples)
            torch.testing.assert_close(samples.proposal_logprob, rescored, rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ["plain", "all_three"])
@pytest.mark.parametrize("architecture", SIZES)
def test_sampled_logprobs_equal_rescored_ones_in_float32(architecture, setting):
    model = tiny_model(architecture, "several_eos", torch.float32)
    samples = model.sample(300, PROMPTS["several"], seed=2, max_completion_length=12, **as_arguments(SETTINGS[setting]))
    assert samples.proposal_logprob.dtype == torch.float32
    with torch.no_grad():
        rescored = model.logprob(samples)
    torch.testing.assert_close(samples.proposal_logprob, rescored, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", [name for name in SIZES if name not in FLOAT32_ONLY])
def test_sampled_logprobs_equal_rescored_ones_for_every_kind_of_cache(architecture):
    model = tiny_model(architecture, "several_eos")
    samples = model.sample(200, PROMPTS["several"], seed=3, max_completion_length=8)
    with torch.no_grad():
        rescored = model.logprob(samples)
    torch.testing.assert_close(samples.proposal_logprob, rescored, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prompts", ["none", "several"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("architecture", "tokens"), [("gpt2", "several_eos"), ("llama", "pad_is_eos")])
def test_frequencies_follow_the_enumerated_distribution(architecture, tokens, setting, prompts):
    model = tiny_model(architecture, tokens)
    samples = model.sample(4000, PROMPTS[prompts], seed=4, max_completion_length=4, **as_arguments(SETTINGS[setting]))
    truth = enumerate_completions(model, PROMPTS[prompts], max_completion_length=4, settings=SETTINGS[setting])
    assert chi_squared(samples, truth) > 1e-4


def test_frequencies_reject_another_distribution():
    model = tiny_model("gpt2", "several_eos")
    samples = model.sample(4000, seed=4, max_completion_length=4, temperature=1.15)
    truth = enumerate_completions(model, max_completion_length=4)
    assert chi_squared(samples, truth) < 1e-6


@pytest.mark.parametrize("batch_size", [1, 70])
def test_batches_of_any_size_follow_the_distribution(batch_size):
    model = tiny_model("gpt2", "several_eos", torch.float32)
    n = 40 if batch_size == 1 else 3000
    samples = model.sample(n, PROMPTS["several"], seed=5, max_completion_length=3, batch_size=batch_size)
    assert len(samples) == n
    assert samples.prompt_index.tolist() == [i % 4 for i in range(n)]
    with torch.no_grad():
        torch.testing.assert_close(samples.proposal_logprob, model.logprob(samples), rtol=0, atol=1e-5)
    if n > 1000:
        truth = enumerate_completions(model, PROMPTS["several"], max_completion_length=3)
        assert chi_squared(samples, truth) > 1e-4


def count_rows(model, monkeypatch) -> list[int]:
    """Rows of each forward pass from now on."""
    rows: list[int] = []
    forward = model.model.forward

    @functools.wraps(forward)
    def counted(*args, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    return rows


@pytest.mark.parametrize("architecture", ["gpt2", "lfm2"])
def test_ended_rows_leave_the_batch_and_the_others_stay_correct(architecture, monkeypatch):
    model = tiny_model(architecture, "several_eos").copy()
    rows = count_rows(model, monkeypatch)
    samples = model.sample(2000, PROMPTS["several"], seed=6, max_completion_length=4)
    longest = int(samples.lengths.max())
    assert len(rows) == longest == 4
    # After each step at most a fifth of the rows in the batch has ended.
    for step, batch in enumerate(rows):
        assert batch <= int((samples.lengths > step).sum()) / sampling.COMPACT_BELOW + 1
    assert rows[-1] < 2000 / 2
    with torch.no_grad():
        torch.testing.assert_close(samples.proposal_logprob, model.logprob(samples), rtol=0, atol=1e-6)
    assert chi_squared(samples, enumerate_completions(model, PROMPTS["several"], max_completion_length=4)) > 1e-4


def test_memory_bounds_the_rows_that_are_decoded_at_once(monkeypatch):
    model = tiny_model("gpt2", "several_eos").copy()
    monkeypatch.setattr("tiltlm.lm.memory.CPU_SAMPLING_BYTES", 200_000)
    limit, longer = model.memory.rows_at_once(5), model.memory.rows_at_once(20)
    assert 100 > limit > longer > 1
    rows = count_rows(model, monkeypatch)
    assert len(model.sample(200, seed=0, max_completion_length=4)) == 200
    assert limit / 2 < max(rows) <= limit


def test_the_distribution_is_the_same_with_compaction_at_every_step_and_without(monkeypatch):
    model = tiny_model("llama", "pad_is_eos")
    truth = enumerate_completions(model, PROMPTS["several"], max_completion_length=4)
    for share in (0.0, 2.0):
        monkeypatch.setattr(sampling, "COMPACT_BELOW", share)
        samples = model.sample(3000, PROMPTS["several"], seed=7, max_completion_length=4)
        assert chi_squared(samples, truth) > 1e-4
        with torch.no_grad():
            torch.testing.assert_close(samples.proposal_logprob, model.logprob(samples), rtol=0, atol=1e-12)


def test_rows_of_one_prompt_share_one_pass_over_it(monkeypatch):
    model = tiny_model("llama", "several_eos").copy()
    rows = count_rows(model, monkeypatch)
    samples = model.sample(40, PROMPTS["several"], seed=3, max_completion_length=8)
    assert rows[0] == len(PROMPTS["several"]) < rows[1] <= 40
    with torch.no_grad():
        torch.testing.assert_close(samples.proposal_logprob, model.logprob(samples), rtol=0, atol=1e-12)


def test_sampling_stops_when_every_row_has_ended(monkeypatch):
    model = tiny_model("gpt2", "pad_is_eos").copy()
    with torch.no_grad():
        # The last normalization layer always predicts EOS.
        model.model.transformer.ln_f.weight.zero_()
        model.model.transformer.ln_f.bias.copy_(100 * model.model.get_input_embeddings().weight[model.eos_ids[0]])
    rows = count_rows(model, monkeypatch)
    samples = model.sample(5, seed=0, max_completion_length=9)
    assert samples.completion_ids == [[model.eos_ids[0]]] * 5
    assert len(rows) == samples.tokens.shape[1] == 1


def test_every_row_ends_with_its_first_eos_or_at_full_length():
    model = tiny_model("gpt2", "several_eos")
    samples = model.sample(500, seed=8, max_completion_length=5)
    ended_by = Counter()
    for row in samples.completion_ids:
        assert not set(row[:-1]) & set(model.eos_ids)
        assert row[-1] in model.eos_ids or len(row) == 5
        ended_by[row[-1]] += 1
    assert all(ended_by[i] for i in model.eos_ids)
    assert (samples.tokens[~samples.mask] == model.pad_id).all()
    assert (samples.proposal_logprob[~samples.mask] == 0).all()


def test_a_seed_fixes_the_samples():
    model = tiny_model("gpt2", "several_eos")
    first, again, other = (model.sample(50, PROMPTS["several"], seed=s, max_completion_length=6) for s in (9, 9, 10))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.proposal_logprob, again.proposal_logprob)
    assert first.completion_ids != other.completion_ids
    unseeded = [model.sample(50, max_completion_length=6).completion_ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]


def test_a_generator_advances_and_the_global_one_does_not():
    model = tiny_model("gpt2", "several_eos")
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(9)
    draws = [model.sample(50, generator=generator, max_completion_length=6).completion_ids for _ in range(2)]
    assert draws[0] == model.sample(50, seed=9, max_completion_length=6).completion_ids
    assert draws[0] != draws[1]
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_counts_up_to_n():
    calls: list[tuple[int, int]] = []
    tiny_model().sample(10, seed=0, max_completion_length=2, batch_size=4, progress=lambda *now: calls.append(now))
    assert calls[-1] == (10, 10)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) == 3


def test_a_token_of_probability_zero_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    # In float16, so that uniform numbers often equal a boundary between tokens, or 0.
    logits = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).log().half().expand(20_000, 5)
    drawn, logprob = sampling.draw(logits, SamplingSettings(), generator)
    torch.testing.assert_close(logprob, torch.full_like(logprob, math.log(0.5)), rtol=0, atol=1e-3)
    assert set(drawn.tolist()) == {1, 3}
    assert abs(float((drawn == 1).double().mean()) - 0.5) < 0.02


def test_weights_that_are_nan_are_reported():
    model = tiny_model("gpt2").copy()
    with torch.no_grad():
        model.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="learning_rate"):
        model.sample(4, seed=0, max_completion_length=3)


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("n", {"n": 0}),
        ("n", {"n": -3}),
        ("n", {"n": 2.5}),
        ("n", {"n": True}),
        ("max_completion_length", {"max_completion_length": 0}),
        ("max_completion_length", {"max_completion_length": "4"}),
        ("max_completion_length", {"max_completion_length": POSITIONS + 1}),
        ("max_completion_length", {"max_completion_length": POSITIONS - 2, "prompts": "a b a b"}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": float("inf")}),
        ("temperature", {"temperature": "hot"}),
        ("top_k", {"top_k": -1}),
        ("top_k", {"top_k": 1.5}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.01}),
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": -2}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": "lucky"}),
        ("seed", {"seed": 1, "generator": torch.Generator()}),
        ("prompts", {"prompts": []}),
        ("prompts", {"prompts": 3}),
        ("prompts", {"prompts": ["a", 3]}),
    ],
)
def test_a_bad_argument_is_named(field, arguments):
    with pytest.raises(UsageError, match=rf"^{field}: "):
        tiny_model().sample(**{"n": 3, "max_completion_length": 4, **arguments})


def test_the_longest_completion_that_fits_is_allowed():
    model = tiny_model("gpt2", "several_eos")
    samples = model.sample(50, "a b a b", seed=0, max_completion_length=POSITIONS - 3)
    assert len(samples) == 50
