"""Feature, the base class of all features, and their combinations."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tiltlm.errors import FeatureError, TiltError, UsageError
from tiltlm.features.automaton import Automaton, product_automaton
from tiltlm.features.batch import Batch, Span, merged
from tiltlm.features.checking import EXPECTED, checked_values, described_row

Self = TypeVar("Self", bound="Feature")
Arguments = ParamSpec("Arguments")

COMPARISONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    ">=": torch.ge,
    ">": torch.gt,
    "<=": torch.le,
    "<": torch.lt,
}


@dataclass(frozen=True, kw_only=True)
class Feature(ABC):
    """φ(x): one finite number per text.

    ``name`` appears in reports. ``binary``: every value is 0 or 1. ``spec`` is the run file's form, set by the function
    of a ``feature_kind``. A subclass defines ``compute`` and, if it can, ``evidence`` and ``automaton``.
    """

    name: str
    binary: bool
    spec: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @abstractmethod
    def compute(self, batch: Batch) -> Sequence[float] | Tensor:
        """One number per text of the batch."""

    def evidence(self, text: str) -> list[Span]:
        """Character spans (start, end) that made the feature fire, sorted, without overlap; none by default."""
        return []

    def automaton(self) -> Automaton | None:
        """The automaton whose state after a prefix predicts the value, for guides; None if there is none."""
        return None

    def __call__(
        self,
        texts: Sequence[str],
        *,
        prompts: Sequence[str | None] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> Tensor:
        """The values on N texts: float64 [N].

        Raises FeatureError if the feature raises, or does not return one finite number per text.
        """
        return self.values(Batch(texts, prompts, completion_ids, columns))

    def values(self, batch: Batch) -> Tensor:
        """The checked values on a batch: float64 [N]."""
        try:
            output = self.compute(batch)
        except TiltError:
            raise
        except Exception as error:
            reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
            row = self._first_failing_row(batch, error)
            culprit = "" if row is None else f" on {described_row(batch, row)}"
            raise FeatureError(f"feature '{self.name}' raised {reason}{culprit}; {EXPECTED}") from error
        return checked_values(output, batch, name=self.name, binary=self.binary)

    def renamed(self: Self, name: str) -> Self:
        """The same feature under another name."""
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"name: expected a word or a few, got {name!r}")
        spec = None if self.spec is None else {**self.spec, "name": name.strip()}
        return changed(self, name=name.strip(), spec=spec)

    def threshold(self, at: float, op: str = ">=") -> Threshold:
        """A binary feature: 1 where ``value op at`` holds, ``op`` one of ``>=``, ``>``, ``<=`` and ``<``; else 0."""
        return threshold(self, at, op)

    def __and__(self, other: Feature) -> Combination:
        return all_of(self, other)

    def __or__(self, other: Feature) -> Combination:
        return any_of(self, other)

    def __invert__(self) -> Negation:
        return negation(self)

    def _first_failing_row(self, batch: Batch, error: Exception) -> int | None:
        """The first row that fails with this kind of error on its own, by bisection; None if none does."""
        start, stop = 0, len(batch)
        while start < stop:
            middle = (start + stop) // 2 if stop - start > 1 else stop
            try:
                self.compute(batch.rows(start, middle))
            except Exception as again:
                if type(again) is not type(error):
                    return None
                if stop - start == 1:
                    return start
                stop = middle
            else:
                start = middle
        return None


@dataclass(frozen=True, kw_only=True)
class Combination(Feature):
    """1 where all binary parts are 1 (``word`` "and"), or where any of them is 1 ("or")."""

    word: str
    parts: tuple[Feature, ...]

    def compute(self, batch: Batch) -> Tensor:
        values = torch.stack([part.values(batch) for part in self.parts])
        return values.amin(0) if self.word == "and" else values.amax(0)

    def evidence(self, text: str) -> list[Span]:
        """The spans of all parts, for a text where the combination is 1."""
        return merged(span for part in self.parts for span in part.evidence(text))

    def automaton(self) -> Automaton | None:
        """The product of the parts' automata."""
        return product_automaton(part.automaton() for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Negation(Feature):
    """1 where its binary part is 0, and 0 where it is 1. It has no evidence."""

    part: Feature

    def automaton(self) -> Automaton | None:
        """The automaton of the part."""
        return self.part.automaton()

    def compute(self, batch: Batch) -> Tensor:
        return 1.0 - self.part.values(batch)


@dataclass(frozen=True, kw_only=True)
class Threshold(Feature):
    """1 where ``value op at`` holds for the value of its part, else 0."""

    part: Feature
    at: float
    op: str

    def automaton(self) -> Automaton | None:
        """The automaton of the part."""
        return self.part.automaton()

    def compute(self, batch: Batch) -> Tensor:
        return COMPARISONS[self.op](self.part.values(batch), self.at).double()

    def evidence(self, text: str) -> list[Span]:
        """The spans of the part, for a text where the comparison holds."""
        return self.part.evidence(text)


def all_of(*features: Feature) -> Combination:
    """A binary feature: 1 where all ``features`` are 1. Raises UsageError if one is not binary."""
    return _combination("and", features)


def any_of(*features: Feature) -> Combination:
    """A binary feature: 1 where at least one of ``features`` is 1. Raises UsageError if one is not binary."""
    return _combination("or", features)


def negation(feature: Feature) -> Negation:
    """A binary feature: 1 where ``feature`` is 0. Raises UsageError if that is not binary."""
    _require_binary("not", feature)
    return Negation(name=f"not {_in_brackets(feature)}", binary=True, part=feature)


def threshold(feature: Feature, at: float, op: str = ">=") -> Threshold:
    """A binary feature: 1 where ``feature op at`` holds. Raises UsageError for an unknown comparison."""
    if not isinstance(feature, Feature):
        raise UsageError(f"threshold: expected a feature, got {feature!r}")
    if op not in COMPARISONS:
        raise UsageError(f"threshold.op: unknown comparison {op!r}; valid: {' '.join(COMPARISONS)}")
    if isinstance(at, bool) or not isinstance(at, int | float) or not math.isfinite(at):
        raise UsageError(f"threshold.at: expected a finite number, got {at!r}")
    return Threshold(name=f"{_in_brackets(feature)} {op} {at:.12g}", binary=True, part=feature, at=float(at), op=op)


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
            f"'{word}' needs binary features, and '{feature.name}' is not binary; apply a threshold to it first"
        )


def _in_brackets(feature: Feature, word: str = "") -> str:
    """The name, in brackets if it would be ambiguous beside ``word`` ("": after "not")."""
    if isinstance(feature, Combination):
        composed = feature.word != word and f" {feature.word} " in feature.name
    else:
        composed = not word and isinstance(feature, Threshold) and f" {feature.op} " in feature.name
    return f"({feature.name})" if composed else feature.name


def changed(feature: Self, **fields: Any) -> Self:
    """A copy with these fields replaced."""
    changed = copy.copy(feature)
    for name, value in fields.items():
        object.__setattr__(changed, name, value)
    return changed


def measure(
    features: Iterable[Feature],
    texts: Sequence[str],
    *,
    prompts: Sequence[str | None] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    **columns: Any,
) -> Tensor:
    """The values of K features on N texts: float64 [N, K].

    ``prompts``, ``completion_ids`` (token ids, ragged) and every further column hold one entry per text. Raises
    FeatureError, with the feature and the first failing text, if there is not one finite number per text.
    """
    return measure_batch(features, Batch(texts, prompts, completion_ids, columns))


def measure_batch(features: Iterable[Feature], batch: Batch) -> Tensor:
    """The values of K features on a batch of N texts: float64 [N, K]. Raises as ``measure`` does."""
    values = [feature.values(batch) for feature in features]
    return torch.stack(values, dim=1) if values else torch.empty(len(batch), 0, dtype=torch.float64)
