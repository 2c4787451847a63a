"""Features made from features: and, or, not, threshold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.features.automaton import Automaton, together
from tiltlm.features.feature import Batch, Feature, Span

COMPARISONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    ">=": torch.ge,
    ">": torch.gt,
    "<=": torch.le,
    "<": torch.lt,
}


@dataclass(frozen=True, kw_only=True)
class Combination(Feature):
    """1 where all of its binary parts are (``word`` "and"), or any of them is ("or")."""

    word: str
    parts: tuple[Feature, ...]

    def compute(self, batch: Batch) -> Tensor:
        values = torch.stack([part.values(batch) for part in self.parts])
        return values.amin(0) if self.word == "and" else values.amax(0)

    def evidence(self, text: str) -> list[Span]:
        """The spans of all parts; meant for a text on which the combination fires."""
        return merged(span for part in self.parts for span in part.evidence(text))

    def automaton(self) -> Automaton | None:
        """Those of the parts, side by side."""
        return together(part.automaton() for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Negation(Feature):
    """1 where its binary part is 0, and 0 where it is 1; there is nothing to point at."""

    part: Feature

    def automaton(self) -> Automaton | None:
        """That of the part."""
        return self.part.automaton()

    def compute(self, batch: Batch) -> Tensor:
        return 1.0 - self.part.values(batch)


@dataclass(frozen=True, kw_only=True)
class Threshold(Feature):
    """1 where the value of its part compares so with ``at``, else 0."""

    part: Feature
    at: float
    op: str

    def automaton(self) -> Automaton | None:
        """That of the part."""
        return self.part.automaton()

    def compute(self, batch: Batch) -> Tensor:
        return COMPARISONS[self.op](self.part.values(batch), self.at).double()

    def evidence(self, text: str) -> list[Span]:
        """The spans of the part; meant for a text on which the threshold is met."""
        return self.part.evidence(text)


def all_of(*features: Feature) -> Combination:
    """A binary feature: 1 where every one of these is 1. Raises UsageError on one that is not binary."""
    return _combination("and", features)


def any_of(*features: Feature) -> Combination:
    """A binary feature: 1 where at least one of these is 1. Raises UsageError on one that is not binary."""
    return _combination("or", features)


def negation(feature: Feature) -> Negation:
    """A binary feature: 1 where this binary feature is 0. Raises UsageError if it is not binary."""
    _require_binary("not", feature)
    return Negation(name=f"not {_in_brackets(feature)}", binary=True, part=feature)


def threshold(feature: Feature, at: float, op: str = ">=") -> Threshold:
    """A binary feature: 1 where ``feature`` compares so with ``at``. Raises UsageError for an unknown comparison."""
    if not isinstance(feature, Feature):
        raise UsageError(f"threshold: expected a feature, got {feature!r}")
    if op not in COMPARISONS:
        raise UsageError(f"threshold.op: unknown comparison {op!r}; valid: {' '.join(COMPARISONS)}")
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise UsageError(f"threshold.at: expected a finite number, got {at!r}")
    return Threshold(name=f"{_in_brackets(feature)} {op} {at:.12g}", binary=True, part=feature, at=float(at), op=op)


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same characters as sorted spans that do not overlap."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _combination(word: str, features: tuple[Feature, ...]) -> Combination:
    if not features:
        raise UsageError(f"'{word}' needs at least one feature")
    for feature in features:
        _require_binary(word, feature)
    name = f" {word} ".join(_in_brackets(feature, word) for feature in features)
    return Combination(name=name, binary=True, word=word, parts=features)


def _require_binary(word: str, feature: Feature) -> None:
    if not isinstance(feature, Feature):
        raise UsageError(f"'{word}' combines features, got {feature!r}")
    if not feature.binary:
        raise UsageError(
            f"'{word}' needs features that are 0 or 1, and '{feature.name}' is not binary; take a threshold of it first"
        )


def _in_brackets(feature: Feature, word: str = "") -> str:
    """The name, in brackets where it would otherwise read ambiguously beside ``word`` (none: after "not")."""
    if isinstance(feature, Combination):
        composed = feature.word != word and f" {feature.word} " in feature.name
    else:
        composed = not word and isinstance(feature, Threshold) and f" {feature.op} " in feature.name
    return f"({feature.name})" if composed else feature.name
