"""Samples and prompts: texts, tokens and log-probabilities row by row, through selection and concatenation."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from enumerable import PROMPTS, TOKENS, tiny_model
from tiltlm.errors import UsageError
from tiltlm.lm import LanguageModel, Samples, SamplingSettings

TENSORS = ("tokens", "mask", "proposal_logprob", "prompt_index")


@pytest.fixture
def model() -> LanguageModel:
    return tiny_model("gpt2", "several_eos")


@pytest.fixture
def samples(model) -> Samples:
    return model.sample(30, PROMPTS["several"], seed=0, max_completion_length=6)


def test_texts_are_the_completions_without_special_tokens(samples):
    words = TOKENS["several_eos"].words.split()
    for text, ids in zip(samples.texts, samples.completion_ids, strict=True):
        assert text.split() == [words[i] for i in ids if words[i] not in ("<s>", "</s>", "<pad>")]
    assert any(text for text in samples.texts)
    assert isinstance(samples.texts, list)


def test_completion_ids_hold_the_sampled_tokens_eos_included(samples, model):
    assert [len(ids) for ids in samples.completion_ids] == samples.lengths.tolist()
    for row, ids in enumerate(samples.completion_ids):
        assert ids == samples.tokens[row][samples.mask[row]].tolist()
    assert any(ids[-1] in model.eos_ids for ids in samples.completion_ids)


def test_prompts_are_taken_in_turn(samples):
    assert samples.prompt_texts == [PROMPTS["several"][i % 4] for i in range(30)]
    assert tiny_model().sample(3, "a b", seed=0, max_completion_length=2).prompt_texts == ["a b"] * 3
    assert tiny_model().sample(3, seed=0, max_completion_length=2).prompt_texts == [None] * 3


def test_sequence_logprob_sums_over_tokens_in_float64():
    samples = tiny_model("gpt2", "several_eos", torch.float32).sample(20, seed=0, max_completion_length=6)
    assert samples.proposal_logprob.dtype == torch.float32
    assert samples.sequence_logprob.dtype == torch.float64
    expected = [sum(row[:n].tolist()) for row, n in zip(samples.proposal_logprob, samples.lengths, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(samples.sequence_logprob, expected, rtol=0, atol=1e-12)


def test_select_takes_rows_by_index_or_mask(samples):
    long = samples.lengths > 2
    for index in (long, long.nonzero().squeeze(-1)):
        chosen = samples.select(index)
        assert len(chosen) == int(long.sum())
        for name in TENSORS:
            assert torch.equal(getattr(chosen, name), getattr(samples, name)[long])
        assert chosen.texts == [text for text, kept in zip(samples.texts, long.tolist(), strict=True) if kept]
    backwards = samples.select(torch.arange(29, -1, -1))
    assert backwards.completion_ids == samples.completion_ids[::-1]
    assert backwards.prompt_texts == samples.prompt_texts[::-1]


def test_trimmed_drops_columns_of_padding_only(samples):
    short = samples.select(samples.lengths <= 2)
    trimmed = short.trimmed()
    assert short.tokens.shape[1] > 2
    assert trimmed.tokens.shape == trimmed.mask.shape == trimmed.proposal_logprob.shape == (len(short), 2)
    assert trimmed.completion_ids == short.completion_ids
    torch.testing.assert_close(trimmed.sequence_logprob, short.sequence_logprob)
    none = samples.select(torch.zeros(30, dtype=torch.bool)).trimmed()
    assert len(none) == 0
    assert none.tokens.shape == (0, 1)


def test_concatenate_undoes_a_split_of_different_widths(samples):
    order = samples.lengths.argsort(stable=True)
    parts = [samples.select(rows).trimmed() for rows in order.split(8)]
    assert len({part.tokens.shape[1] for part in parts}) > 1
    joined = Samples.concatenate(parts).select(order.argsort())
    assert joined.completion_ids == samples.completion_ids
    assert joined.texts == samples.texts
    assert torch.equal(joined.mask, samples.mask)
    assert torch.equal(joined.prompt_index, samples.prompt_index)
    assert torch.equal(joined.proposal_logprob, samples.proposal_logprob)


def test_samples_prompts_and_settings_are_frozen(samples):
    for instance, name in ((samples, "tokens"), (samples.prompts, "mask"), (samples.settings, "top_p")):
        with pytest.raises(FrozenInstanceError):
            setattr(instance, name, None)


def test_selected_samples_compute_texts_and_lengths_anew(samples):
    assert len(samples.texts) == len(samples.lengths) == 30
    one = samples.select(torch.tensor([3]))
    assert one.texts == [samples.texts[3]]
    assert one.lengths.tolist() == [samples.lengths[3]]


def test_texts_need_a_tokenizer(samples):
    with pytest.raises(ValueError, match="tokenizer"):
        _ = replace(samples, tokenizer=None).texts


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p"])
def test_a_setting_out_of_range_names_its_field(field):
    with pytest.raises(UsageError, match=f"^{field}: -2 "):
        SamplingSettings(**{field: -2})


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_prompt_is_encoded_as_the_tokenizer_does_and_padded_on_the_left(tokens):
    model = tiny_model("gpt2", tokens)
    prompts = model.encode_prompts(["a b a", "b", "", None])
    assert prompts.texts == ("a b a", "b", "", None)
    expected = [
        model.tokenizer("a b a")["input_ids"],
        model.tokenizer("b")["input_ids"],
        [model.start_id],
        [model.start_id],
    ]
    assert [row[kept].tolist() for row, kept in zip(prompts.tokens, prompts.mask, strict=True)] == expected
    # All padding comes before the tokens.
    assert (prompts.mask.int().diff(dim=1) >= 0).all()
    assert prompts.ragged
    assert not model.encode_prompts("a b").ragged
    assert expected[0][0] == (model.tokenizer.bos_token_id if TOKENS[tokens].prompts_start_with_bos else expected[0][2])


@pytest.mark.parametrize(
    ("tokens", "start", "pad", "eos"),
    [
        ("pad_is_eos", "</s>", "</s>", ["</s>"]),
        ("pad_is_not_eos", "<s>", "<pad>", ["</s>"]),
        ("several_eos", "<s>", "<pad>", [".", "</s>"]),
        ("no_bos", "</s>", "<pad>", ["</s>"]),
        ("no_pad", "</s>", "</s>", ["</s>"]),
    ],
)
def test_special_tokens_come_from_tokenizer_and_generation_config(tokens, start, pad, eos):
    model, ids = tiny_model("gpt2", tokens), TOKENS[tokens].ids
    assert (model.start_id, model.pad_id) == (ids[start], ids[pad])
    assert model.eos_ids == sorted(ids[word] for word in eos)


def test_a_pad_token_without_an_embedding_is_not_used():
    tokenizer = TOKENS["no_pad"].tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    model = LanguageModel(tiny_model("gpt2", "no_pad").copy().model, tokenizer)
    assert tokenizer.pad_token_id >= model.vocab_size
    assert model.pad_id < model.vocab_size
    samples = model.sample(20, ["a", "a b c"], seed=0, max_completion_length=4)
    with torch.no_grad():
        torch.testing.assert_close(model.logprob(samples), samples.proposal_logprob)
