"""Features of transformers models, against the model called on one text at a time."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    BertModel,
    LlamaForSequenceClassification,
)

from tiltlm.errors import ModelError, TiltError, UsageError
from tiltlm.features import (
    Batch,
    Feature,
    build_feature,
    classifier,
    measure_batch,
    perplexity,
    reward_model,
    run_file_form,
    similarity,
)
from tiltlm.features import models as models_module
from tiny_models import (
    POSITIONS,
    PROMPTS,
    TEXTS,
    bert_config,
    causal_reward_model,
    causal_tokenizer,
    classifier_model,
    embedding_model,
    labels,
    language_model,
    llama_config,
    saved,
    spread,
    tokenizer,
)

TOPICS = ("sports", "music", "other")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind."""
    path = tmp_path_factory.mktemp("models")
    classifier_model(path / "topics", *TOPICS)
    classifier_model(path / "tags", *TOPICS, problem_type="multi_label_classification")
    classifier_model(path / "score", "score", seed=4)
    causal_reward_model(path / "causal-score")
    embedding_model(path / "sentences")
    language_model(path / "lm")
    return path


def ids_of(name: str, text: str, pair: str | None = None, special: bool = True) -> dict[str, torch.Tensor]:
    # Lists of one: a lone "" as the second of a pair is taken for none.
    pairs = None if pair is None else [pair]
    encoded = AutoTokenizer.from_pretrained(name)([text], pairs, add_special_tokens=special, return_tensors="pt")
    known = ("input_ids", "attention_mask") + (("token_type_ids",) if pair is not None else ())
    return {key: encoded[key] for key in known}


def logits_of(name: str, texts: list[str], pairs: list[str] | None = None, special: bool = True) -> torch.Tensor:
    """Logits [N, L] by the model's own class, a text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()
    with torch.no_grad():
        rows = [
            model(**ids_of(name, text, pairs[i] if pairs else None, special)).logits[0] for i, text in enumerate(texts)
        ]
    return torch.stack(rows).double()


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted.double(), rtol=1e-5, atol=1e-5)
    assert len({round(value, 3) for value in wanted.tolist()}) > 3, "the texts are not told apart, so nothing is shown"


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_the_probability_of_a_label_is_the_models_whatever_the_batch(folder: Path, batch_size: int) -> None:
    name = str(folder / "topics")
    for column, label in enumerate(TOPICS):
        feature = classifier(name, label, batch_size=batch_size)
        close(feature(TEXTS), logits_of(name, TEXTS).softmax(-1)[:, column])
        assert (feature.name, feature.binary) == (f"probability of {label}", False)


def test_labels_that_do_not_exclude_each_other_have_a_probability_each(folder: Path) -> None:
    name = str(folder / "tags")
    chances = torch.stack([classifier(name, label)(TEXTS) for label in TOPICS], dim=1)
    torch.testing.assert_close(chances, logits_of(name, TEXTS).sigmoid(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(chances.sum(1), torch.ones(len(TEXTS), dtype=torch.float64))


def test_a_threshold_makes_it_binary(folder: Path) -> None:
    name = str(folder / "topics")
    chances = classifier(name, "music")(TEXTS)
    at = float(chances.median())
    feature = classifier(name, "music", threshold=at)
    assert (feature.name, feature.binary) == ("music", True)
    assert feature(TEXTS).tolist() == (chances >= at).double().tolist()
    assert 0 < feature(TEXTS).sum() < len(TEXTS)
    assert (~feature)(TEXTS).tolist() == (chances < at).double().tolist()
    assert feature.threshold(0.5)(TEXTS).tolist() == feature(TEXTS).tolist()


def test_a_classifier_reads_the_completion_the_text_a_pair_or_a_chat(folder: Path) -> None:
    name = str(folder / "topics")
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, TEXTS, strict=True)]
    chats = [f"[CLS] user {p} [SEP][CLS] assistant {c} [SEP]" for p, c in zip(PROMPTS, TEXTS, strict=True)]
    wanted = {
        "completion": logits_of(name, TEXTS),
        "text": logits_of(name, texts),
        "pair": logits_of(name, PROMPTS, TEXTS),
        "chat": logits_of(name, chats, special=False),
    }
    for reads, logits in wanted.items():
        close(classifier(name, "music", reads=reads)(TEXTS, prompts=PROMPTS), logits.softmax(-1)[:, 1])
    assert len({tuple(logits.flatten().tolist()) for logits in wanted.values()}) == 4


def test_a_chat_of_several_turns_is_read_whole(folder: Path) -> None:
    name = str(folder / "topics")
    messages = [{"role": "user", "content": "the race"}, {"role": "assistant", "content": "he lost"}]
    messages.append({"role": "user", "content": "and she"})
    batch = Batch(["she won", "she won"], ["and she", "and she"], messages=[messages, None])
    found = measure_batch([classifier(name, "music", reads="chat")], batch)[:, 0]
    turns = "".join(f"[CLS] {message['role']} {message['content']} [SEP]" for message in messages)
    chats = [turns + "[CLS] assistant she won [SEP]", "[CLS] user and she [SEP][CLS] assistant she won [SEP]"]
    torch.testing.assert_close(found, logits_of(name, chats, special=False).softmax(-1)[:, 1], rtol=1e-5, atol=1e-5)
    assert found[0] != found[1]


def test_a_reward_is_the_raw_score_of_prompt_and_completion(folder: Path) -> None:
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, TEXTS, strict=True)]
    encoder, causal = str(folder / "score"), str(folder / "causal-score")
    close(reward_model(encoder, reads="pair")(TEXTS, prompts=PROMPTS), logits_of(encoder, PROMPTS, TEXTS)[:, 0])
    # A causal model is read off the last token, so padding must not be taken for it. An empty text is its start token.
    for feature, read in ((reward_model(causal), texts), (reward_model(causal, reads="completion"), TEXTS)):
        close(feature(TEXTS, prompts=PROMPTS), logits_of(causal, [text or "[CLS]" for text in read])[:, 0])
    feature = reward_model(causal)
    assert (feature.name, feature.binary) == ("reward by causal-score", False)


def test_a_causal_model_without_a_padding_token_is_padded_all_the_same(tmp_path: Path) -> None:
    model = spread(LlamaForSequenceClassification(llama_config(num_labels=1)), seed=5)
    name = saved(tmp_path, model, causal_tokenizer(pad_token=None))
    assert AutoTokenizer.from_pretrained(name).pad_token is None
    texts = [text for text in TEXTS if text]
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=torch.ones(2, 3, dtype=torch.long))
    close(reward_model(name)(texts), logits_of(name, texts)[:, 0])


def embeddings_of(name: str, texts: list[str]) -> torch.Tensor:
    model = AutoModel.from_pretrained(name).eval()
    with torch.no_grad():
        return torch.stack([model(**ids_of(name, text)).last_hidden_state[0].mean(0) for text in texts]).double()


def test_similarity_is_the_cosine_of_mean_embeddings_and_the_largest_of_several(folder: Path) -> None:
    name = str(folder / "sentences")
    goals = ["he won the race", "songs of war"]
    found, wanted = embeddings_of(name, TEXTS), embeddings_of(name, goals)
    cosines = torch.nn.functional.cosine_similarity(found[:, None], wanted[None], dim=-1)
    close(similarity(goals[0], name)(TEXTS), cosines[:, 0])
    close(similarity(goals, name, batch_size=2)(TEXTS), cosines.amax(1))
    assert set(cosines.argmax(1).tolist()) == {0, 1}
    torch.testing.assert_close(similarity(TEXTS[3], name)([TEXTS[3]]), torch.ones(1, dtype=torch.float64))
    assert similarity(goals[0], name).name == "similarity to 'he won the race'"
    assert similarity(goals, name).name == "similarity to 'he won the race', …"
    whole = similarity(goals[0], name, reads="text")(TEXTS, prompts=PROMPTS)
    torch.testing.assert_close(whole, similarity(goals[0], name)([p + t for p, t in zip(PROMPTS, TEXTS, strict=True)]))


def logprob_of(name: str, prompt: str, completion: str) -> float:
    """The mean log-probability of the completion's tokens, a token at a time."""
    model, tokens = AutoModelForCausalLM.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    before = [tokens.bos_token_id, *tokens(prompt, add_special_tokens=False)["input_ids"]]
    scored = tokens(completion, add_special_tokens=False)["input_ids"] or [tokens.eos_token_id]
    total = 0.0
    for token in scored:
        with torch.no_grad():
            total += float(model(torch.tensor([before])).logits[0, -1].double().log_softmax(-1)[token])
        before.append(token)
    return total / len(scored)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_that_of_the_completions_tokens(folder: Path, batch_size: int) -> None:
    name = str(folder / "lm")
    alone = torch.tensor([logprob_of(name, "", text) for text in TEXTS])
    after = torch.tensor([logprob_of(name, p, text) for p, text in zip(PROMPTS, TEXTS, strict=True)])
    settings: dict[str, Any] = {"batch_size": batch_size}
    close(perplexity(name, "logprob", **settings)(TEXTS, prompts=PROMPTS), alone)
    close(perplexity(name, "logprob", reads="text", **settings)(TEXTS, prompts=PROMPTS), after)
    torch.testing.assert_close(perplexity(name, **settings)(TEXTS), (-alone).exp().double(), rtol=1e-4, atol=1e-4)
    assert perplexity(name).name == "perplexity under lm"
    assert perplexity(name, "logprob").name == "log-probability under lm"


def test_the_embedded_model_finds_its_own_kind_of_sentence_likelier() -> None:
    feature = perplexity("embedded")
    plain, odd = feature(["He was born in London in 1905.", "Xq zzgh in in the the 77 of of born &&."]).tolist()
    assert 1 < plain < 60 < 200 < odd
    assert run_file_form(feature) == {"perplexity": "embedded"}


def test_what_is_too_long_for_the_model_is_cut(folder: Path) -> None:
    long, cut = "war " * 100, "war " * (POSITIONS - 2)
    topics, lm = str(folder / "topics"), str(folder / "lm")
    assert torch.equal(classifier(topics, "music")([long]), classifier(topics, "music")([cut]))
    short = classifier(topics, "music", max_length=5)
    assert torch.equal(short([long]), classifier(topics, "music")(["war war war"]))
    assert torch.equal(perplexity(lm)([long]), perplexity(lm)(["war " * (POSITIONS - 1)]))
    # The completion is kept and the prompt loses its beginning.
    found = perplexity(lm, "logprob", reads="text")(["she won"], prompts=[long + "the race"])
    kept = "war " * (POSITIONS - 1 - 4) + "the race"
    torch.testing.assert_close(found, torch.tensor([logprob_of(lm, kept, "she won")]).double(), rtol=1e-5, atol=1e-5)


def every(folder: Path) -> list[Feature]:
    return [
        classifier(str(folder / "topics"), "music"),
        classifier(str(folder / "topics"), label="sports", threshold=0.5, batch_size=2, max_length=16, reads="pair"),
        reward_model(str(folder / "causal-score")),
        similarity(["he won", "a race"], str(folder / "sentences")),
        perplexity(str(folder / "lm"), "logprob"),
        perplexity(folder / "lm"),  # type: ignore[arg-type]
    ]


def test_each_keeps_to_what_features_keep_to(folder: Path) -> None:
    for feature in every(folder):
        values = feature(TEXTS, prompts=PROMPTS)
        alone = torch.cat([feature([t], prompts=[p]) for t, p in zip(TEXTS, PROMPTS, strict=True)])
        torch.testing.assert_close(values, alone, rtol=1e-5, atol=1e-5)
        assert values.dtype == torch.float64
        assert not values.is_inference()
        assert torch.equal(values, feature(TEXTS, prompts=PROMPTS))
        assert feature([]).shape == (0,)
        copy = pickle.loads(pickle.dumps(feature))
        assert copy == feature
        assert {feature: 1}[copy] == 1
        assert 0 < len(feature.name) <= 60
        for one in (feature, feature.renamed("other")):
            form = json.loads(json.dumps(run_file_form(one)))
            again = build_feature(form)
            assert again == one
            assert torch.equal(again(TEXTS, prompts=PROMPTS), values)


def test_short_and_long_forms_of_a_run_file(folder: Path) -> None:
    topics, sentences, lm = (str(folder / name) for name in ("topics", "sentences", "lm"))
    forms: list[tuple[Any, Any, Feature]] = [
        (
            {"classifier": topics, "label": "music"},
            {"classifier": {"model": topics, "label": "music"}},
            classifier(topics, "music"),
        ),
        (
            f"reward_model:{folder / 'score'}",
            {"reward_model": {"model": str(folder / "score")}},
            reward_model(str(folder / "score")),
        ),
        (
            {"similarity": "he won", "model": sentences},
            {"similarity": {"to": "he won", "model": sentences}},
            similarity("he won", sentences),
        ),
        (f"perplexity:{lm}", {"perplexity": {"model": lm}}, perplexity(lm)),
    ]
    for short, long, feature in forms:
        assert build_feature(short) == build_feature(long) == feature


def test_a_model_is_loaded_when_it_is_first_needed_and_once_for_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models_module._load.cache_clear()
    monkeypatch.chdir(folder)
    features = [classifier("topics", "music"), classifier(str(folder / "topics"), "sports", threshold=0.5)]
    features.append(classifier("./topics", "other", batch_size=1))
    assert models_module._load.cache_info().currsize == 0
    threads = [threading.Thread(target=feature, args=(TEXTS,)) for feature in features for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert models_module._load.cache_info().misses == 1
    assert len({id(feature.model.loaded) for feature in features}) == 1


def test_half_precision_is_asked_for(folder: Path) -> None:
    name = str(folder / "topics")
    half = classifier(name, "music", dtype="bfloat16")
    assert half.model.loaded.model.dtype == torch.bfloat16
    difference = (half(TEXTS) - classifier(name, "music")(TEXTS)).abs().max()
    assert 0 < difference < 0.1


BUILD_ERRORS: list[tuple[dict[str, Any], type[TiltError], str]] = [
    ({"classifier": "topics"}, UsageError, r"classifier\.label: is missing; valid: sports, music, other"),
    ({"classifier": "topics", "label": "musik"}, UsageError,
     r"classifier\.label: 'topics' has no label 'musik'; did you mean 'music'\? valid: sports, music, other"),
    ({"classifier": "topics", "label": True}, UsageError, "has no label True; valid"),
    ({"classifier": "score", "label": "score"}, UsageError, "'score' has one output, .* use reward_model"),
    ({"classifier": "topics", "label": "music", "threshold": 0}, UsageError, r"threshold: .* above 0, .*got 0"),
    ({"classifier": "topics", "label": "music", "threshold": 50}, UsageError, "at most 1, got 50"),
    ({"classifier": "topics", "label": "music", "threshold": True}, UsageError, "got True"),
    ({"classifier": "topics", "labels": "music"}, UsageError, "unknown option 'labels'; did you mean 'label'"),
    ({"classifier": "topcis", "label": "music"}, ModelError,
     r"classifier\.model: .* could be loaded from 'topcis' \(as a folder here or a name on the hub\)"),
    ({"classifier": "./models/topics", "label": "music"}, ModelError, r"topics' .*: there is no such folder\."),
    ({"classifier": 7, "label": "music"}, UsageError, r"classifier\.model: expected a folder or a name .*, got 7"),
    ({"classifier": "topics", "label": "music", "reads": "prompt"}, UsageError,
     r"classifier\.reads: 'prompt' is not known; .*valid: completion, text, pair, chat"),
    ({"classifier": "topics", "label": "music", "device": "gpu"}, UsageError, r"device: 'gpu' cannot be used here"),
    ({"classifier": "topics", "label": "music", "dtype": "float61"}, UsageError, "did you mean 'float16'"),
    ({"classifier": "topics", "label": "music", "batch_size": 0}, UsageError, "batch_size: .* above 0, got 0"),
    ({"classifier": "topics", "label": "music", "max_length": 1.5}, UsageError, "max_length: .* above 0, got 1.5"),
    ({"classifier": "topics", "label": "music", "max_length": 99}, UsageError,
     f"max_length: 99 is too long for 'topics'; give at most {POSITIONS} tokens"),
    ({"classifier": "topics", "label": "music", "trust_remote_code": "yes"}, UsageError, "true or false, got 'yes'"),
    ({"reward_model": "topics"}, UsageError, r"'topics' has 3 outputs, not one; use classifier"),
    ({"reward_model": ""}, UsageError, r"reward_model\.model: expected a folder"),
    ({"similarity": "he won"}, UsageError, "similarity: 'model' is missing"),
    ({"similarity": [], "model": "sentences"}, UsageError, r"similarity\.to: expected a text or a list of texts"),
    ({"similarity": ["he", 3], "model": "sentences"}, UsageError, r"expected a text or a list of texts, got \['he', 3"),
    ({"similarity": "he won", "model": "sentences", "reads": "pair"}, UsageError, "valid: completion, text$"),
    ({"perplexity": "lm", "value": "loss"}, UsageError, r"perplexity\.value: 'loss' is not known; .*perplexity, logp"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "kind", "message"), BUILD_ERRORS)
def test_what_is_wrong_as_stated_is_said_before_any_weight_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, spec: dict[str, Any], kind: type[TiltError], message: str
) -> None:
    monkeypatch.chdir(folder)
    before = models_module._load.cache_info().misses
    with pytest.raises(kind, match=message):
        build_feature(spec)
    assert models_module._load.cache_info().misses == before


def headless(path: Path) -> Feature:
    saved(path, BertModel(bert_config(**labels("a", "b"))), tokenizer())
    return classifier(str(path), "a")


def without_safetensors(path: Path) -> Feature:
    classifier_model(path, "a", "b")
    weights = BertForSequenceClassification.from_pretrained(path).state_dict()
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    return classifier(str(path), "a")


def without_tokenizer(path: Path) -> Feature:
    saved(path, BertForSequenceClassification(bert_config(**labels("a", "b"))), None)
    return classifier(str(path), "a")


def of_another_shape(path: Path) -> Feature:
    classifier_model(path, "a", "b")
    config = json.loads((path / "config.json").read_text())
    config.update(labels("a", "b", "c"))
    (path / "config.json").write_text(json.dumps(config))
    return classifier(str(path), "c")


def damaged(path: Path) -> Feature:
    classifier_model(path, "a", "b")
    (path / "model.safetensors").write_bytes(b"no tensors")
    return classifier(str(path), "a")


def without_template(path: Path) -> Feature:
    saved(path, BertForSequenceClassification(bert_config(**labels("a", "b"))), tokenizer())
    return classifier(str(path), "a", reads="chat")


def without_start(path: Path) -> Feature:
    language_model(path)
    tokenizer().save_pretrained(path)
    return perplexity(str(path))


def no_language_model(path: Path) -> Feature:
    embedding_model(path)
    return perplexity(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (headless, r"classifier\.model: .* 2 weights of BertForSequenceClassification are missing \(classif"),
        (without_safetensors, r"classifier\.model: .*safetensors"),
        (without_tokenizer, r"classifier\.model: .*tokenizer"),
        (of_another_shape, r"its weight classifier\.bias has shape \(2,\), but config.json gives \(3,\)"),
        (damaged, r"classifier\.model: no such model could be loaded"),
        (without_template, r"classifier: the tokenizer of '.*' has no chat template; use reads: text"),
        (without_start, r"perplexity\.model: the tokenizer of '.*' has neither a BOS nor an EOS token"),
        (no_language_model, r"perplexity\.model: .* weights of BertLMHeadModel are missing"),
    ],
)
def test_a_model_that_cannot_be_used_says_why(tmp_path: Path, make: Callable[[Path], Feature], message: str) -> None:
    feature = make(tmp_path)
    with pytest.raises(ModelError, match=message) as raised:
        feature(TEXTS)
    assert "\n" not in str(raised.value)


def test_code_that_comes_with_a_model_runs_only_when_asked_for(tmp_path: Path) -> None:
    classifier_model(tmp_path, "a", "b")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "mine.MyConfig",
        "AutoModelForSequenceClassification": "mine.MyModel",
    }
    config["model_type"] = "mine"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class MyConfig(BertConfig):\n    model_type = 'mine'\n"
        "class MyModel(BertForSequenceClassification):\n    config_class = MyConfig\n"
    )
    with pytest.raises(ModelError, match=r"classifier\.model: .*trust_remote_code"):
        classifier(str(tmp_path), "a")
    assert not (tmp_path / "ran").exists()
    trusted = classifier(str(tmp_path), "a", trust_remote_code=True)
    assert trusted(TEXTS).shape == (len(TEXTS),)
    assert (tmp_path / "ran").exists()
