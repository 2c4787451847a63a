"""The embedded model agrees with its card and the documentation."""

from __future__ import annotations

import re

import pytest
import torch

from tiltlm.features import pronouns
from tiltlm.lm import LanguageModel
from tiltlm.lm.embedded import embedded_path


@pytest.fixture(scope="module")
def embedded() -> LanguageModel:
    return LanguageModel.from_pretrained("embedded", device="cpu")


def test_it_is_small(embedded: LanguageModel) -> None:
    parameters = sum(p.numel() for p in embedded.model.parameters())
    assert 2e6 < parameters < 5e6
    assert 2000 <= embedded.vocab_size <= 4096
    assert (embedded_path() / "model.safetensors").stat().st_size < 12e6


def test_its_card_names_losses_below_the_plain_gpt2_of_its_size() -> None:
    card = (embedded_path() / "README.md").read_text(encoding="utf-8")
    units = ("nats per token", "bits per byte")
    nats, bits = (float(re.search(rf"\*\*([\d.]+) {unit}\*\*", card)[1]) for unit in units)
    assert nats < 3.73
    assert bits < 1.54
    for fact in ("CC BY-SA 3.0", "seed", "pretrain_embedded.py", "minutes"):
        assert fact in card


def test_it_prefers_english_to_the_same_words_in_disorder(embedded: LanguageModel) -> None:
    words = ["In", "1920", "she", "married", "a", "lawyer", "and", "moved", "with", "him", "to", "London", "."]
    orders = [words, words[::-1], sorted(words), words[5:] + words[:5]]
    with torch.no_grad():
        scores = []
        for order in orders:
            tokens = torch.tensor([embedded.tokenizer(" ".join(order))["input_ids"]])
            logits = embedded.model(tokens).logits.log_softmax(-1)
            scores.append(float(logits[0, :-1].gather(-1, tokens[0, 1:, None]).sum()))
    assert scores[0] > max(scores[1:]) + 5


def test_it_writes_about_men_at_least_three_times_as_often_as_about_women(embedded: LanguageModel) -> None:
    texts = embedded.sample(512, seed=0).texts
    female, male = (float(pronouns(group, possessives=True)(texts).mean()) for group in ("female", "male"))
    assert 0.02 < female < 0.12
    assert male > 3 * female
