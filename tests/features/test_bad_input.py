"""Wrong features, specs and return values: each gets one clear message that says what to change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltlm.errors import FeatureError, UsageError
from tiltlm.features import (
    all_of,
    any_of,
    build_feature,
    callable_feature,
    contains,
    feature,
    length,
    measure,
    negation,
    sentiment,
    wordlist,
)

TEXTS = ["Once upon a time", "there was a bad text", "and a good one", "The end."]
FEMALE = {"pronouns": "female"}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"contians": "war"}, "unknown feature 'contians'; did you mean 'contains'"),
        ("pronoun:female", "unknown feature 'pronoun:female'.*did you mean 'pronouns'"),
        ("female", "unknown feature 'female'"),
        ("my_rewards:brevity", "write 'python:my_rewards:brevity'"),
        ("all:female", "needs the long form"),
        ({}, "unknown feature ''"),
        ({"name": "x"}, "unknown feature ''"),
        (["contains", "war"], "expected a mapping"),
        (7, "expected a mapping.*got 7"),
        (None, "expected a mapping.*got None"),
        ({"contains": "war", "regex": "x"}, "contains and regex in one mapping"),
        ({"contains": ""}, r"contains\.phrase: is empty"),
        ({"contains": "  \t"}, r"contains\.phrase: is empty"),
        ({"contains": 1984}, r"contains\.phrase: expected text, got 1984 \(int\); put it in quotes"),
        ({"contains": True}, "got True"),
        ({"contains": None}, "got None"),
        ({"contains": {}}, "contains: 'phrase' is missing"),
        ({"contains": {"phrase": "war", "ignorecase": True}}, "'ignorecase'; did you mean 'ignore_case'"),
        ({"contains": {"phrase": "war", "ignore_case": "yes"}}, r"contains\.ignore_case: expected true or false"),
        ({"contains": "war", "naem": "x"}, "'naem'; did you mean 'name'"),
        ({"contains": "war", "args": {}}, "unknown option 'args'"),
        ({"contains": "war", "name": ""}, "name: expected a word or a few, got ''"),
        ({"contains": "war", "name": 3}, "name: expected a word or a few, got 3"),
        ({"wordlist": "sprots"}, "no list or file named 'sprots'; did you mean 'sports'.*computing"),
        ({"wordlist": "missing/words.txt"}, "cannot read 'missing/words.txt': No such file"),
        ({"wordlist": "."}, "cannot read '.': Is a directory"),
        ({"wordlist": ""}, "wordlist: is empty"),
        ({"wordlist": []}, "holds no words"),
        ({"wordlist": ["war", 7]}, "expected a list's name, a file, or a list of words"),
        ({"wordlist": 7}, "got 7"),
        ({"regex": "a(b"}, r"'a\(b' does not compile: missing \), unterminated subpattern at position 1"),
        ({"regex": "*"}, r"nothing to repeat at position 0, before '\*'"),
        ({"regex": "a{99999999999999999999}"}, "does not compile"),
        ({"regex": ""}, "expected a regular expression"),
        ({"regex": 3}, "expected a regular expression in quotes, got 3"),
        ({"regex": {"pattern": "a", "multi_line": True}}, "did you mean 'multiline'"),
        ({"length": "word"}, "unknown unit 'word'; did you mean 'words'"),
        ({"length": None}, "unknown unit None"),
        ({"pronouns": "femal"}, "unknown group 'femal'; did you mean 'female'"),
        ({"pronouns": {"group": "male", "possessives": 1}}, "expected true or false, got 1"),
        ({"sentiment": "postive"}, "unknown kind 'postive'; did you mean 'positive'"),
        ({"not": {"length": "words"}}, "'length in words' is not binary; apply a threshold"),
        ({"not": [FEMALE]}, "expected a mapping"),
        ({"all": [FEMALE, {"sentiment": "compound"}]}, "'and' needs binary features, and 'sentiment'"),
        ({"any": []}, "any: expected a list of features"),
        ({"all": FEMALE}, "all: expected a list of features"),
        ({"any": "pronouns:female"}, "any: expected a list of features"),
        ({"any": [FEMALE], "op": ">"}, "unknown option 'op'"),
        ({"threshold": 0.5}, r"threshold: expected \{feature"),
        ({"threshold": {"feature": FEMALE}}, "threshold: 'at' is missing"),
        ({"threshold": {"at": 0.5}}, "threshold: 'feature' is missing"),
        ({"threshold": {"feature": FEMALE, "at": "0.5"}}, r"threshold\.at: expected a finite number, got '0.5'"),
        ({"threshold": {"feature": FEMALE, "at": float("nan")}}, "got nan"),
        ({"threshold": {"feature": FEMALE, "at": 1, "op": "=>"}}, "unknown comparison '=>'; valid: >= > <= <"),
        ({"python": "no_colon"}, "expected 'package.module:name', got 'no_colon'"),
        ({"python": "a:b:c"}, "expected 'package.module:name'"),
        ({"python": "../rewards.py:f"}, "expected 'package.module:name'"),
        ({"python": 3}, "expected 'package.module:name', got 3"),
        ({"python": "no_such_module_here:f"}, "no module 'no_such_module_here'.*looked in"),
        ({"python": "os.no_such:f"}, "no module 'os.no_such'"),
        ({"python": "textwrap:shortn"}, "'textwrap' has no 'shortn'; did you mean 'shorten'"),
        ({"python": "math:pi"}, "is not a function but 3.14"),
        ({"python": "textwrap:dedent", "binary": "yes"}, "binary: expected true or false"),
        ({"python": "textwrap:dedent", "args": [1]}, "args of 'textwrap:dedent' must be a mapping"),
        ({"python": "textwrap:indent", "args": {"prefx": ""}}, "takes no argument 'prefx'; did you mean 'prefix'"),
        ({"python": "textwrap:dedent", "args": {"text": "a"}}, "must return a function, got 'a'"),
        ({"python": "textwrap:dedent", "args": {"text": 3}}, "calling 'textwrap:dedent' with its args raised"),
        ({"python": "fractions:Fraction", "args": {"a": 1}}, "takes no argument 'a'"),
        ({"python": "textwrap:dedent", "arg": {}}, "unknown option 'arg'; did you mean 'args'"),
    ],
)
def test_a_wrong_spec_says_what_to_change(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_feature(spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no words"),
        (b"\n  \n# only a comment\n", "holds no words"),
        (b"caf\xe9\n", r"is not UTF-8 text \(byte 3\)"),
    ],
)
def test_a_wrong_word_list_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=message) as raised:
        build_feature({"wordlist": str(file)})
    assert "words.txt" in str(raised.value)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, r"returned None; expected one finite number per text \(is a `return` missing"),
        (0.5, r"returned 0.5 \(float\).*in a list"),
        ("0101", r"returned '0101' \(str\)"),
        ({"a": 1.0}, r"\(dict\)"),
        ([1.0, 0.0, 1.0], "returned 3 values for 4 texts"),
        ([], "returned 0 values for 4 texts"),
        ([1.0, None, 0.0, 1.0], "returned None for text 2 of 4, 'there was a bad text'.*TRL would skip"),
        ([1.0, float("nan"), 0.0, 1.0], "returned nan for text 2 of 4, 'there was a bad text'; expected one finite"),
        ([1.0, 0.0, float("-inf"), 1.0], "returned -inf for text 3 of 4, 'and a good one'"),
        (["0", "1", "0", "1"], "returned '0' for text 1 of 4"),
        ([[1.0], [0.0], [1.0], [0.0]], r"returned \[1.0\] for text 1"),
        ([1.0, 1j, 0.0, 0.0], "returned 1j for text 2"),
        (torch.zeros(4, 1), r"an array of shape \(4, 1\); expected shape \(4,\)"),
        (torch.zeros(3), r"an array of shape \(3,\)"),
        (torch.tensor(1.0), r"an array of shape \(\)"),
        (torch.tensor([0.0, float("inf"), 0.0, 0.0]), "returned inf for text 2"),
    ],
)
def test_a_wrong_return_value_names_feature_text_and_expectation(output: Any, message: str) -> None:
    broken = callable_feature(lambda texts: output, name="broken")
    with pytest.raises(FeatureError, match=message) as raised:
        measure([contains("time"), broken], TEXTS)
    assert str(raised.value).startswith("feature 'broken' returned")


def test_what_is_declared_binary_must_be_0_or_1() -> None:
    half = callable_feature(lambda texts: [0.5] * len(texts), name="half", binary=True)
    with pytest.raises(FeatureError, match=r"feature 'half' returned 0\.5 for text 1 of 4.*declared binary"):
        measure([~half], TEXTS)


@pytest.mark.parametrize("bad_row", range(4))
def test_an_exception_names_the_feature_and_the_text_that_caused_it(bad_row: int) -> None:
    @feature
    def picky(texts: list[str]) -> list[float]:
        return [1 / (text != TEXTS[bad_row]) for text in texts]

    message = f"feature 'picky' raised ZeroDivisionError: .* on text {bad_row + 1} of 4, '{TEXTS[bad_row]}'; expected"
    with pytest.raises(FeatureError, match=message) as raised:
        measure([contains("time"), picky], TEXTS, prompts=["a", "b", "c", "d"], column=[1, 2, 3, 4])
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_single_text_causes_blames_none() -> None:
    @feature
    def crowded(texts: list[str]) -> list[float]:
        assert len(texts) < 3, "too many"
        return [0.0] * len(texts)

    with pytest.raises(FeatureError, match="feature 'crowded' raised AssertionError: too many; expected"):
        crowded(TEXTS)


def test_a_long_text_is_shortened_in_the_message() -> None:
    broken = callable_feature(lambda texts: [float("nan")], name="broken")
    with pytest.raises(FeatureError) as raised:
        broken(["word " * 1000])
    assert len(str(raised.value)) < 200


def test_interrupting_is_not_an_error_of_the_feature() -> None:
    def interrupted(texts: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        callable_feature(interrupted)(TEXTS)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completions, ground_truth: [],
            "'ground_truth', which is not available; available: prompts, completion",
        ),
        (lambda completions, trainer_state: [], "'trainer_state'; a target is fixed"),
        (lambda completion_ids: [], "'completion_ids', which is not available"),
        (lambda prompts, texts: [], "'texts', which is not available"),
    ],
)
def test_a_function_that_asks_for_more_than_there_is(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        callable_feature(function)(TEXTS)


def test_length_in_tokens_needs_token_ids() -> None:
    with pytest.raises(FeatureError, match="'length in tokens' counts token ids; pass completion_ids"):
        measure([length("tokens")], TEXTS)


def test_texts_prompts_and_ids_must_fit_together() -> None:
    with pytest.raises(UsageError, match="texts: expected a list of texts, got one string"):
        contains("war")("a war")
    with pytest.raises(UsageError, match="prompts: 1 entries for 4 texts"):
        measure([contains("war")], TEXTS, prompts=["a"])
    with pytest.raises(UsageError, match="completion_ids: 0 entries for 4 texts"):
        measure([contains("war")], TEXTS, completion_ids=[])
    with pytest.raises(FeatureError, match=r"raised TypeError.* on text 2 of 2, None"):
        contains("war")(["a", None])  # type: ignore[list-item]


def test_only_binary_features_combine() -> None:
    for combine in (lambda: contains("a") & length(), lambda: length() | contains("a"), lambda: ~sentiment()):
        with pytest.raises(UsageError, match="is not binary; apply a threshold to it first"):
            combine()
    with pytest.raises(UsageError, match="'and' combines features, got 'war'"):
        all_of(contains("a"), "war")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'or' needs at least one feature"):
        any_of()
    with pytest.raises(UsageError, match="'not' combines features, got None"):
        negation(None)  # type: ignore[arg-type]


def test_what_is_no_function_is_no_feature() -> None:
    with pytest.raises(UsageError, match="expected a function of the texts, got 'war'"):
        callable_feature("war")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'lambda' takes no arguments; a feature is a function of the texts"):
        callable_feature(lambda: [0.0])
    with pytest.raises(UsageError, match="expected a list's name"):
        wordlist(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dependency", "importing 'broken_rewards' failed: No module named 'no_such_dependency'"),
        ("1 / 0", "importing 'broken_rewards' raised ZeroDivisionError: division by zero"),
        ("def f(:", "importing 'broken_rewards' raised SyntaxError"),
    ],
)
def test_a_module_that_fails_to_import_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_rewards.py").write_text(source)
    with pytest.raises(FeatureError, match=message):
        build_feature("python:broken_rewards:f")
