"""Sampled texts in a report: base and tuned side by side, cut at the evidence of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

_LONGEST_TEXT = 1500  # Characters; samples.jsonl has the rest.


@dataclass(frozen=True)
class Segment:
    """A segment of text, and the names of the features that it is evidence for."""

    text: str
    features: Sequence[str]


@dataclass(frozen=True)
class SampleView:
    """One text, cut into segments, with its feature values and log-probabilities (in nats)."""

    prompt: str
    segments: Sequence[Segment]
    shortened: bool
    values: Mapping[str, float]
    base_logprob: float
    policy_logprob: float


@dataclass(frozen=True)
class SamplePair:
    """A text of the base model beside one of the tuned model; None where one model has fewer."""

    base: SampleView | None
    policy: SampleView | None


def pair_samples(records: Sequence[Mapping[str, Any]], most: int) -> list[SamplePair]:
    """The first ``most`` texts of either model, in pairs."""
    base = [_view(record) for record in records if record.get("model") == "base"][:most]
    policy = [_view(record) for record in records if record.get("model") == "policy"][:most]
    return [SamplePair(*pair) for pair in zip_longest(base, policy)]


def segments_of(text: str, evidence: Sequence[Mapping[str, Any]]) -> list[Segment]:
    """The text cut at every start and end of a span of evidence; spans may overlap or exceed the text."""
    spans = [(max(0, int(one["start"])), min(len(text), int(one["end"])), str(one["feature"])) for one in evidence]
    spans = [(start, end, feature) for start, end, feature in spans if start < end]
    cuts = sorted({0, len(text), *(cut for start, end, _ in spans for cut in (start, end))})
    segments = []
    for start, end in pairwise(cuts):
        covering = [feature for first, last, feature in spans if first <= start and end <= last]
        segments.append(Segment(text[start:end], list(dict.fromkeys(covering))))
    return segments


def _view(record: Mapping[str, Any]) -> SampleView:
    text = str(record.get("text") or "")
    values = {str(name): _finite(value) for name, value in (record.get("features") or {}).items()}
    return SampleView(
        prompt=str(record.get("prompt") or ""),
        segments=segments_of(text[:_LONGEST_TEXT], record.get("evidence") or []),
        shortened=len(text) > _LONGEST_TEXT,
        values=values,
        base_logprob=_finite(record.get("base_logprob")),
        policy_logprob=_finite(record.get("policy_logprob")),
    )


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
