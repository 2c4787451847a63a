"""The report of a run: one self-contained HTML file made from the run directory alone, without any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltlm.runs import storage
from tiltlm.runs.directory import RunDirectory
from tiltlm.runs.plots import ACCENT, PALETTE_SIZE, Plot, Point, Series, compact_count, line_plot
from tiltlm.runs.samples_view import pair_samples
from tiltlm.runs.summary import FeatureSummary, Measured, Summary, plain_number, summarize

MOST_SAMPLES = 40
SAMPLES_AT_FIRST = 10

_MOMENTS_PER_PLOT = 4  # More lines with bands than that cannot be told apart.

_PHASES = {
    "sample": "sampling",
    "features": "measuring features",
    "base": "scoring under the base",
    "policy": "scoring under the policy",
    "step": "gradient step",
}

_PRESERVED = {
    "entropy": ("Entropy", "nats per text; falls when the model narrows"),
    "distinct_1": ("Distinct-1", "share of different tokens within a text; falls when it repeats itself"),
    "distinct_1_corpus": ("Distinct-1, all texts", "share of different tokens over all texts together"),
    "self_bleu_5": ("Self-BLEU-5", "likeness of the texts to each other; rises when they become alike"),
    "perplexity_base": ("Perplexity under the base", "per token; rises when the base finds the texts odd"),
}


@dataclass(frozen=True)
class Legend:
    """A line of a chart's legend: the index of its colour, a name, and what the dashed line of that colour stands for."""

    color: int
    name: str
    dashed: str


@dataclass(frozen=True)
class Chart:
    """A plot with what is written around it."""

    title: str
    explanation: str
    plot: Plot
    legend: Sequence[Legend] = ()


@dataclass(frozen=True)
class Strip:
    """A feature's way on a line, positions in percent of the line's length; None where there is nothing to mark."""

    base: float | None
    goal: float | None
    tuned: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Phase:
    """How long one part of the work took, and its share of the whole in percent."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Preserved:
    """A property of the writing that should stay as it was."""

    name: str
    meaning: str
    base: Measured
    tuned: Measured
    change: str


def write_report(run_dir: str | Path | RunDirectory) -> Path:
    """Write ``report.html`` into a run directory, whatever state the run is in, and return its path.

    Raises UsageError where there is no run, CheckpointError where its files are broken or the report cannot be written.
    """
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory.open(run_dir)
    html = render_report(run.path.resolve().name, run.read_run(), run.read_metrics(), run.read_samples())
    # Text that is no text (a lone surrogate) becomes a question mark: HTML cannot hold it.
    storage.write_atomically(run.report_path, html.encode("utf-8", errors="replace"))
    return run.report_path


def render_report(
    name: str, run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> str:
    """The report's HTML from what a run directory holds: its name, run.json, metrics.jsonl and samples.jsonl."""
    import jinja2
    import yaml

    summary = summarize(run, metrics)
    evaluation = run.get("evaluation") or {}
    colors = {feature.name: feature.index % PALETTE_SIZE for feature in summary.features}
    pairs = pair_samples(samples, MOST_SAMPLES)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": plain_number, "duration": duration, "count": compact_count}
    environment.tests["finite"] = math.isfinite
    return environment.get_template("report.html.j2").render(
        name=name,
        run=run,
        progress=run.get("progress") or {},
        summary=summary,
        colors=colors,
        strips=_strips(summary.features),
        moment_charts=_moment_charts(summary, metrics),
        distance_charts=_distance_charts(summary, metrics, evaluation.get("base") or {}),
        phases=_phases(metrics, Measured.read(run.get("seconds")).value),
        preserved=_preserved(evaluation),
        pairs=pairs,
        sample_counts={model: sum(one.get("model") == model for one in samples) for model in ("base", "policy")},
        at_first=SAMPLES_AT_FIRST,
        config=yaml.safe_dump(run.get("config") or {}, sort_keys=False, allow_unicode=True, width=100),
    )


def duration(seconds: float) -> str:
    """A time in words: 8.4 s, 4 min 12 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _series(metrics: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], Any]) -> list[Point]:
    points = []
    for record in metrics:
        measured = Measured.read(read(record))
        points.append(Point(Measured.read(record.get("sequences")).value, measured.value, measured.se))
    return points


def _end(summary: Summary, metrics: Sequence[Mapping[str, Any]], measured: Measured) -> Point | None:
    """The evaluation's point, at the right end of the plot: the evaluation's own samples train nothing."""
    if not (summary.evaluated and measured.known and metrics):
        return None
    return Point(Measured.read(metrics[-1].get("sequences")).value, measured.value, measured.se)


def _moment_charts(summary: Summary, metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Shares together, a few in a plot; whatever has another scale in a plot of its own."""
    shares = [feature for feature in summary.features if feature.in_unit_interval]
    groups = [shares[start : start + _MOMENTS_PER_PLOT] for start in range(0, len(shares), _MOMENTS_PER_PLOT)]
    groups += [[feature] for feature in summary.features if not feature.in_unit_interval]
    charts = []
    for number, group in enumerate(groups):
        series = [_moment_series(feature, summary, metrics) for feature in group]
        floor = 0.0 if group[0].in_unit_interval else None
        plot = line_plot(f"moments-{number}", "Moments of the policy over training", series, floor=floor)
        if plot is None:
            continue
        legend = [Legend(one.index % PALETTE_SIZE, one.name, _dashed(one)) for one in group]
        explanation = "Each moment under the policy as it was being tuned."
        charts.append(Chart("Moments over training", explanation, plot, legend))
    return charts


def _moment_series(feature: FeatureSummary, summary: Summary, metrics: Sequence[Mapping[str, Any]]) -> Series:
    return Series(
        color=feature.index % PALETTE_SIZE,
        points=_series(metrics, lambda record: (record.get("moments") or {}).get(feature.name)),
        level=feature.goal if feature.goal is not None else feature.achieved.value,
        start=feature.base.value,
        end=_end(summary, metrics, feature.tuned),
    )


def _dashed(feature: FeatureSummary) -> str:
    if feature.goal is not None:
        return f"goal {plain_number(feature.goal)}"
    return f"under p {plain_number(feature.achieved.value)}" if feature.achieved.known else ""


def _distance_charts(summary: Summary, metrics: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[Chart]:
    ess = _series(metrics, lambda record: record.get("ess"))
    ess_is_share = all(point.value <= 1 for point in ess if math.isfinite(point.value))
    away = plain_number(summary.start.value) if summary.start.known else "unknown"
    rows: list[tuple[str, str, str, Measured, float, float, float | None]] = [
        (
            "kl_p_pi",
            "KL(p‖π): still to go",
            f"From the target to the policy, in nats. Dashed: where it began, KL(p‖a) = {away}.",
            summary.kl_p_pi,
            summary.start.value,
            summary.start.value,
            None,
        ),
        (
            "kl_pi_a",
            "KL(π‖a): gone so far",
            f"From the policy to the base, in nats. Dashed: KL(p‖a) = {away}, as far as the target is from the base.",
            summary.kl_pi_a,
            0.0,
            summary.start.value,
            None,
        ),
        (
            "tv_p_pi",
            "TV(p, π): total variation",
            "The share of probability that policy and target place differently: 0 is equal, 1 is disjoint.",
            summary.tv_p_pi,
            Measured.read(base.get("tv_p_pi")).value,
            math.nan,
            1.0,
        ),
        (
            "ess",
            "Effective sample size",
            "The share of a batch that counts towards the target after weighting by p/q."
            if ess_is_share
            else "How many sequences of a batch count towards the target after weighting by p/q.",
            Measured(),
            math.nan,
            math.nan,
            1.0 if ess_is_share else None,
        ),
    ]
    charts = []
    for key, title, explanation, end, start, level, ceiling in rows:
        points = _series(metrics, lambda record, key=key: record.get(key))  # type: ignore[misc]
        series = Series(ACCENT, points, level, start, _end(summary, metrics, end))
        plot = line_plot(key.replace("_", "-"), title, [series], floor=0.0, ceiling=ceiling)
        if plot is not None:
            charts.append(Chart(title, explanation, plot))
    return charts


def _strips(features: Sequence[FeatureSummary]) -> list[Strip]:
    """Shares on one common scale from zero, so that they can be compared; anything else on a scale of its own."""
    highest = max([x for feature in features if feature.in_unit_interval for x in _means(feature)], default=1.0)
    return [
        _strip(feature, 0.0, 1.15 * highest) if feature.in_unit_interval else _own_strip(feature)
        for feature in features
    ]


def _means(feature: FeatureSummary) -> list[float]:
    reach = 2 * feature.tuned.se if math.isfinite(feature.tuned.se) else 0.0
    goal = feature.goal if feature.goal is not None else feature.achieved.value
    candidates = [feature.base.value, goal, feature.tuned.value - reach, feature.tuned.value + reach]
    return [x for x in candidates if math.isfinite(x)]


def _own_strip(feature: FeatureSummary) -> Strip:
    means = _means(feature) or [0.0]
    margin = 0.15 * (max(means) - min(means)) or 1.0
    return _strip(feature, min(means) - margin, max(means) + margin)


def _strip(feature: FeatureSummary, low: float, high: float) -> Strip:
    def position(x: float) -> float | None:
        return round(100 * min(max((x - low) / (high - low), 0.0), 1.0), 2) if math.isfinite(x) and high > low else None

    goal = feature.goal if feature.goal is not None else feature.achieved.value
    reach = 2 * feature.tuned.se
    return Strip(
        base=position(feature.base.value),
        goal=position(goal),
        tuned=position(feature.tuned.value),
        low=position(feature.tuned.value - reach),
        high=position(feature.tuned.value + reach),
    )


def _phases(metrics: Sequence[Mapping[str, Any]], total: float) -> list[Phase]:
    """Seconds by phase over all steps, and what the run spent outside its steps."""
    seconds: dict[str, float] = {}
    for record in metrics:
        for phase, spent in (record.get("seconds") or {}).items():
            seconds[phase] = seconds.get(phase, 0.0) + (Measured.read(spent).value if spent is not None else 0.0)
    named = {_PHASES.get(phase, phase): spent for phase, spent in seconds.items() if spent > 0}
    rest = total - sum(named.values()) if math.isfinite(total) else 0.0
    if rest > 0:
        named["fitting, evaluating, saving"] = rest
    whole = sum(named.values())
    return [Phase(phase, spent, 100 * spent / whole) for phase, spent in named.items()]


def _preserved(evaluation: Mapping[str, Any]) -> list[Preserved]:
    rows = []
    for key, (title, meaning) in _PRESERVED.items():
        base, tuned = (Measured.read((evaluation.get(model) or {}).get(key)) for model in ("base", "policy"))
        if base.known or tuned.known:
            rows.append(Preserved(title, meaning, base, tuned, _change(base, tuned)))
    return rows


def _change(base: Measured, tuned: Measured) -> str:
    """The relative change in percent, with the standard error of a ratio of independent estimates (delta method)."""
    if not (base.known and tuned.known and base.value and tuned.value):
        return "–"
    ratio = tuned.value / base.value
    se = abs(ratio) * math.hypot(tuned.se / tuned.value, base.se / base.value)
    return f"{'+' if ratio >= 1 else ''}{Measured(100 * (ratio - 1), 100 * se)} %"
