"""Features from a user's Python functions: plain functions and TRL reward functions."""

from __future__ import annotations

import asyncio
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

from tiltlm.errors import FeatureError, TiltError, UsageError, nearest
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.kinds import feature_kind

TRL_NAMES = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True, kw_only=True)
class CallableFeature(Feature):
    """The return values of a Python function.

    ``conversational`` passes prompts and completions as lists of messages, as TRL does for chat data sets.
    """

    function: Callable[..., Any]
    conversational: bool = False

    def compute(self, batch: Batch) -> Any:
        positional, keywords = _arguments(self, batch)
        try:
            output = self.function(*positional, **keywords)
            return _awaited(output) if inspect.isawaitable(output) else output
        except TypeError as error:
            if "string ind" in str(error) and "completions" in keywords and not self.conversational:
                hint = "it seems to expect chat messages: set conversational: true"
                raise FeatureError(f"feature '{self.name}' raised TypeError: {error}; {hint}") from error
            raise


def callable_feature(
    function: Callable[..., Any], *, name: str | None = None, binary: bool = False, conversational: bool = False
) -> CallableFeature:
    """A feature from ``f(texts) -> list[float]`` or from a TRL reward function; the parameters decide which it is.

    A function with a parameter ``completions`` or ``completion_ids``, with ``prompts`` first, or with ``**kwargs``
    alone is called as in TRL, by keywords: the prompts ("" for a missing one), completions, completion_ids and columns
    that it names. Any other function gets the list of texts first. ``binary`` declares that it returns only 0 and 1.
    Raises UsageError if it cannot be called.
    """
    if not callable(function):
        raise UsageError(f"expected a function of the texts, got {function!r} ({type(function).__name__})")
    signature = _signature(function)
    if signature is not None and not signature.parameters:
        raise UsageError(f"'{_name(function)}' takes no arguments; a feature is a function of the texts")
    for option, value in (("binary", binary), ("conversational", conversational)):
        if not isinstance(value, bool):
            raise UsageError(f"{option}: expected true or false, got {value!r}")
    made = CallableFeature(name=_name(function), binary=binary, function=function, conversational=conversational)
    return made if name is None else made.renamed(name)


@overload
def feature(function: Callable[..., Any], /) -> CallableFeature: ...
@overload
def feature(*, name: str | None = None, binary: bool = False) -> Callable[[Callable[..., Any]], CallableFeature]: ...
def feature(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None, binary: bool = False
) -> CallableFeature | Callable[[Callable[..., Any]], CallableFeature]:
    """Decorator that makes a Feature from ``f(texts) -> list[float]``: ``@feature`` or ``@feature(binary=True)``."""
    if function is None:
        return functools.partial(callable_feature, name=name, binary=binary)
    return callable_feature(function, name=name, binary=binary)


@feature_kind("python")
def python_feature(
    target: str, args: Mapping[str, Any] | None = None, binary: bool = False, conversational: bool = False
) -> Feature:
    """The feature named ``package.module:name``, looked up in the current directory and among installed packages.

    The name is that of a function, a TRL reward function, a class or a Feature. A class, and a function that needs only
    ``args``, is called with ``args`` and returns the function or Feature. Any other function gets ``args`` as keywords
    in each call. Raises UsageError for an unknown name and for arguments that do not fit.
    """
    found = load_object(target)
    if not callable(found):
        raise UsageError(f"python: '{target}' is not a function but {found!r} ({type(found).__name__})")
    if args is not None and (not isinstance(args, Mapping) or not all(isinstance(key, str) for key in args)):
        raise UsageError(f"python: args of '{target}' must be a mapping from names to values, got {args!r}")
    to_make = inspect.isclass(found) or (args is not None and not isinstance(found, Feature))
    made = _with_arguments(found, dict(args or {}), target) if to_make else found
    if isinstance(made, Feature):
        if binary or conversational or (args and made is found):
            raise UsageError(f"python: '{target}' is a feature already; remove args, binary and conversational")
        return made
    if not callable(made):
        raise UsageError(f"python: '{target}' with its args must return a function, got {made!r}")
    shown = ", ".join(f"{key}={value!r}" for key, value in (args or {}).items())
    name = _name(found) + (f"({shown})" if shown else "")
    return callable_feature(made, name=name, binary=binary, conversational=conversational)


def importable_form(feature: CallableFeature) -> dict[str, Any] | None:
    """The run-file form of a function that another process can import by name, decorated or not; else None."""
    module, name = (getattr(feature.function, key, None) for key in ("__module__", "__qualname__"))
    try:
        found = load_object(f"{module}:{name}")
    except TiltError:
        return None
    decorated = isinstance(found, CallableFeature)
    if module == "__main__" or feature.function is not (found.function if decorated else found):
        return None
    plain = found if decorated else callable_feature(found)
    options = {key: getattr(feature, key) for key in ("binary", "conversational")}
    options = {key: value for key, value in options.items() if value != getattr(plain, key)}
    if decorated and options:
        return None
    form = {"python": f"{module}:{name}", **options}
    return form if feature.name == plain.name else {**form, "name": feature.name}


def load_object(target: str) -> Any:
    """The Python object named ``package.module:name``; the current directory is searched as by ``python -m``."""
    module_name, colon, attribute = target.partition(":") if isinstance(target, str) else ("", "", "")
    dotted = f"{module_name}.{attribute}".split(".")
    if not colon or not all(part.isidentifier() for part in dotted):
        raise UsageError(f"python: expected 'package.module:name', got {target!r}")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name + ".").startswith(error.name + "."):
            message = f"python: no module '{error.name}' for '{target}'; looked in {here} and the installed packages"
            raise UsageError(message) from error
        raise FeatureError(f"python: importing '{module_name}' failed: {error}") from error
    except Exception as error:
        raise FeatureError(f"python: importing '{module_name}' raised {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [name for name, value in vars(found).items() if not name.startswith("_") and callable(value)]
            raise UsageError(f"python: '{module_name}' has no '{attribute}'; {nearest(part, public)}")
        found = getattr(found, part)
    return found


def _with_arguments(found: Callable[..., Any], args: dict[str, Any], target: str) -> Any:
    """The result of a factory or a class called with ``args``, or the function with ``args`` as keywords."""
    signature = _signature(found)
    if signature is None:
        return functools.partial(found, **args)
    accepted = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in args:
            if key not in accepted:
                raise UsageError(f"python: '{target}' takes no argument '{key}'; {nearest(key, accepted)}")
    try:
        signature.bind(**args)
        complete = True
    except TypeError as error:
        if inspect.isclass(found):
            raise UsageError(f"python: args do not fit '{target}': {error}") from error
        complete = False
    measures_texts = any(name in TRL_NAMES for name in accepted) and not inspect.isclass(found)
    if not complete or measures_texts:
        return functools.partial(found, **args)
    try:
        return found(**args)
    except Exception as error:
        raise UsageError(f"python: calling '{target}' with its args raised {type(error).__name__}: {error}") from error


def _arguments(feature: CallableFeature, batch: Batch) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments for one call, by the names of the function's parameters."""
    texts = list(batch.texts)
    signature = _signature(feature.function)
    if signature is None:
        return [texts], {}
    parameters = list(signature.parameters.values())
    bound = feature.function.keywords if isinstance(feature.function, functools.partial) else {}
    available = {name: value for name, value in _keywords(batch, feature.conversational).items() if name not in bound}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    by_keyword = {"completions", "completion_ids"} & {p.name for p in named}
    texts_first = bool(positional) and not by_keyword and positional[0].name != "prompts"
    asked = [p for p in named if not (texts_first and p is positional[0])]
    for parameter in asked:
        if parameter.default is parameter.empty and parameter.name not in available:
            raise FeatureError(_missing(feature.name, parameter.name, available))
    takes_all = not texts_first and any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = available if takes_all else [p.name for p in asked if p.name in available]
    return [texts] if texts_first else [], {name: available[name] for name in names}


def _keywords(batch: Batch, conversational: bool) -> dict[str, Any]:
    """The keywords that TRL passes to a reward function: prompts, completions, token ids if known, columns."""
    prompts = ["" if prompt is None else prompt for prompt in batch.prompts or [None] * len(batch)]
    keywords: dict[str, Any] = {"prompts": prompts, "completions": list(batch.texts)}
    if conversational:
        chats = batch.messages or [None] * len(batch)
        keywords["prompts"] = [
            [{"role": "user", "content": prompt}] if chat is None else [dict(message) for message in chat]
            for prompt, chat in zip(prompts, chats, strict=True)
        ]
        keywords["completions"] = [[{"role": "assistant", "content": text}] for text in batch.texts]
    if batch.completion_ids is not None:
        keywords["completion_ids"] = [list(ids) for ids in batch.completion_ids]
    # TRL passes these functions for extra logging. They do nothing here.
    return {**batch.columns, **keywords, "log_extra": _ignore, "log_metric": _ignore}


def _missing(name: str, parameter: str, available: Mapping[str, Any]) -> str:
    if parameter == "trainer_state":
        return f"feature '{name}' needs 'trainer_state'; a target is fixed, so a feature cannot depend on the step"
    offered = ", ".join(key for key, value in available.items() if value is not _ignore)
    return f"feature '{name}' needs '{parameter}', which is not available; available: {offered}"


def _ignore(*arguments: Any, **keywords: Any) -> None:
    return None


def _awaited(output: Awaitable[Any]) -> Any:
    """The result of an async function; works in a notebook, whose thread runs an event loop already."""

    async def wait() -> Any:
        return await output

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>_")
