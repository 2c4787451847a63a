"""Validation errors of pydantic as one message that names each field, its value and the fix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tiltlm.errors import UsageError, nearest

Model = TypeVar("Model", bound=BaseModel)


def validated(
    model: type[Model], raw: Mapping[str, Any], what: str, valid_keys: Callable[[Sequence[str]], list[str]]
) -> Model:
    """The raw keys and values as a model. Raises UsageError that names each wrong key, its value and the nearest one.

    ``what`` names the kind of file in errors; ``valid_keys`` gives the valid keys at a place of the file.
    """
    try:
        parsed = model.model_validate(dict(raw))
    except ValidationError as error:
        raise UsageError(f"{what}: {_explained(error, valid_keys)}") from error
    _reject_booleans(raw, parsed, "", what)
    return parsed


def _explained(error: ValidationError, valid_keys: Callable[[Sequence[str]], list[str]]) -> str:
    """The errors field by field."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(str(part)))
        problems.setdefault(location, []).append(problem)
    return "; ".join(_explain(field, found, valid_keys) for field, found in problems.items())


def _explain(field: str, problems: Sequence[Any], valid_keys: Callable[[Sequence[str]], list[str]]) -> str:
    """One sentence on one field; a field that may have several types has one problem for each of them."""
    *parents, key = field.split(".")
    kind, value = problems[0]["type"], problems[0]["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        return f"unknown key '{field}'; {nearest(key, valid_keys(parents))}"
    if kind == "missing":
        return f"'{field}' is missing; it has no default"
    if kind == "value_error":
        return f"{field or 'the file'}: {problems[0]['msg'].removeprefix('Value error, ')}"
    wanted = " or ".join(dict.fromkeys(_wanted(problem) for problem in problems))
    shown = repr(value)
    return f"{field}: must be {wanted} (it is {shown if len(shown) <= 80 else shown[:79] + '…'})"


def _wanted(problem: Any) -> str:
    if problem["type"] in ("model_type", "model_attributes_type", "dataclass_type", "dict_type"):
        return "a mapping of keys and values"
    return str(problem["msg"]).removeprefix("Input should be ")


def _is_union_tag(part: str) -> bool:
    return "[" in part or part in ("str", "text", "list", "mapping")


def _reject_booleans(raw: Any, parsed: Any, field: str, what: str) -> None:
    """Raise UsageError for true or false where a number belongs.

    Pydantic reads them as 1 and 0, and a moment of 1 is a filter.
    """
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            inner = parsed.get(key) if isinstance(parsed, Mapping) else getattr(parsed, str(key), None)
            _reject_booleans(value, inner, f"{field}.{key}" if field else str(key), what)
    elif isinstance(raw, list) and isinstance(parsed, list):
        for i, (value, inner) in enumerate(zip(raw, parsed, strict=True)):
            _reject_booleans(value, inner, f"{field}.{i}", what)
    elif isinstance(raw, bool) and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        raise UsageError(f"{what}: {field}: must be a number (it is {raw})")
