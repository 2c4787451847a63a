"""The summary of a run's record: each moment with its goal, and whether the target was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MET_WITHIN = 0.03
MET_WITHIN_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class Measured:
    """An estimate as a run directory stores it: value and standard error in the same unit, NaN if missing."""

    value: float = math.nan
    se: float = math.nan

    @classmethod
    def read(cls, record: Any) -> Measured:
        """From ``{"value": v, "se": s}``, a bare number, or nothing at all."""
        if isinstance(record, Mapping):
            return cls(_number(record.get("value")), _number(record.get("se")))
        return cls(_number(record), math.nan)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)

    @property
    def value_text(self) -> str:
        """The value with as many decimals as its standard error has."""
        if not self.known:
            return "–"
        if not self._has_error:
            return plain_number(self.value)
        return _minus(_rounded(self.value, self.se))

    @property
    def error_text(self) -> str:
        """The error with its sign, or an empty text if it is unknown."""
        return _minus(f"± {_rounded(self.se, self.se)}") if self.known and self._has_error else ""

    @property
    def _has_error(self) -> bool:
        return math.isfinite(self.se) and self.se > 0

    def __str__(self) -> str:
        return f"{self.value_text} {self.error_text}".strip()


@dataclass(frozen=True)
class FeatureSummary:
    """One feature of the target, and its mean under the base, as a goal, under the fitted p and under the policy."""

    name: str
    kind: str
    index: int
    goal: float | None
    base: Measured
    achieved: Measured
    coefficient: Measured
    tuned: Measured
    top_p: Measured
    met: bool | None

    @property
    def aim(self) -> float:
        """The mean to reach: the goal, or for a reward, which has none, the mean under the fitted p."""
        return self.achieved.value if self.goal is None else self.goal

    @property
    def aim_text(self) -> str:
        """The goal in words and a number; empty without one."""
        if self.goal is not None:
            return f"goal {plain_number(self.goal)}"
        return f"under p {self.achieved}" if self.achieved.known else ""

    @property
    def off_text(self) -> str:
        """The distance of the tuned model above (+) or below (−) the goal; empty without a goal."""
        if self.goal is None or not self.tuned.known:
            return ""
        off = Measured(self.tuned.value - self.goal, self.tuned.se)
        return f"{'+' if off.value > 0 else ''}{off.value_text}"

    @property
    def in_unit_interval(self) -> bool:
        """Whether all its means can be read as shares."""
        means = [self.base.value, self.achieved.value, self.tuned.value, self.aim]
        return self.kind != "reward" and all(0 <= mean <= 1 for mean in means if math.isfinite(mean))


@dataclass(frozen=True)
class Summary:
    """The whole run: ``source`` names the samples of the tuned model's figures, empty without any."""

    features: Sequence[FeatureSummary]
    source: str
    evaluated: bool
    verdict: str
    target: str
    start: Measured
    kl_p_pi: Measured
    kl_pi_a: Measured
    tv_p_pi: Measured
    base_tv: Measured
    ess: Measured
    samples: int


def summarize(run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Summary:
    """The summary of a ``run.json`` record, from its evaluation, or from the last training step if it has none yet."""
    target = run.get("target") or {}
    evaluation = (run.get("evaluation") or {}).get("policy")
    last = metrics[-1] if metrics else {}
    latest: Mapping[str, Any] = evaluation or last
    samples = int((evaluation or {}).get("samples") or 0)
    prompts = prompts_in_words(evaluation or {})
    fresh = f"{samples:,} fresh samples" + (f" on {prompts}" if prompts else "")
    source = fresh if evaluation else f"training step {last.get('step', '?')}" if last else ""
    features = [
        _feature(record, index, latest, judged=bool(evaluation))
        for index, record in enumerate(target.get("features") or [])
    ]
    return Summary(
        features=features,
        source=source,
        evaluated=bool(evaluation),
        verdict=_verdict(features, evaluated=bool(evaluation), failed=run.get("status") == "failed"),
        target=_target(features),
        start=Measured.read(target.get("kl_p_a")),
        kl_p_pi=Measured.read(latest.get("kl_p_pi")),
        kl_pi_a=Measured.read(latest.get("kl_pi_a")),
        tv_p_pi=Measured.read(latest.get("tv_p_pi")),
        base_tv=Measured.read(((run.get("evaluation") or {}).get("base") or {}).get("tv_p_pi")),
        ess=Measured.read(latest.get("ess")),
        samples=samples,
    )


def prompts_in_words(record: Mapping[str, Any]) -> str:
    """The prompts of an evaluation in words; "" for the training prompts if there is at most one."""
    count, source = record.get("prompts") or 1, record.get("prompts_from") or "training"
    if source == "training":
        return f"the {count:,} prompts of training" if count > 1 else ""
    if source == "held out":
        return f"{count:,} held-out prompt{'s' if count > 1 else ''}"
    return f"{count:,} prompts of {source}" if count > 1 else "" if source == "none" else repr(source)


def is_met(measured: Measured, goal: float | None, base: Measured | None = None) -> bool | None:
    """Whether a moment has reached its goal; None if unknown.

    It has within two standard errors, or within 0.03 if it is nearer to the goal than to the ``base``. The second
    condition keeps a goal near the base from being reached without any change.
    """
    if goal is None or not measured.known:
        return None
    off = abs(measured.value - goal)
    # A moment exactly on the bound counts as reached, despite rounding.
    if math.isfinite(measured.se) and off <= MET_WITHIN_STANDARD_ERRORS * measured.se + 1e-12:
        return True
    approached = base is None or not base.known or off < abs(measured.value - base.value)
    return approached and off <= MET_WITHIN + 1e-12


def plain_number(number: float) -> str:
    """A number with four significant digits, as text."""
    return _minus(f"{number:.4g}")


def _feature(record: Mapping[str, Any], index: int, latest: Mapping[str, Any], *, judged: bool) -> FeatureSummary:
    name, kind = str(record.get("name")), str(record.get("kind"))
    # Every text in the support of p passes a filter, and a reward has no goal.
    goal = {"filter": 1.0, "reward": None}.get(kind, record.get("goal"))
    tuned = Measured.read((latest.get("moments") or {}).get(name))
    base = Measured.read(record.get("base"))
    return FeatureSummary(
        name=name,
        kind=kind,
        index=index,
        goal=goal,
        base=base,
        achieved=Measured.read(record.get("achieved")),
        coefficient=Measured.read(record.get("coefficient")),
        tuned=tuned,
        top_p=Measured.read((latest.get("moments_top_p") or {}).get(name)),
        met=is_met(tuned, goal, base) if judged else None,
    )


def _verdict(features: Sequence[FeatureSummary], *, evaluated: bool, failed: bool) -> str:
    if not evaluated:
        return "The run failed before it was evaluated." if failed else "Not evaluated yet."
    judged = [feature.met for feature in features if feature.met is not None]
    if not judged:
        return "No goals: the target is a reward tilt."
    if len(judged) == 1:
        return "The goal is met." if judged[0] else "The goal is not met."
    if all(judged):
        return "Both goals are met." if len(judged) == 2 else f"All {len(judged)} goals are met."
    if not any(judged):
        return "Neither goal is met." if len(judged) == 2 else f"None of {len(judged)} goals is met."
    return f"{sum(judged)} of {len(judged)} goals are met."


def _target(features: Sequence[FeatureSummary]) -> str:
    """The target in one sentence."""
    filters = [f"“{feature.name}”" for feature in features if feature.kind == "filter"]
    moments = [
        f"{feature.goal:.4g} for “{feature.name}”"
        for feature in features
        if feature.kind == "moment" and feature.goal is not None
    ]
    rewards = [f"“{feature.name}”" for feature in features if feature.kind == "reward"]
    parts = []
    if filters:
        parts.append(f"only texts with {_listed(filters)}")
    if moments:
        parts.append(f"a mean of {_listed(moments)}")
    if rewards:
        parts.append(f"a tilt by the reward {_listed(rewards)}")
    if not parts:
        return "The target was not fitted."
    return f"Target: {'; '.join(parts)}; otherwise as close to the base model as possible."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _rounded(number: float, se: float) -> str:
    """The number with the digits that its standard error supports: one significant digit, two if the first is 1."""
    exponent = math.floor(math.log10(se))
    decimals = max(-exponent + (1 if se / 10**exponent < 2 else 0), 0)
    return f"{number:,.{decimals}f}" if decimals <= 6 else f"{number:.2e}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
