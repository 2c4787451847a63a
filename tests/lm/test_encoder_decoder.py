"""Encoder–decoder models: the tests of causal models, with prompts that the encoder reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from enumerable import ENCODER_DECODERS, PROMPTS, SETTINGS, TOKENS, random_guide, tiny_model
from tiltlm.app.load import load_run
from tiltlm.app.tune import tune_config
from tiltlm.config.run import load_config
from tiltlm.errors import ModelError, UsageError
from tiltlm.exact import enumerate_completions
from tiltlm.lm import LanguageModel, Prompts, Roles, Samples, SamplingSettings

LENGTH = 4
LORA: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture(params=ENCODER_DECODERS)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_model(request.param, "several_eos")


def naive_logprob(model: LanguageModel, samples: Samples) -> list[torch.Tensor]:
    """Log-probabilities of each row's tokens, from an unpadded pass of the whole model over that row."""
    rows = []
    for i, completion in zip(samples.prompt_index.tolist(), samples.completion_ids, strict=True):
        prompt = samples.prompts.tokens[i][samples.prompts.mask[i]]
        begun = torch.tensor([[model.start_id, *completion[:-1]]])
        logits = model.model(input_ids=prompt[None], decoder_input_ids=begun).logits[0]
        rows.append(samples.settings.log_probabilities(logits)[range(len(completion)), completion])
    return rows


def totals(samples: Samples) -> torch.Tensor:
    sums = torch.zeros(len(samples.prompts), dtype=torch.float64)
    return sums.index_add(0, samples.prompt_index, samples.sequence_logprob.exp())


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("architecture", ENCODER_DECODERS)
def test_probabilities_sum_to_one_for_ragged_prompts_and_each_setting(architecture: str, tokens: str) -> None:
    model = tiny_model(architecture, tokens)
    assert model.is_encoder_decoder
    assert model.start_id == TOKENS[tokens].ids["b"]
    for settings in SETTINGS.values():
        samples = enumerate_completions(model, PROMPTS["several"], max_completion_length=3, settings=settings)
        assert samples.prompts.ragged
        torch.testing.assert_close(totals(samples), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_tested_models_are_far_from_uniform_and_depend_on_the_whole_prompt(model: LanguageModel) -> None:
    samples = enumerate_completions(model, ["a b", "b b", "b a", "b a a"], max_completion_length=LENGTH)
    probabilities = samples.sequence_logprob.exp().reshape(4, -1)
    assert probabilities.max(-1).values.min() > 5 / probabilities.shape[1]
    distances = [0.5 * (probabilities[i] - probabilities[j]).abs().sum() for i in range(4) for j in range(i)]
    assert min(distances) > 0.05


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_either_side_of_a_prompt_does_not_change_its_distribution(model: LanguageModel, side: str) -> None:
    rows = [model.tokenizer(text)["input_ids"] for text in ("a", "b a b a", "a b")]
    padded, mask = [], []
    for i, row in enumerate(rows):
        left = {"left": 6 - len(row), "right": 0, "both": min(i + 1, 6 - len(row))}[side]
        right = 6 - len(row) - left
        padded.append([model.pad_id] * left + row + [model.pad_id] * right)
        mask.append([False] * left + [True] * len(row) + [False] * right)
    prompts = Prompts(torch.tensor(padded), torch.tensor(mask), ("a", "b a b a", "a b"))
    together = enumerate_completions(model, prompts, max_completion_length=3)
    for i, text in enumerate(prompts.texts):
        alone = enumerate_completions(model, text, max_completion_length=3)
        one = together.select(together.prompt_index == i)
        torch.testing.assert_close(one.sequence_logprob, alone.sequence_logprob, rtol=0, atol=1e-6)


def test_sampler_scorer_and_gradients_agree_with_the_plain_model(model: LanguageModel) -> None:
    for settings in ({}, {"temperature": 1.7, "top_k": 4, "top_p": 0.9}):
        samples = model.sample(40, PROMPTS["several"], 0, max_completion_length=6, **settings)
        ours, naive = model.logprob(samples), naive_logprob(model, samples)
        torch.testing.assert_close(ours.detach(), samples.proposal_logprob, rtol=0, atol=1e-6)
        torch.testing.assert_close(ours[samples.mask], torch.cat(naive), rtol=0, atol=1e-6)
        weights = torch.randn(len(samples), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        parameters = list(model.model.parameters())
        plain = sum(w * row.sum() for w, row in zip(weights, naive, strict=True))
        for chunks in (None, 7):
            total = (weights * model.logprob(samples, batch_size=chunks).sum(-1)).sum()
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
            for one, other in zip(
                gradients, torch.autograd.grad(plain, parameters, allow_unused=True, retain_graph=True), strict=True
            ):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_samples_follow_the_enumerated_distribution(model: LanguageModel) -> None:
    listed = enumerate_completions(model, ["a", "b a b a"], max_completion_length=3)
    drawn = model.sample(8000, ["a", "b a b a"], 3, max_completion_length=3)
    for i in range(2):
        truth = listed.select(listed.prompt_index == i)
        place = {tuple(ids): row for row, ids in enumerate(truth.completion_ids)}
        found = torch.tensor([place[tuple(ids)] for ids in drawn.select(drawn.prompt_index == i).completion_ids])
        counts = torch.bincount(found, minlength=len(place)).double()
        expected = 4000 * truth.sequence_logprob.exp()
        often = expected >= 5
        merged = [torch.cat([x[often], x[~often].sum()[None]]).numpy() for x in (counts, expected)]
        assert merged[1][-1] > 0
        assert stats.chisquare(*merged).pvalue > 1e-3


def test_the_encoder_reads_each_prompt_once_for_all_its_samples(model: LanguageModel) -> None:
    rows: list[int] = []
    encoder = model.model.get_encoder()
    hook = encoder.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        samples = model.sample(40, ["a", "b a b a", "b"], 0, max_completion_length=6)
        assert rows == [3]
        rows.clear()
        model.read(samples)
        assert rows == [3]
    finally:
        hook.remove()


def test_a_bias_on_logits_is_detected(model: LanguageModel) -> None:
    assert model.output_layer is model.model.lm_head
    shifted = model.copy()
    if not hasattr(shifted.model, "final_logits_bias"):
        assert shifted.model.config.scale_decoder_outputs, "so decoder_states must scale the states"
        return
    shifted.model.final_logits_bias += torch.linspace(-1, 1, shifted.vocab_size)
    assert shifted.output_layer is None
    samples = shifted.sample(20, PROMPTS["several"], 0, max_completion_length=5)
    torch.testing.assert_close(
        shifted.logprob(samples)[samples.mask], torch.cat(naive_logprob(shifted, samples)), rtol=0, atol=1e-6
    )
    with torch.no_grad():
        apart = shifted.logprob(samples) - model.logprob(samples)
    assert apart.abs().max() > 0.1


def test_guided_log_probabilities_are_exact(model: LanguageModel) -> None:
    guide = random_guide(model)
    samples = model.sample(200, PROMPTS["several"], 2, max_completion_length=5, guide=guide)
    with torch.no_grad():
        torch.testing.assert_close(model.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-6)
        assert (model.logprob(samples, settings=SamplingSettings()) - samples.proposal_logprob).abs().max() > 0.1


def test_an_adapter_tunes_encoder_and_decoder_and_leaves_the_base(model: LanguageModel, tmp_path: Path) -> None:
    samples = model.sample(30, PROMPTS["several"], 0, max_completion_length=5)
    tuned = model.copy().with_lora(**LORA)
    assert tuned.model.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    roles = Roles(tuned)
    assert {"encoder", "decoder"} <= {part for name in roles.trainable() for part in name.split(".")}
    with torch.no_grad():
        adapted = tuned.logprob(samples)
        assert (adapted - samples.proposal_logprob).abs().max() > 0.01
        with roles.use("base") as base:
            torch.testing.assert_close(base.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-6)
        own = tuned.sample(30, PROMPTS["several"], 0, max_completion_length=5)
        torch.testing.assert_close(tuned.logprob(own), own.proposal_logprob, rtol=0, atol=1e-6)
        tuned.save_pretrained(tmp_path / "adapter")
        again = model.copy().with_adapter(tmp_path / "adapter")
        torch.testing.assert_close(again.logprob(samples), adapted, rtol=0, atol=1e-6)


def test_a_saved_model_loads_as_the_same(model: LanguageModel, tmp_path: Path) -> None:
    samples = model.sample(30, PROMPTS["several"], 0, max_completion_length=5)
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path, dtype="float64", device="cpu")
    assert type(again.model) is type(model.model)
    assert (again.start_id, again.eos_ids, again.pad_id) == (model.start_id, model.eos_ids, model.pad_id)
    with torch.no_grad():
        torch.testing.assert_close(again.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-6)


def test_products_in_bfloat16_agree_between_sampler_and_scorer(model: LanguageModel) -> None:
    single = model.copy().model.float()
    rough = LanguageModel(single, model.tokenizer, compute_dtype=torch.bfloat16)
    samples = rough.sample(100, PROMPTS["several"], 0, max_completion_length=5)
    with torch.no_grad():
        assert (rough.logprob(samples) - samples.proposal_logprob).abs().max() < 0.1
        fine = LanguageModel(single, model.tokenizer).logprob(samples)
    assert 1e-4 < (fine - samples.proposal_logprob).abs().max() < 0.5


def test_encoder_and_decoder_have_separate_length_limits() -> None:
    model = tiny_model("bart", "several_eos")
    with pytest.raises(UsageError, match=r"^prompts: prompt 2, 'b b .*', of 25 tokens has more than the 24 positions"):
        model.sample(2, ["a", "b " * 25], 0, max_completion_length=2)
    with pytest.raises(UsageError, match=r"^max_completion_length: 25 tokens are more than the 24 .*at most 24"):
        model.sample(2, ["a"], 0, max_completion_length=25)
    assert len(model.sample(2, ["b " * 24], 0, max_completion_length=24)) == 2
    assert len(tiny_model("t5", "several_eos").sample(2, ["b " * 40], 0, max_completion_length=40)) == 2


def test_an_empty_prompt_is_the_tokenizers_encoding_of_an_empty_text() -> None:
    for tokens in ("pad_is_not_eos", "several_eos"):
        model = tiny_model("t5", tokens)
        encoded = model.tokenizer("")["input_ids"] or [model.eos_ids[0]]
        assert model.encode_prompts([None, ""]).tokens.tolist() == [encoded, encoded]


def test_a_decoder_needs_a_token_to_start_from() -> None:
    model = tiny_model("t5", "several_eos").copy().model
    for place in (model.config, model.generation_config):
        place.decoder_start_token_id = place.bos_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        LanguageModel(model, tiny_model("t5", "several_eos").tokenizer)


@pytest.mark.parametrize("peft", [None, {"r": 2, "target_modules": "all-linear"}])
def test_a_whole_run(model: LanguageModel, peft: dict[str, Any] | None, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    settings = {
        "model": str(tmp_path / "model"),
        "dtype": "float64",
        "device": "cpu",
        "target": {"constraints": [{"feature": {"contains": "a"}, "moment": 0.2}], "samples": 200},
        "prompts": ["a", "b a b a", "b"],
        "training": {"max_steps": 4, "batch_size": 60, "learning_rate": 0.003},
        "max_completion_length": LENGTH,
        "evaluation": {"samples": 60, "texts": 5},
        "peft": peft,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    run = tune_config(load_config(tmp_path / "run.yaml"), tmp_path / "run")
    assert run.status == "done"
    _, roles, _ = load_run(run.directory, "cpu")
    samples = run.policy.sample(20, ["a", "b"], 0, max_completion_length=LENGTH)
    with torch.no_grad():
        torch.testing.assert_close(roles.policy.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-6)
        with roles.use("base") as base:
            assert (base.logprob(samples) - samples.proposal_logprob).abs().max() > 1e-3
