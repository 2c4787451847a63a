"""Sentiment by VADER: a lexicon and a few rules, fast and deterministic, without a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tiltlm.errors import FeatureError, UsageError, nearest
from tiltlm.features.automaton import Automaton, WordSum
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.kinds import feature_kind

KINDS = ("positive", "negative", "compound")
CLEAR = 0.05
# The automaton counts valences in units of 1/2, up to ±8 units. Larger sums are rare.
HALVES, MAX_HALVES = 2, 8


@dataclass(frozen=True, kw_only=True)
class Sentiment(Feature):
    """VADER's compound score in [-1, 1], or 1 where the score is positive or negative enough."""

    kind: str

    def compute(self, batch: Batch) -> list[float]:
        analyzer = _analyzer()
        scores = [float(analyzer.polarity_scores(text)["compound"]) for text in batch.texts]
        if self.kind == "positive":
            return [float(score >= CLEAR) for score in scores]
        if self.kind == "negative":
            return [float(score <= -CLEAR) for score in scores]
        return scores

    def automaton(self) -> Automaton:
        """The rounded sum of the words' valences, with VADER's rule for negation only; the same for all kinds."""
        return _valences()


@feature_kind("sentiment")
def sentiment(kind: str = "compound") -> Sentiment:
    """The sentiment of the text by VADER (Hutto and Gilbert, ICWSM 2014).

    ``compound``: its normalized score, a real number in [-1, 1], 0 for an empty text. ``positive``: 1 where compound is
    at least 0.05, else 0. ``negative``: 1 where it is at most -0.05, else 0. Raises UsageError for another kind.
    """
    if kind not in KINDS:
        raise UsageError(f"sentiment: unknown kind {kind!r}; {nearest(str(kind), KINDS)}")
    name = "sentiment" if kind == "compound" else f"{kind} sentiment"
    return Sentiment(name=name, binary=kind != "compound", kind=kind)


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ModuleNotFoundError as error:
        raise FeatureError("sentiment needs the package vaderSentiment: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


@lru_cache(maxsize=1)
def _valences() -> WordSum:
    analyzer = _analyzer()
    from vaderSentiment.vaderSentiment import BOOSTER_DICT, N_SCALAR, NEGATE

    words = {word: value for word, value in analyzer.lexicon.items() if _is_word(word) and word not in BOOSTER_DICT}
    values = {word: round(HALVES * value) or (1 if value > 0 else -1) for word, value in words.items()}
    return WordSum(values, frozenset(NEGATE), MAX_HALVES, negated=-N_SCALAR)


def _is_word(entry: str) -> bool:
    """Whether VADER strips punctuation around the entry: it has over two characters and is no emoticon."""
    return len(entry) > 2 and entry.strip("-'") == entry and all(c.isalnum() or c in "-'" for c in entry)
