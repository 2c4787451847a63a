"""YAML files of keys and values, and dotted overrides of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tiltlm.errors import UsageError


class _Loader(yaml.SafeLoader):
    """YAML's plain data; 1e-4 is a number, as in YAML 1.2, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:i]]:
                problem = f"the key '{key.value}' appears twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None or error.problem_mark is None:
        return " ".join(str(error).split())
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def read_mapping(path: Path, overrides: Sequence[str], what: str, example: str, advice: str) -> dict[str, Any]:
    """The keys and values of a YAML file after ``key=value`` overrides (dotted keys). Raises UsageError.

    ``what`` names the kind of file in errors, ``example`` shows valid content, ``advice`` says where to start.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what}: {path} cannot be read ({error}); {advice}") from error
    try:
        raw = _read_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{what}: {path} is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{what}: {path} must have keys and values, such as {example}; it has {raw!r:.60}")
    for override in overrides:
        apply_override(raw, override)
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted ``key=value`` in a raw config; the value is parsed as YAML. Raises UsageError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"'{override}': an override has the form key=value, e.g. training.max_steps=100")
    try:
        parsed = _read_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"'{override}': the value is not valid YAML: {_yaml_problem(error)}") from error
    *parents, last = key.split(".")
    place: Any = raw
    for part in parents:
        if isinstance(place, list):
            place = place[_index(place, part, override)]
            continue
        inner = place.get(part)
        if isinstance(inner, str) and part == "method":
            inner = {"name": inner}
        if isinstance(inner, str) and part == "prompts":
            inner = {"path": inner}
        if not isinstance(inner, dict | list):
            inner = {}
        place[part] = inner
        place = inner
    if isinstance(place, list):
        place[_index(place, last, override)] = parsed
    elif last == "feature" or not isinstance(place.get(last), dict) or isinstance(parsed, dict) or parsed is None:
        place[last] = parsed
    elif last == "method":
        place[last] = {**place[last], "name": parsed}
    else:
        raise UsageError(f"'{override}': {key} has keys of its own ({', '.join(place[last])}); name one of them")


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UsageError(f"'{override}': '{part}' is not an index of a list of {len(items)}; count from 0")
    return int(part)
