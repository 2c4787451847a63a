"""Properties of every built-in feature."""

from __future__ import annotations

import itertools
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlm.features import (
    Feature,
    all_of,
    any_of,
    build_feature,
    builtin_wordlists,
    contains,
    length,
    measure,
    negation,
    pronouns,
    regex,
    run_file_form,
    sentiment,
    wordlist,
)

LEXICAL = [
    contains("amazing"),
    contains("prime minister", ignore_case=False),
    *[wordlist(name) for name in builtin_wordlists()],
    regex(r"\d{4}"),
    pronouns("female"),
    pronouns("male", possessives=True),
]
COMBINED_LEXICAL = [
    all_of(wordlist("sports"), pronouns("male")),
    any_of(contains("war"), regex("[A-Z]{2,}")),
    wordlist("music") & ~pronouns("male"),
    regex(r"\d").threshold(0.5),
]
OTHERS = [
    pronouns("neither"),
    length("words"),
    length("characters"),
    length("tokens"),
    length("words").threshold(5, "<"),
    sentiment("positive"),
    sentiment("negative"),
    sentiment("compound"),
    negation(wordlist("art")),
]
EVERY = LEXICAL + COMBINED_LEXICAL + OTHERS
TEXTS = [
    "",
    " \n\t ",
    "She said that her amazing album was painted by herself.",
    "He scored 103 in the innings of 1948, and his team-mates loved him.",
    "The prime minister visited the cathedral with an army of chefs and computer scientists.",
    "The physicist's museum of oil paintings went bankrupt; a horrible war.",
    "naïve café — “quotes”, emoji 🎼, 日本語, e\u0301tude, NASA's <script>alert(1)</script>",
    "x" * 5000,
]


def token_ids(texts: list[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.mark.parametrize("feature", EVERY, ids=lambda feature: feature.name)
def test_values_are_finite_float64_one_per_text_and_repeatable(feature: Feature) -> None:
    first = feature(TEXTS, completion_ids=token_ids(TEXTS))
    assert first.dtype == torch.float64
    assert first.shape == (len(TEXTS),)
    assert first.isfinite().all()
    assert torch.equal(first, feature(TEXTS, completion_ids=token_ids(TEXTS)))


@pytest.mark.parametrize("feature", EVERY, ids=lambda feature: feature.name)
def test_a_text_has_the_same_value_alone_and_in_company(feature: Feature) -> None:
    together = feature(TEXTS, completion_ids=token_ids(TEXTS))
    alone = torch.cat([feature([text], completion_ids=token_ids([text])) for text in TEXTS])
    assert torch.equal(together, alone)
    assert feature([], completion_ids=[]).shape == (0,)


@pytest.mark.parametrize("feature", EVERY, ids=lambda feature: feature.name)
def test_a_binary_feature_is_0_or_1_and_names_itself_shortly(feature: Feature) -> None:
    values = feature(TEXTS, completion_ids=token_ids(TEXTS))
    if feature.binary:
        assert set(values.tolist()) <= {0.0, 1.0}
    else:
        assert len(set(values.tolist())) > 2
    assert 0 < len(feature.name) <= 60
    assert feature.name == feature.name.strip()


@pytest.mark.parametrize("feature", EVERY, ids=lambda feature: feature.name)
def test_features_are_immutable_hashable_values_that_survive_pickling(feature: Feature) -> None:
    copy = pickle.loads(pickle.dumps(feature))
    assert copy == feature
    assert {feature: 1}[copy] == 1
    assert feature.renamed("other").name == "other"
    assert feature.name != "other"
    with pytest.raises(AttributeError):
        feature.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("feature", EVERY, ids=lambda feature: feature.name)
def test_the_run_files_form_of_a_feature_is_json_and_makes_it_again(feature: Feature) -> None:
    for one in (feature, feature.renamed("other"), pickle.loads(pickle.dumps(feature))):
        form = json.loads(json.dumps(run_file_form(one)))
        assert build_feature(form) == one
        assert ("name" in form) == (one.name != feature.name)


@pytest.mark.parametrize("feature", LEXICAL + COMBINED_LEXICAL, ids=lambda feature: feature.name)
def test_every_lexical_feature_fires_somewhere_and_not_everywhere(feature: Feature) -> None:
    examples = [*TEXTS, "Vocals by the jazz singer.", "Boil the pasta, then stir it into the garlic sauce."]
    examples += ["The senators voted.", "The revenue of the corporation fell.", "The album was released by CBS."]
    examples += ["An algorithm for the compiler.", "The sermon was preached at mosques."]
    assert 0 < feature(examples).sum() < len(examples)


@pytest.mark.parametrize("feature", LEXICAL + COMBINED_LEXICAL, ids=lambda feature: feature.name)
@given(text=st.one_of(st.sampled_from(TEXTS), st.text(max_size=80)))
@settings(max_examples=30, deadline=None)
def test_evidence_lies_inside_the_text_and_is_there_where_a_lexical_feature_fires(feature: Feature, text: str) -> None:
    spans = feature.evidence(text)
    for start, end in spans:
        assert 0 <= start < end <= len(text)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    if feature([text]).item() == 1.0:
        assert spans
    elif feature in LEXICAL:
        assert spans == []


@given(texts=st.lists(st.text(max_size=60), max_size=6))
@settings(max_examples=40, deadline=None)
def test_measure_puts_each_feature_in_its_column(texts: list[str]) -> None:
    values = measure(EVERY, texts, completion_ids=token_ids(texts))
    assert values.shape == (len(texts), len(EVERY))
    assert values.dtype == torch.float64
    for k, feature in enumerate(EVERY):
        assert torch.equal(values[:, k], feature(texts, completion_ids=token_ids(texts)))


@given(text=st.text(max_size=80))
@settings(max_examples=60, deadline=None)
def test_combinations_obey_de_morgan(text: str) -> None:
    a, b = regex("[a-m]"), regex("[n-zA-Z0-9]")
    assert (~(a & b))([text]) == (~a | ~b)([text])
    assert (~(a | b))([text]) == (~a & ~b)([text])
    assert (~~a)([text]) == a([text])


def test_no_features_measure_as_no_columns() -> None:
    assert measure([], ["a", "b"]).shape == (2, 0)


def test_importing_the_features_loads_no_package_that_one_of_them_needs() -> None:
    import subprocess
    import sys

    code = "import sys, tiltlm.features; print({'vaderSentiment', 'transformers', 'jsonschema'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("pronouns:female", "female"),
        ({"pronouns": "neither"}, "neither gender"),
        ({"wordlist": "sports"}, "sports"),
        ({"contains": "amazing"}, "contains 'amazing'"),
        ({"length": "words"}, "length in words"),
        ({"sentiment": "positive"}, "positive sentiment"),
        ({"sentiment": "compound"}, "sentiment"),
        ({"regex": r"\d+"}, r"matches '\d+'"),
        ({"not": {"wordlist": "sports"}}, "not sports"),
        ({"all": ["pronouns:female", "wordlist:sports"]}, "female and sports"),
        ({"all": ["pronouns:female", {"any": ["wordlist:art", "wordlist:music"]}]}, "female and (art or music)"),
        ({"not": {"any": ["wordlist:art", "wordlist:music"]}}, "not (art or music)"),
        ({"all": [{"all": ["wordlist:art", "wordlist:music"]}, "wordlist:science"]}, "art and music and science"),
        ({"threshold": {"feature": "length:words", "at": 20}}, "length in words >= 20"),
        ({"not": {"threshold": {"feature": "length:words", "at": 20}}}, "not (length in words >= 20)"),
        ({"any": ["wordlist:art", "wordlist:music"], "name": "arts"}, "arts"),
        ({"not": {"any": ["wordlist:art", "wordlist:music"], "name": "arts"}}, "not arts"),
        ({"wordlist": ["goal", "match", "cup"]}, "any of 'goal', 'match', …"),
    ],
)
def test_default_names_read_well(spec: object, name: str) -> None:
    assert build_feature(spec).name == name  # type: ignore[arg-type]
