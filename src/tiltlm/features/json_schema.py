"""Features of JSON: a text is valid JSON, or fits a JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tiltlm.errors import FeatureError, UsageError, nearest
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.fields import check_reads, input_texts
from tiltlm.features.kinds import feature_kind

CHECKS = ("valid",)


@dataclass(frozen=True, kw_only=True)
class Json(Feature):
    """1 where the text is one JSON value that fits the ``schema`` (JSON text), if there is one; else 0."""

    schema: str | None
    reads: str

    def compute(self, batch: Batch) -> list[float]:
        validator = None if self.schema is None else _validator(self.schema)
        return [float(_holds(text, validator)) for text in input_texts(batch, self.reads)]


@feature_kind("json")
def json_feature(
    check: str = "valid", schema: str | Path | Mapping[str, Any] | None = None, reads: str = "completion"
) -> Json:
    """1 where the text is one ``valid`` JSON value; with ``schema``, where it also fits this JSON Schema.

    JSON follows RFC 8259: ``NaN`` is invalid, and white space around the value is allowed. The schema is a file or a
    mapping, of the draft that its ``$schema`` names (2020-12 by default). A ``$ref`` must stay within the schema.
    ``format`` is not checked. Raises UsageError for an invalid or unreadable schema, FeatureError without the package
    jsonschema.
    """
    if check not in CHECKS:
        raise UsageError(f"json.check: {check!r} is not known; {nearest(str(check), CHECKS)}, or 'schema' with one")
    name, source = "valid JSON", None
    if schema is not None:
        loaded = _read_schema(schema)
        title = loaded.get("title")
        name = title if isinstance(title, str) and 0 < len(title.strip()) <= 60 else "JSON of the schema"
        source = json.dumps(loaded, sort_keys=True)
        _validator(source)
    return Json(name=name.strip(), binary=True, schema=source, reads=check_reads("json", reads))


def _holds(text: str, validator: Any) -> bool:
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return validator is None or bool(validator.is_valid(value))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_schema(schema: Any) -> dict[str, Any]:
    if isinstance(schema, Mapping):
        try:
            return dict(json.loads(json.dumps(schema)))
        except (TypeError, ValueError) as error:
            raise UsageError(f"json.schema: expected JSON values only: {error}") from error
    if not isinstance(schema, str | Path):
        raise UsageError(f"json.schema: expected a file or a mapping, got {schema!r}")
    try:
        loaded = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"json.schema: cannot read '{schema}': {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"json.schema: '{schema}' is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"json.schema: '{schema}' holds a {type(loaded).__name__}; expected an object")
    return loaded


@lru_cache(maxsize=32)
def _validator(schema: str) -> Any:
    """The validator of this schema. Raises UsageError for an invalid schema, FeatureError without jsonschema."""
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry
    except ModuleNotFoundError as error:
        raise FeatureError("json.schema needs the package jsonschema: pip install 'tiltlm[schema]'") from error
    loaded = json.loads(schema)
    kind = validator_for(loaded, default=Draft202012Validator)
    try:
        kind.check_schema(loaded)
    except SchemaError as error:
        raise UsageError(f"json.schema: {error.json_path}: {error.message}") from error
    # With an empty registry it does not fetch the document of a $ref.
    return kind(loaded, registry=Registry())
