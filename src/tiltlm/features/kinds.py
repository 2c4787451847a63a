"""The registry of feature kinds: each is declared once, by the decorator on the function that makes it."""

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


def feature_kind(kind: str) -> Callable[[Callable[Arguments, Made]], Callable[Arguments, Made]]:
    """Decorator of a function that makes features: registers it as a kind of the run file.

    Its first parameter is the argument of ``{kind: argument}``; further ones are options. Each feature keeps its call
    as ``spec``, if JSON can hold it. Raises UsageError for a kind of another module.
    """

    def decorate(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
        signature, known = inspect.signature(make), FEATURE_KINDS.get(kind)
        # A cell of a notebook that runs again may define its kind again.
        if known is not None and known.__module__ != make.__module__:
            raise UsageError(f"feature_kind: '{kind}' exists already; choose another name")

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
