"""Valid JSON, and JSON that fits a schema, against the result of the package jsonschema."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiltlm.errors import FeatureError, UsageError
from tiltlm.features import build_feature, json_feature, run_file_form
from tiltlm.features.json_schema import _validator

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null, true]}', 1.0),
        (' \n"text"\t', 1.0),
        ("17", 1.0),
        ("", 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": 1,}', 0.0),
        ('{"a": 1} and more', 0.0),
        ("NaN", 0.0),
        ("[1, -Infinity]", 0.0),
        ("tRue", 0.0),
        ('"line\nbreak"', 0.0),
        ("[" * 100_000, 0.0),
        ("[" * 100_000 + "]" * 100_000, 0.0),
        ('```json\n{"a": 1}\n```', 0.0),
    ],
)
def test_valid_is_what_the_standard_says(text: str, value: float) -> None:
    assert json_feature()([text]).tolist() == [value]


KEYS = st.sampled_from(["name", "age", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


@given(value=JSON, cut=st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_what_is_written_as_json_is_valid_and_fits_where_the_package_says_so(value: Any, cut: int) -> None:
    text = json.dumps(value)
    assert json_feature()([text]).tolist() == [1.0]
    fits = jsonschema.Draft202012Validator(PERSON).is_valid(value)
    assert json_feature(schema=PERSON)([text]).tolist() == [float(fits)]
    if cut and isinstance(value, dict | list):
        assert json_feature(schema={})([text[:-cut]]).tolist() == [0.0]


def test_a_schema_from_a_file_or_the_run_file(tmp_path: Path) -> None:
    file = tmp_path / "person.json"
    file.write_text(json.dumps({**PERSON, "title": "a person"}))
    texts = ['{"name": "Ada", "age": 36}', '{"name": "Ada", "age": -1}', '{"age": 3}', "[]", '{"name": "Ada"', ""]
    for feature in (json_feature(schema=file), json_feature(schema=str(file)), json_feature(schema=PERSON)):
        assert feature(texts).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
        assert feature.binary
    assert json_feature(schema=file).name == "a person"
    assert json_feature(schema=PERSON).name == "JSON of the schema"


def test_the_draft_that_a_schema_names_is_used() -> None:
    # In draft 4 a bound is made exclusive by a flag, later it is a number of its own.
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "minimum": 3, "exclusiveMinimum": True}
    assert json_feature(schema=old)(["3", "4"]).tolist() == [0.0, 1.0]
    with pytest.raises(UsageError, match=r"json\.schema: \$\.exclusiveMinimum: True is not of type 'number'"):
        json_feature(schema={"minimum": 3, "exclusiveMinimum": True})


def test_references_reach_inside_the_schema_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = {"$defs": {"word": {"type": "string"}}, "items": {"$ref": "#/$defs/word"}}
    assert json_feature(schema=inside)(['["a"]', "[1]"]).tolist() == [1.0, 0.0]

    def fetched(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a schema was fetched")

    monkeypatch.setattr("urllib.request.urlopen", fetched)
    outside = json_feature(schema={"items": {"$ref": "https://example.org/word.json"}})
    with pytest.raises(FeatureError, match=r"Unresolvable: https://example.org/word.json on text 2 of 2, '\[1\]'"):
        outside(["{}", "[1]"])


def test_the_prompt_may_be_the_beginning_of_the_json() -> None:
    assert json_feature(reads="text")([' "Ada"}', " Ada}"], prompts=['{"name":', '{"name":']).tolist() == [1.0, 0.0]


def test_forms_of_the_run_file() -> None:
    assert build_feature("json:valid") == build_feature({"json": "valid"}) == json_feature()
    assert build_feature({"json": {"schema": PERSON}}) == json_feature(schema=PERSON)
    assert json_feature().name == "valid JSON"
    for feature in (json_feature(), json_feature("valid", PERSON), json_feature(schema=PERSON, reads="text")):
        assert pickle.loads(pickle.dumps(feature)) == feature
        assert {feature: 1}[feature] == 1
        for one in (feature, feature.renamed("fits")):
            assert build_feature(json.loads(json.dumps(run_file_form(one)))) == one


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"json": "vaild"}, r"json\.check: 'vaild' is not known; did you mean 'valid'\?.* or 'schema' with one"),
        ({"json": {"shema": {}}}, "json: unknown option 'shema'; did you mean 'schema'"),
        ({"json": {"schema": {"type": "objct"}}}, r"json\.schema: \$\.type: 'objct' is not valid"),
        ({"json": {"schema": "no/such.json"}}, r"json\.schema: cannot read 'no/such.json': No such file"),
        ({"json": {"schema": 3}}, r"json\.schema: expected a file or a mapping, got 3"),
        ({"json": {"schema": {"const": {1, 2}}}}, r"json\.schema: expected JSON values only"),
        ({"json": {"schema": {}, "reads": "pair"}}, r"json\.reads: 'pair' is not known; .*completion, text"),
    ],
)  # fmt: skip
def test_a_wrong_spec_says_what_to_change(spec: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_feature(spec)


def test_a_file_that_holds_no_schema_is_named(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    for content, message in (("{'type': 1}", "is not JSON: "), ("[1]", "holds a list; expected an object")):
        file.write_text(content)
        with pytest.raises(UsageError, match=rf"json\.schema: '.*schema\.json' {message}"):
            json_feature(schema=file)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _validator.cache_clear()
    monkeypatch.setitem(sys.modules, "jsonschema.validators", None)
    assert json_feature()(["1"]).tolist() == [1.0]
    with pytest.raises(FeatureError, match=r"needs the package jsonschema: pip install 'tiltlm\[schema\]'"):
        json_feature(schema=PERSON)
