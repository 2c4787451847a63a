"""A model with its own guide: sampling, scoring and gradients use it, the base does not, and it is saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from enumerable import tiny_model
from tiltlm.errors import ModelError
from tiltlm.exact import enumerate_completions
from tiltlm.features import contains
from tiltlm.guides.token_states import build_token_states
from tiltlm.lm import Guide, GuideProcessor, LanguageModel, Roles, SamplingSettings, next_token

LENGTH = 4
LORA = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


@pytest.fixture
def model() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos").copy()


def guide_of(model: LanguageModel) -> Guide:
    states = build_token_states(model, [contains("a b")], enumerate_completions(model, max_completion_length=LENGTH))
    generator = torch.Generator().manual_seed(0)
    return states.guide(torch.randn(LENGTH + 1, 2 * len(states.transitions), generator=generator).double())


def test_its_distribution_is_that_of_guided_sampling_and_sums_to_one(model: LanguageModel) -> None:
    guide = guide_of(model)
    listed = enumerate_completions(model, max_completion_length=LENGTH)
    with torch.no_grad():
        wanted = model.logprob(replace(listed, guide=guide)).sum(-1)
        model.keep(guide)
        found = model.logprob(listed).sum(-1)
        drawn = model.sample(50, seed=3, max_completion_length=LENGTH)
        again = model.logprob(drawn)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert float(found.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert drawn.guide is None
    torch.testing.assert_close(again, drawn.proposal_logprob, rtol=0, atol=1e-9)
    with model.unguided(), torch.no_grad():
        torch.testing.assert_close(model.logprob(listed), listed.proposal_logprob, rtol=0, atol=1e-12)


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_and_kl_agree_with_autograd_through_whole_logits(model: LanguageModel, lora: bool) -> None:
    """With a frozen output layer (LoRA) and without."""
    guide, base = guide_of(model), model.copy()
    policy = (model.copy().with_lora(**LORA) if lora else model).keep(guide)
    listed = enumerate_completions(base, max_completion_length=LENGTH)
    weights = torch.randn(len(listed), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    scores = next_token(listed, policy.read(listed), base.read(listed))
    found = torch.autograd.grad((weights * scores.policy.sum(-1)).sum(), parameters)

    with policy.unguided():
        plain = policy.read(listed)
    states = guide.states(listed.tokens)[listed.flat_rows, listed.flat_columns]
    logits = plain.logits(slice(0, len(plain))) + guide.logit_bias_at(states, listed.flat_columns)
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, listed.flat_tokens[:, None]).squeeze(-1)
    wanted = torch.autograd.grad((weights[listed.flat_rows] * chosen).sum(), parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
    with torch.no_grad():
        base_logprobs = base.read(listed).logits(slice(0, len(plain))).log_softmax(-1)
        kl = (logprobs.exp() * (logprobs - base_logprobs)).sum(-1)
    assert scores.kl is not None
    torch.testing.assert_close(scores.kl[listed.flat_rows, listed.flat_columns], kl, rtol=0, atol=1e-9)


@pytest.mark.parametrize("lora", [False, True])
def test_the_base_does_not_use_it_and_the_proposal_does(model: LanguageModel, lora: bool) -> None:
    listed = enumerate_completions(model, max_completion_length=LENGTH)
    guide, own = guide_of(model), listed.proposal_logprob
    roles = Roles(model.with_lora(**LORA)) if lora else Roles(model)
    roles.policy.keep(guide)
    roles.keep_proposal()
    with torch.no_grad():
        with roles.use("base") as base:
            torch.testing.assert_close(base.logprob(listed, settings=SamplingSettings()), own, rtol=0, atol=1e-12)
        with roles.use("policy") as policy:
            of_policy = policy.logprob(listed, settings=SamplingSettings())
        with roles.use("proposal") as proposal:
            torch.testing.assert_close(
                proposal.logprob(listed, settings=SamplingSettings()), of_policy, rtol=0, atol=1e-12
            )
    assert float((of_policy - own).abs().max()) > 0.1


def test_it_is_saved_beside_the_weights(model: LanguageModel, tmp_path: Path) -> None:
    listed = enumerate_completions(model, max_completion_length=LENGTH)
    model.keep(guide_of(model)).save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path, device="cpu", dtype="float64")
    with torch.no_grad():
        torch.testing.assert_close(
            again.logprob(listed, settings=SamplingSettings()), model.logprob(listed, settings=SamplingSettings())
        )
    (tmp_path / "guide.safetensors").write_bytes(b"no guide")
    with pytest.raises(ModelError, match=r"guide\.safetensors is damaged"):
        LanguageModel.from_pretrained(tmp_path, device="cpu")


def test_transformers_generates_from_the_same_distribution(model: LanguageModel) -> None:
    """Scores of ``generate`` agree with our log-probabilities of the same tokens."""
    guide = guide_of(model)
    start = torch.full((6, 1), model.start_id)
    torch.manual_seed(0)
    found = model.model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=LENGTH,
        eos_token_id=model.eos_ids,
        pad_token_id=model.pad_id,
        logits_processor=[GuideProcessor(guide, 1)],
        return_dict_in_generate=True,
        output_scores=True,
    )
    tokens = found.sequences[:, 1:]
    ended = torch.isin(tokens, torch.tensor(model.eos_ids))
    mask = (ended.cumsum(1) - ended.long()) == 0
    scored = torch.stack(found.scores, 1).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1) * mask
    drawn = model.sample(6, seed=0, max_completion_length=LENGTH)
    nothing = torch.zeros(tokens.shape, dtype=torch.float64)
    same = replace(drawn, tokens=tokens, mask=mask, proposal_logprob=nothing)
    with torch.no_grad():
        ours = model.keep(guide).logprob(same, settings=SamplingSettings())
    torch.testing.assert_close(scored.double(), ours.double(), rtol=0, atol=1e-5)


def test_a_copy_and_an_adapter_keep_it(model: LanguageModel) -> None:
    listed = enumerate_completions(model, max_completion_length=LENGTH)
    with torch.no_grad():
        kept = model.keep(guide_of(model)).logprob(listed)
        for other in (model.copy(), model.copy().with_lora(**(LORA | {"init_lora_weights": True}))):
            torch.testing.assert_close(other.logprob(listed), kept, rtol=0, atol=1e-12)
