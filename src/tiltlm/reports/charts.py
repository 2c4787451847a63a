"""The charts of a report: moments, divergences and ESS over training, with their legends and captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from tiltlm.reports.plots import ACCENT, PALETTE_SIZE, Plot, Point, Series, line_plot
from tiltlm.reports.summary import FeatureSummary, Measured, Summary

_MOMENTS_PER_PLOT = 4  # More lines with bands are hard to distinguish.


@dataclass(frozen=True)
class Legend:
    """A line of a chart's legend: the index of its colour, a name, and what the dashed line of that colour means."""

    color: int
    name: str
    dashed: str


@dataclass(frozen=True)
class Chart:
    """A plot with its title, legend and caption."""

    title: str
    explanation: str
    plot: Plot
    legend: Sequence[Legend] = ()


def moment_charts(summary: Summary, metrics: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Features in [0, 1] share plots, a few in each; a feature with another scale has its own plot."""
    shares = [feature for feature in summary.features if feature.in_unit_interval]
    groups = [shares[start : start + _MOMENTS_PER_PLOT] for start in range(0, len(shares), _MOMENTS_PER_PLOT)]
    groups += [[feature] for feature in summary.features if not feature.in_unit_interval]
    charts = []
    for number, group in enumerate(groups):
        series = [_moment_series(feature, summary, metrics) for feature in group]
        floor = 0.0 if group[0].in_unit_interval else None
        plot = line_plot(f"moments-{number}", "Moments of the policy over training", series, unit="mean", floor=floor)
        if plot is None:
            continue
        legend = [Legend(one.index % PALETTE_SIZE, one.name, one.aim_text) for one in group]
        alone = len(group) == 1 and len(groups) > 1
        title = f"{group[0].name} over training" if alone else "Moments over training"
        dashed = "the mean under p" if group[0].goal is None else "the goal"
        charts.append(Chart(title, f"The mean under the policy during training. Dashed: {dashed}.", plot, legend))
    return charts


def _moment_series(feature: FeatureSummary, summary: Summary, metrics: Sequence[Mapping[str, Any]]) -> Series:
    return Series(
        color=feature.index % PALETTE_SIZE,
        points=_points(metrics, "moments", feature.name),
        level=feature.aim,
        start=feature.base.value,
        end=_end(summary, metrics, feature.tuned),
    )


def how_to_read(charts: Sequence[Chart], summary: Summary, metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the marks in all charts mean, in words."""
    averaged = max((chart.plot.averaged for chart in charts), default=1)
    line = f"means over {averaged} training batches" if averaged > 1 else "training batches"
    parts = [f"Line and band: {line} ± two standard errors. Ring: base."]
    if summary.evaluated:
        parts.append("Dot and bar: evaluation on fresh samples ± two standard errors.")
    counts = [record.get("sequences") for record in metrics]
    if any(one == other is not None for one, other in pairwise(counts)):
        parts.append("Steps that train on earlier sequences, e.g. those of the fit, are placed evenly over them.")
    return " ".join(parts)


def distance_charts(
    summary: Summary, metrics: Sequence[Mapping[str, Any]], base: Mapping[str, Any], batch_size: float
) -> list[Chart]:
    """Divergences of the policy from target and base, and the ESS of each batch.

    ``base`` is the base's evaluation, empty without one; ``batch_size`` is NaN if unknown.
    """
    apart = summary.start.value
    apart_text = f"KL(p‖a) = {summary.start}" if summary.start.known else "KL(p‖a)"
    whole = f" Dashed: the batch size, {batch_size:.0f}." if math.isfinite(batch_size) else ""

    def end(measured: Measured) -> Point | None:
        return _end(summary, metrics, measured)

    charts = [
        _distance_chart(
            "kl-p-pi",
            "KL(p‖π): from target to policy",
            f"Nats per text; 0 if policy and target are equal. Dashed: {apart_text}, the value of the base.",
            "nats",
            Series(ACCENT, _points(metrics, "kl_p_pi"), level=apart, start=apart, end=end(summary.kl_p_pi)),
        ),
        _distance_chart(
            "kl-pi-a",
            "KL(π‖a): from policy to base",
            f"Nats per text; 0 at the start. Dashed: {apart_text}, the value of the target.",
            "nats",
            Series(ACCENT, _points(metrics, "kl_pi_a"), level=apart, start=0.0, end=end(summary.kl_pi_a)),
        ),
        _distance_chart(
            "tv-p-pi",
            "TV(p, π): total variation",
            "0 if policy and target are equal, 1 if they have no text in common.",
            "total variation",
            Series(
                ACCENT,
                _points(metrics, "tv_p_pi"),
                start=Measured.read(base.get("tv_p_pi")).value,
                end=end(summary.tv_p_pi),
            ),
            ceiling=1.0,
        ),
        _distance_chart(
            "ess",
            "ESS: effective sample size",
            f"The number of samples of p that a step’s sequences, weighted by p/q, are equivalent to.{whole}",
            "sequences",
            Series(ACCENT, _points(metrics, "ess"), level=batch_size),
        ),
    ]
    return [chart for chart in charts if chart is not None]


def _distance_chart(
    name: str, title: str, explanation: str, unit: str, series: Series, ceiling: float | None = None
) -> Chart | None:
    plot = line_plot(name, title, [series], unit=unit, floor=0.0, ceiling=ceiling)
    return Chart(title, explanation, plot) if plot is not None else None


def _points(metrics: Sequence[Mapping[str, Any]], *keys: str) -> list[Point]:
    """The estimate under a path of keys in every step's record, NaN in a step without one."""
    points = []
    for record, position in zip(metrics, positions(metrics), strict=True):
        found: Any = record
        for key in keys:
            found = (found or {}).get(key)
        measured = Measured.read(found)
        points.append(Point(position, measured.value, measured.se))
    return points


def positions(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """The position of each step on the axis of sequences drawn.

    Steps that draw nothing train on earlier samples in order, so they are placed evenly over these samples.
    """
    placed, before = [], 0.0
    for drawn, group in groupby(Measured.read(record.get("sequences")).value for record in metrics):
        steps = len(list(group))
        placed += [before + (drawn - before) * nth / steps for nth in range(1, steps + 1)]
        before = drawn if math.isfinite(drawn) else before
    return placed


def _end(summary: Summary, metrics: Sequence[Mapping[str, Any]], measured: Measured) -> Point | None:
    """The evaluation's point, at the right end of the plot, as its own samples are not trained on."""
    if not (summary.evaluated and measured.known and metrics):
        return None
    return Point(Measured.read(metrics[-1].get("sequences")).value, measured.value, measured.se)
