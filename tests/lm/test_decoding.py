"""A cache of fixed size writes the same texts as one that grows; on a GPU its steps are replayed as one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from enumerable import PROMPTS, random_guide, tiny_model
from tiltlm.lm import LanguageModel, Samples, decoding, sampling

MODELS = ("gpt2", "llama")


def sampled(
    model: LanguageModel, prompts: str, static: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> Samples:
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "can_be_static", lambda model: static)
        # Without it the rows that are left would be given other random numbers.
        patch.setattr(sampling, "COMPACT_BELOW", 0.0)
        return model.sample(64, PROMPTS[prompts], 0, max_completion_length=8, **settings)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("prompts", ["one", "several", "none"])
@pytest.mark.parametrize("family", MODELS)
def test_the_same_texts_are_written(family: str, prompts: str, guided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, "several_eos")
    guide = random_guide(model) if guided else None
    grown, static = (sampled(model, prompts, fixed, monkeypatch, guide=guide) for fixed in (False, True))
    assert len({tuple(ids) for ids in grown.completion_ids}) > 5
    assert torch.equal(static.tokens, grown.tokens)
    tolerance = 1e-12 if family == "gpt2" else 1e-6
    torch.testing.assert_close(static.proposal_logprob, grown.proposal_logprob, rtol=0, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(model.logprob(static), static.proposal_logprob, rtol=0, atol=tolerance)


def test_it_is_for_gpus_alone() -> None:
    assert not decoding.can_be_static(tiny_model("gpt2").model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_on_a_gpu_the_graph_is_used_and_changes_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.from_pretrained("embedded", device="cuda", dtype=dtype)
    graphs = []
    capture = decoding.StaticDecoder._capture

    def watched(self: decoding.StaticDecoder, expected: torch.Tensor) -> None:
        capture(self, expected)
        graphs.append(self.graph)

    monkeypatch.setattr(decoding.StaticDecoder, "_capture", watched)
    samples = model.sample(256, seed=0)
    assert graphs
    assert None not in graphs
    with torch.no_grad():
        apart = (model.logprob(samples).double().sum(-1) - samples.sequence_logprob).abs()
    assert float(apart.mean()) < (1e-3 if dtype == "float32" else 0.2)
