"""Run-file forms of features: the recorded call, or the name from which a function is imported."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiltlm.errors import UsageError
from tiltlm.features import Feature, build_feature, callable_feature, contains, python_feature, run_file_form, wordlist
from tiltlm.features.registry import OBJECT

MODULE = """
from tiltlm.features import Feature, feature

def brevity(texts, words=20):
    return [max(0.0, 1 - len(text.split()) / words) for text in texts]

@feature(binary=True, name="short text")
def short(texts):
    return [float(len(text) < 10) for text in texts]

def at_most(words):
    return lambda texts: [float(len(text.split()) <= words) for text in texts]

class Exclaims(Feature):
    def compute(self, batch):
        return [float("!" in text) for text in batch.texts]
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "my_measures.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_measures  # type: ignore[import-not-found]

    yield my_measures
    del sys.modules["my_measures"]


def again(feature: Feature) -> Feature:
    """The feature made from its form, after a round trip through JSON."""
    form = json.loads(json.dumps(run_file_form(feature)))
    assert form is not None
    return build_feature(form)


def test_the_form_is_short_where_it_can_be() -> None:
    assert run_file_form(build_feature("pronouns:female")) == {"pronouns": "female"}
    assert run_file_form(wordlist("sports") & ~contains("war")) == {
        "all": [{"wordlist": "sports"}, {"not": {"contains": "war"}}]
    }
    assert run_file_form(contains("US", ignore_case=False).renamed("America")) == {
        "contains": {"phrase": "US", "ignore_case": False},
        "name": "America",
    }


def test_word_lists_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "birds.txt").write_text("owl\nlark\n")
    for feature in (wordlist(tmp_path / "birds.txt"), wordlist(("owl", "lark"))):
        assert again(feature) == feature


def test_functions_of_a_module_are_imported_by_their_names(mine: Any) -> None:
    assert run_file_form(callable_feature(mine.brevity)) == {"python": "my_measures:brevity"}
    assert run_file_form(mine.short) == {"python": "my_measures:short"}
    for feature in (
        callable_feature(mine.brevity, name="brief"),
        callable_feature(mine.brevity, binary=True, conversational=True),
        mine.short,
        mine.short.renamed("tiny"),
        mine.short & contains("a"),
        callable_feature(mine.brevity).threshold(0.5),
    ):
        assert again(feature) == feature


def test_what_was_made_by_name_keeps_its_arguments(mine: Any) -> None:
    for target, args in (("at_most", {"words": 2}), ("Exclaims", {"name": "exclaims", "binary": True})):
        feature = python_feature(f"my_measures:{target}", args=args)
        made = again(feature)
        assert (made.name, made.binary) == (feature.name, feature.binary)
        assert made(["a b c", "a!"]).tolist() == feature(["a b c", "a!"]).tolist() == [0.0, 1.0]


def local() -> Any:
    def inner(texts: list[str]) -> list[float]:
        return [1.0 for _ in texts]

    return inner


def test_what_no_other_process_can_name_has_no_form(mine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    in_main = callable_feature(mine.brevity)
    monkeypatch.setattr(mine.brevity, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "brevity", mine.brevity, raising=False)
    shadowed = callable_feature(mine.at_most)
    monkeypatch.setattr(mine, "at_most", len)
    features = [
        in_main,
        shadowed,
        callable_feature(lambda texts: [1.0 for _ in texts]),
        callable_feature(local()),
        callable_feature(functools.partial(mine.brevity, words=3)),
        mine.Exclaims(name="exclaims", binary=True),
        python_feature("my_measures:Exclaims", args={"name": "exclaims", "binary": len}),
        callable_feature(mine.short.function, binary=False),
    ]
    for feature in features:
        assert run_file_form(feature) is None, feature
    assert run_file_form(contains("a") & mine.Exclaims(name="exclaims", binary=True)) is None


def test_the_record_of_such_a_feature_says_what_to_do() -> None:
    with pytest.raises(UsageError, match=r"feature: 'wordy' was given in Python .* a module defines, or .*features=\["):
        build_feature({OBJECT: "wordy"})
