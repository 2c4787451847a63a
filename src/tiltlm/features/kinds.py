"""The registry of feature kinds. The decorator on the function that makes a feature declares its kind."""

from __future__ import annotations

import functools
import inspect
import json
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tiltlm.errors import UsageError
from tiltlm.features.feature import Feature, changed

Made = TypeVar("Made", bound=Feature)
Arguments = ParamSpec("Arguments")

# The function of each kind, by its name in a run file.
FEATURE_KINDS: dict[str, Callable[..., Feature]] = {}
COMBINATORS = ("all", "any", "not", "threshold")
# These keys of a feature's mapping have another meaning.
RESERVED = (*COMBINATORS, "name", "object")


def feature_kind(kind: str) -> Callable[[Callable[Arguments, Made]], Callable[Arguments, Made]]:
    """Decorator of a function that makes features: registers it as a kind of the run file.

    Its first parameter is the argument of ``{kind: argument}``; further ones are options. Each feature keeps its call
    as ``spec``, if JSON can hold it. Raises UsageError for a name that is taken or is not a word, and for a function
    without parameters.
    """
    if not isinstance(kind, str) or not kind.isidentifier():
        raise UsageError(f"feature_kind: expected a name of letters, digits and '_', got {kind!r}")

    def decorate(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
        signature, known = inspect.signature(make), FEATURE_KINDS.get(kind)
        # A notebook cell that runs again defines the same function again.
        if kind in RESERVED or (known is not None and _path(known) != _path(make)):
            raise UsageError(f"feature_kind: '{kind}' exists already; choose another name")
        if not signature.parameters:
            raise UsageError(f"feature_kind: '{make.__qualname__}' has no parameter; give it one, with a default")

        @functools.wraps(make)
        def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
            feature, given = make(*args, **kwargs), signature.bind(*args, **kwargs).arguments
            try:
                arguments = json.loads(json.dumps(given, default=os.fspath))
            except (TypeError, ValueError):
                return feature
            first = next(iter(signature.parameters))
            short = [*arguments] == [first] and not isinstance(arguments[first], dict)
            return changed(feature, spec={kind: arguments[first] if short else arguments})

        FEATURE_KINDS[kind] = made
        return made

    return decorate


def _path(make: Callable[..., Feature]) -> tuple[str, str]:
    return make.__module__, make.__qualname__
