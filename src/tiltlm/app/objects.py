"""Objects that a config names as ``package.module:name``; errors name the field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tiltlm.errors import TiltError, UsageError
from tiltlm.features.callables import load_object


@contextmanager
def at_field(field: str) -> Iterator[None]:
    """Prefix errors raised in the block with the field of the run file."""
    try:
        yield
    except TiltError as error:
        raise type(error)(f"{field}: {str(error).removeprefix('feature: ').removeprefix('python: ')}") from error


def build_object(field: str, name: str, args: dict[str, Any]) -> Any:
    """The object that ``package.module:name`` names, called with ``args`` if it is a class or a function."""
    with at_field(field):
        found: Callable[..., Any] = load_object(name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return found
    try:
        return found(**args)
    except TiltError:
        raise
    except Exception as error:
        raise UsageError(f"{field}: '{name}' called with {args} raised {type(error).__name__}: {error}") from error
