"""Features from their run-file form, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tiltlm.errors import TiltError, UsageError, nearest
from tiltlm.features.callables import CallableFeature, callable_feature, importable_form, load_object
from tiltlm.features.feature import Combination, Feature, Negation, Threshold, all_of, any_of, negation, threshold
from tiltlm.features.kinds import COMBINATORS, FEATURE_KINDS

FeatureSpec = str | Mapping[str, Any] | Feature | Callable[..., Any]

# The key that stands for a feature without a run-file form in the record of a run.
OBJECT = "object"


def build_feature(spec: FeatureSpec) -> Feature:
    """The feature of a spec.

    ``{contains: amazing}``, or ``contains:amazing`` for short, gives the first argument of the kind's function. Others
    stand beside it or in a mapping: ``{contains: {phrase: amazing, ignore_case: false}}``. ``name`` renames the
    feature. ``all``, ``any`` and ``not`` hold specs; ``threshold`` holds ``{feature, at, op}``. A Feature is
    returned unchanged; a Python function becomes a feature. Raises UsageError for anything else.
    """
    if isinstance(spec, Feature):
        return spec
    if isinstance(spec, str):
        return _build(*_short_form(spec), options={})
    if callable(spec):
        return callable_feature(spec)
    if not isinstance(spec, Mapping):
        raise UsageError(f"feature: expected a mapping such as {{contains: amazing}}, got {spec!r}")
    if OBJECT in spec:
        raise UsageError(
            f"feature: '{spec[OBJECT]}' was given in Python and has no run-file form (it is a lambda, a function of "
            f"__main__ or of a notebook, or an object of your own class). Tune with a function that a module defines, "
            f"or pass the feature again in Python: tiltlm.load_run(run_dir, features=[...])"
        )
    # The key `threshold` beside a classifier is its option, not a kind.
    options_of = {
        name for key in spec if key in FEATURE_KINDS for name in inspect.signature(FEATURE_KINDS[key]).parameters
    }
    named = [key for key in spec if key in kinds() and key not in options_of]
    if not named:
        wrong = next((str(key) for key in spec if key != "name"), "")
        raise UsageError(f"feature: unknown feature '{wrong}'; {nearest(wrong, kinds())}")
    if len(named) > 1:
        raise UsageError(f"feature: {' and '.join(named)} in one mapping; give one, or a list under 'all' or 'any'")
    options = {str(key): value for key, value in spec.items() if key not in (named[0], "name")}
    feature = _build(named[0], spec[named[0]], options)
    return feature.renamed(spec["name"]) if "name" in spec else feature


def run_file_form(feature: Feature) -> dict[str, Any] | None:
    """The spec from which ``build_feature`` makes this feature again, in any process; None where there is none.

    A lambda, a function of ``__main__`` or of a notebook, an object of a user's own class, and a combination of these
    have none.
    """
    if isinstance(feature, Combination):
        parts, all_parts = feature.parts, feature.word == "and"
        plain: Feature = all_of(*parts) if all_parts else any_of(*parts)
        forms = [run_file_form(part) for part in parts]
        form: dict[str, Any] = {"all" if all_parts else "any": forms}
    elif isinstance(feature, Negation):
        plain, forms = negation(feature.part), [run_file_form(feature.part)]
        form = {"not": forms[0]}
    elif isinstance(feature, Threshold):
        plain, forms = threshold(feature.part, feature.at, feature.op), [run_file_form(feature.part)]
        form = {"threshold": {"feature": forms[0], "at": feature.at, "op": feature.op}}
    elif feature.spec is None and isinstance(feature, CallableFeature):
        return importable_form(feature)
    else:
        return None if feature.spec is None else _loadable_form(feature.spec)
    if None in forms:
        return None
    return form if plain.name == feature.name else {**form, "name": feature.name}


def _loadable_form(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """The spec for a process that knows only the built-in kinds; another kind is named by its module and function.

    None where no other process can import that function.
    """
    kind = next(iter(spec))
    make = FEATURE_KINDS.get(kind)
    if make is None or make.__module__.split(".")[0] == "tiltlm":
        return dict(spec)
    target = f"{make.__module__}:{make.__qualname__}"
    try:
        importable = make.__module__ != "__main__" and load_object(target) is make
    except TiltError:
        return None
    if not importable:
        return None
    given = spec[kind]
    arguments = given if isinstance(given, Mapping) else {next(iter(inspect.signature(make).parameters)): given}
    name = {key: value for key, value in spec.items() if key == "name"}
    return {"python": target, "args": dict(arguments), **name}


def kinds() -> tuple[str, ...]:
    """The names of all kinds in a run file, registered ones and combinators."""
    return (*FEATURE_KINDS, *COMBINATORS)


def _short_form(spec: str) -> tuple[str, str]:
    kind, colon, argument = spec.partition(":")
    if colon and kind.strip() in FEATURE_KINDS:
        return kind.strip(), argument.strip()
    if colon and kind.strip() in COMBINATORS:
        raise UsageError(f"feature: '{kind}' holds features, so it needs the long form: {{{kind}: …}}")
    hint = f"write 'python:{spec}' for a Python function; " if colon and kind.replace(".", "").isidentifier() else ""
    raise UsageError(f"feature: unknown feature '{spec}'; {hint}{nearest(kind, kinds())}")


def _build(kind: str, argument: Any, options: dict[str, Any]) -> Feature:
    if kind in FEATURE_KINDS:
        function = FEATURE_KINDS[kind]
        if isinstance(argument, Mapping):
            return _call(kind, function, {str(key): value for key, value in argument.items()} | options)
        return _call(kind, function, {next(iter(inspect.signature(function).parameters)): argument} | options)
    _reject_unknown(kind, options, ())
    if kind == "not":
        return negation(build_feature(argument))
    if kind == "threshold":
        if not isinstance(argument, Mapping):
            raise UsageError(f"threshold: expected {{feature: …, at: 0.5, op: '>='}}, got {argument!r}")
        fields = {str(key): value for key, value in argument.items()}
        if "feature" in fields:
            fields["feature"] = build_feature(fields["feature"])
        return _call(kind, threshold, fields)
    if isinstance(argument, str | Mapping) or not isinstance(argument, Sequence) or not argument:
        raise UsageError(f"{kind}: expected a list of features, got {argument!r}")
    parts = [build_feature(part) for part in argument]
    return all_of(*parts) if kind == "all" else any_of(*parts)


def _call(kind: str, function: Callable[..., Feature], arguments: dict[str, Any]) -> Feature:
    """The result of the function. Raises UsageError if the arguments do not fit its signature."""
    parameters = inspect.signature(function).parameters
    _reject_unknown(kind, arguments, tuple(parameters))
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UsageError(f"{kind}: '{parameter.name}' is missing")
    return function(**arguments)


def _reject_unknown(kind: str, options: Mapping[str, Any], valid: tuple[str, ...]) -> None:
    for key in options:
        if key not in valid:
            raise UsageError(f"{kind}: unknown option '{key}'; {nearest(key, (*valid, 'name'))}")
