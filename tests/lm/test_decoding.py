"""A cache of fixed size gives the same texts as one that grows; on a GPU its steps are replayed as one CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from enumerable import PROMPTS, random_guide, tiny_model
from tiltlm.lm import LanguageModel, Samples, decoding, prefill, sampling
from tiltlm.lm import model as model_module

MODELS = ("gpt2", "llama")


def sampled(
    model: LanguageModel, prompts: str | None, static: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Samples:
    steps = []
    step = decoding.StaticDecoder._step

    def recorded(self: decoding.StaticDecoder) -> torch.Tensor:
        steps.append(self.steps)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(prefill, "can_be_static", lambda model: static)
        patch.setattr(decoding.StaticDecoder, "_step", recorded)
        # With compaction the remaining rows would get other random numbers.
        patch.setattr(sampling, "COMPACT_BELOW", 0.0)
        samples = model.sample(64, PROMPTS[prompts] if prompts else None, 0, max_completion_length=8, **settings)
    assert steps == (list(range(1, samples.tokens.shape[1])) if static else [])
    return samples


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prompts", ["one", "several", "none"])
@pytest.mark.parametrize("family", MODELS)
def test_both_caches_give_the_same_texts(
    family: str, prompts: str, guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, "several_eos")
    guide = random_guide(model) if guided else None
    grown, static = (sampled(model, prompts, fixed, monkeypatch, guide=guide) for fixed in (False, True))
    assert len({tuple(ids) for ids in grown.completion_ids}) > 5
    assert torch.equal(static.tokens, grown.tokens)
    tolerance = 1e-12 if family == "gpt2" else 1e-6
    torch.testing.assert_close(static.proposal_logprob, grown.proposal_logprob, rtol=0, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model.logprob(static), static.proposal_logprob, rtol=0, atol=tolerance)


def test_keys_and_values_in_two_dtypes_are_held_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rotary embeddings make keys float32, while values are bfloat16.
    monkeypatch.setattr(model_module, "native_bfloat16", lambda device: True)
    model = LanguageModel.from_pretrained("embedded", device="cpu", dtype="auto")
    assert model.compute_dtype == torch.bfloat16
    grown, static = (sampled(model, None, fixed, monkeypatch) for fixed in (False, True))
    # 16-bit products are rounded differently, so a few tokens differ.
    same = (static.tokens == grown.tokens).all(-1)
    assert same.float().mean() > 0.8
    torch.testing.assert_close(static.proposal_logprob[same], grown.proposal_logprob[same], rtol=0, atol=0.1)


def test_a_static_cache_is_only_used_on_gpus() -> None:
    assert not decoding.can_be_static(tiny_model("gpt2").model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_on_a_gpu_the_graph_is_used_and_changes_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.from_pretrained("embedded", device="cuda", dtype=dtype)
    graphs = []
    capture = decoding.StaticDecoder._capture

    def recorded(self: decoding.StaticDecoder, expected: torch.Tensor) -> None:
        capture(self, expected)
        graphs.append(self.graph)

    monkeypatch.setattr(decoding.StaticDecoder, "_capture", recorded)
    samples = model.sample(256, seed=0)
    assert graphs
    assert None not in graphs
    with torch.no_grad():
        apart = (model.logprob(samples).double().sum(-1) - samples.sequence_logprob).abs()
    assert float(apart.mean()) < (1e-3 if dtype == "float32" else 0.2)
