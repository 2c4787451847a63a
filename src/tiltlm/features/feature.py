"""The Feature protocol, and the one place where what a feature returns is checked."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from tiltlm.errors import FeatureError, TiltError, UsageError

if TYPE_CHECKING:
    from tiltlm.features.automaton import Automaton
    from tiltlm.features.combine import Combination, Negation, Threshold

Self = TypeVar("Self", bound="Feature")
Arguments = ParamSpec("Arguments")
Span = tuple[int, int]

EXPECTED = "expected one finite number per text"


@dataclass(frozen=True)
class Batch:
    """N texts and what is known about them: prompts, token ids of the completions, and further columns, N each.

    ``messages`` are the prompts that were given as chat messages, and None for the others.
    """

    texts: Sequence[str]
    prompts: Sequence[str | None] | None = None
    completion_ids: Sequence[Sequence[int]] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Sequence[Mapping[str, Any]] | None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise UsageError("texts: expected a list of texts, got one string; write [text]")
        for name in ("prompts", "completion_ids", "messages"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise UsageError(f"{name}: {len(values)} entries for {len(self)} texts; there must be one per text")

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` up to ``stop``; a column that is no list of N values stays as it is."""
        whole = len(self)

        def cut(value: Any) -> Any:
            sliceable = hasattr(value, "__len__") and hasattr(value, "__getitem__")
            per_text = sliceable and not isinstance(value, str | Mapping) and len(value) == whole
            return value[start:stop] if per_text else value

        return replace(
            self,
            texts=self.texts[start:stop],
            prompts=cut(self.prompts),
            completion_ids=cut(self.completion_ids),
            columns={name: cut(value) for name, value in self.columns.items()},
            messages=cut(self.messages),
        )


@dataclass(frozen=True, kw_only=True)
class Feature(ABC):
    """Something measured on a text: φ(x), one finite number per text.

    ``name`` stands in reports; ``binary`` promises that every value is 0 or 1; ``spec`` is the run file's form where
    the feature was made by a function that ``remembers`` it. A subclass says in ``compute`` what is measured and, if it
    can, in ``evidence`` where.
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
        """What a prefix already says of the value, for guided sampling; None where it cannot be read off characters."""
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

        Raises FeatureError where the feature fails, or returns something that is not one finite number per text.
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
            culprit = "" if row is None else f" on {_where(batch, row)}"
            raise FeatureError(f"feature '{self.name}' raised {reason}{culprit}; {EXPECTED}") from error
        return checked_values(output, batch, name=self.name, binary=self.binary)

    def renamed(self: Self, name: str) -> Self:
        """The same feature under another name."""
        if not isinstance(name, str) or not name.strip():
            raise UsageError(f"name: expected a word or a few, got {name!r}")
        spec = None if self.spec is None else {**self.spec, "name": name.strip()}
        return _changed(self, name=name.strip(), spec=spec)

    def threshold(self, at: float, op: str = ">=") -> Threshold:
        """A binary feature: 1 where this one compares so (``>=``, ``>``, ``<=`` or ``<``) with ``at``, else 0."""
        from tiltlm.features.combine import threshold

        return threshold(self, at, op)

    def __and__(self, other: Feature) -> Combination:
        from tiltlm.features.combine import all_of

        return all_of(self, other)

    def __or__(self, other: Feature) -> Combination:
        from tiltlm.features.combine import any_of

        return any_of(self, other)

    def __invert__(self) -> Negation:
        from tiltlm.features.combine import negation

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


def remembers(kind: str) -> Callable[[Callable[Arguments, Self]], Callable[Arguments, Self]]:
    """Decorator of a function that makes features: each keeps its call as ``spec``, where JSON can hold it."""

    def decorate(make: Callable[Arguments, Self]) -> Callable[Arguments, Self]:
        signature = inspect.signature(make)

        @functools.wraps(make)
        def made(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Self:
            feature, given = make(*args, **kwargs), signature.bind(*args, **kwargs).arguments
            try:
                arguments = json.loads(json.dumps(given, default=os.fspath))
            except (TypeError, ValueError):
                return feature
            first = next(iter(signature.parameters))
            short = [*arguments] == [first] and not isinstance(arguments[first], dict)
            return _changed(feature, spec={kind: arguments[first] if short else arguments})

        return made

    return decorate


def _changed(feature: Self, **fields: Any) -> Self:
    """A copy with other values of these fields."""
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
    FeatureError, naming the feature and the first offending text, where a value is not one finite number per text.
    """
    return measure_batch(features, Batch(texts, prompts, completion_ids, columns))


def measure_batch(features: Iterable[Feature], batch: Batch) -> Tensor:
    """The values of K features on a batch of N texts: float64 [N, K]; see ``measure``."""
    values = [feature.values(batch) for feature in features]
    return torch.stack(values, dim=1) if values else torch.empty(len(batch), 0, dtype=torch.float64)


def checked_values(output: Any, batch: Batch, *, name: str, binary: bool) -> Tensor:
    """What a feature returned, as float64 [N]; FeatureError if it is not one finite number (0 or 1 if binary) each."""
    complaint = f"feature '{name}' returned"
    if output is None:
        raise FeatureError(f"{complaint} None; {EXPECTED} (is a `return` missing?)")
    if hasattr(output, "shape") and tuple(output.shape) != (len(batch),):
        raise FeatureError(f"{complaint} an array of shape {tuple(output.shape)}; expected shape ({len(batch)},)")
    if isinstance(output, str | bytes | Mapping) or not isinstance(output, Iterable):
        raise FeatureError(f"{complaint} {_shortened(output)} ({type(output).__name__}); {EXPECTED}, in a list")
    entries = output.tolist() if hasattr(output, "tolist") else list(output)
    if len(entries) != len(batch):
        raise FeatureError(f"{complaint} {len(entries)} values for {len(batch)} texts; {EXPECTED}")
    numbers = [_number(entry) for entry in entries]
    for row, number in enumerate(numbers):
        if number is None or not math.isfinite(number):
            hint = "; TRL would skip that text, a target needs a number for each" if entries[row] is None else ""
            raise FeatureError(f"{complaint} {_shortened(entries[row])} for {_where(batch, row)}; {EXPECTED}{hint}")
        if binary and number not in (0.0, 1.0):
            raise FeatureError(
                f"{complaint} {number:g} for {_where(batch, row)}; it is declared binary, so 0 or 1 was expected"
            )
    return torch.tensor(numbers, dtype=torch.float64)


def _number(entry: Any) -> float | None:
    if entry is None or isinstance(entry, str | bytes):
        return None
    try:
        return float(entry)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _shortened(value: Any, width: int = 60) -> str:
    if isinstance(value, str) and len(value) > width:
        value = value[:width] + "…"
    shown = repr(value)
    return shown if len(shown) <= width + 20 else shown[: width + 20] + "…"


def _where(batch: Batch, row: int) -> str:
    return f"text {row + 1} of {len(batch)}, {_shortened(batch.texts[row])}"
