"""Line plots with error bands as inline SVG; the colours are CSS variables of the page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PALETTE_SIZE = 8  # The number of series colours in the page's style sheet, and
ACCENT = PALETTE_SIZE  # the index of the colour of a plot with one series.

_MOST_POINTS = 75  # More points, each as noisy as one batch, would hide the trend.
_WIDTH, _HEIGHT = 380, 240  # In SVG units; about one pixel each on a phone, a little more on a desk.

# matplotlib draws in these; the SVG gets the page's variables instead, so that one picture fits light and dark themes.
_INK, _GRID = "#010101", "#020202"
_SERIES = [f"#0300{index:02d}" for index in range(PALETTE_SIZE + 1)]
_VARIABLES = {_INK: "var(--quiet)", _GRID: "var(--line)"} | {
    color: f"var(--series-{index})" for index, color in enumerate(_SERIES)
}


@dataclass(frozen=True)
class Point:
    """An estimate at a number of drawn sequences."""

    sequences: float
    value: float
    se: float


@dataclass(frozen=True)
class Series:
    """One quantity over training: its colour's index, its points, a dashed level, and estimates on other samples."""

    color: int
    points: Sequence[Point]
    level: float | None = None
    start: float | None = None
    end: Point | None = None


@dataclass(frozen=True)
class Plot:
    """An SVG element for a page, the number of steps averaged in a point, and a note on points outside the axis."""

    svg: str
    averaged: int
    note: str


def line_plot(
    name: str,
    label: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    floor: float | None = None,
    ceiling: float | None = None,
) -> Plot | None:
    """Series against sequences drawn, with bands of two standard errors; None if there is nothing finite to draw.

    ``name`` makes the element's ids unique in the page, ``label`` is for screen readers, and ``unit`` is shown
    above the y axis; none of them is a user's text. The axis starts at
    ``floor`` unless estimates fall below it, and never passes ``ceiling``.
    """
    series = [_finite(one) for one in series]
    if not any(one.points for one in series):
        return None
    thinned, group = _thin(series)
    low, high = _limits(thinned, floor, ceiling)
    svg = _draw(name, thinned, low, high, unit)
    attributes = f'role="img" aria-label="{label}" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
    return Plot(_inline(svg, name, attributes), group, _note_on_cut(thinned, low, high))


def compact_count(number: float) -> str:
    """A count in few characters: 950, 12k, 1.5M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"


def _finite(series: Series) -> Series:
    points = [point for point in series.points if math.isfinite(point.value) and math.isfinite(point.sequences)]
    end = series.end if series.end is not None and math.isfinite(series.end.value) else None
    level, start = (x if x is not None and math.isfinite(x) else None for x in (series.level, series.start))
    return Series(series.color, points, level, start, end)


def _thin(series: Sequence[Series]) -> tuple[list[Series], int]:
    """The series with at most ``_MOST_POINTS`` points each, averaged over groups of equally many steps."""
    group = math.ceil(max(len(one.points) for one in series) / _MOST_POINTS)
    if group == 1:
        return list(series), 1
    thinned = []
    for one in series:
        groups = [one.points[start : start + group] for start in range(0, len(one.points), group)]
        thinned.append(Series(one.color, [_mean_point(points) for points in groups], one.level, one.start, one.end))
    return thinned, group


def _mean_point(points: Sequence[Point]) -> Point:
    """The mean of independent estimates, with its standard error."""
    count = len(points)
    se = math.sqrt(sum(_se(point) ** 2 for point in points)) / count
    return Point(sum(point.sequences for point in points) / count, sum(point.value for point in points) / count, se)


def _limits(series: Sequence[Series], floor: float | None, ceiling: float | None) -> tuple[float, float]:
    """An axis that fits most points, not a few early outliers.

    A point is an outlier if it is more than three interquartile ranges outside the middle half. The dashed levels, the
    estimates at the ends and the last tenth of the run always fit.
    """
    values = [point.value for one in series for point in one.points]
    edges = [point.value + sign * 2 * _se(point) for one in series for point in one.points for sign in (-1, 1)]
    lowest_half, highest_half = _quantile(values, 0.25), _quantile(values, 0.75)
    reach = 3 * (highest_half - lowest_half) + 2 * _quantile([_se(p) for one in series for p in one.points], 0.75)
    anchors = [x for one in series for x in (one.level, one.start) if x is not None]
    anchors += [one.end.value + sign * 2 * _se(one.end) for one in series if one.end for sign in (-1, 1)]
    for one in series:
        tail = [point.value for point in one.points[-(len(one.points) // 10 + 1) :]]
        anchors += [_quantile(tail, 0.5)] if tail else []
    low = min([max(min(edges), lowest_half - reach), *anchors])
    high = max([min(max(edges), highest_half + reach), *anchors])
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - margin, high + margin
    if floor is not None:
        # An estimate of a bounded quantity can fall below its bound by chance; the line shows it.
        low = min(floor, low) if min(values) < floor else floor
    return low, high if ceiling is None else min(high, ceiling)


def _se(point: Point) -> float:
    return point.se if math.isfinite(point.se) else 0.0


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _note_on_cut(series: Sequence[Series], low: float, high: float) -> str:
    values = [point.value for one in series for point in one.points]
    above, below = sum(value > high for value in values), sum(value < low for value in values)
    notes = []
    if above:
        notes.append(f"{above} of {len(values)} points lie above the axis (▲), up to {max(values):.3g}.")
    if below:
        notes.append(f"{below} of {len(values)} points lie below the axis (▼), down to {min(values):.3g}.")
    return " ".join(notes)


def _draw(name: str, series: Sequence[Series], low: float, high: float, unit: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 11}):
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        for edge in ("top", "right", "left"):
            axes.spines[edge].set_visible(False)
        axes.spines["bottom"].set_color(_GRID)
        axes.tick_params(length=0, labelcolor=_INK, pad=8)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        ends = [one.end.sequences for one in series if one.end]
        last = max([point.sequences for one in series for point in one.points] + ends) or 1.0
        for index, one in enumerate(series):
            _draw_series(axes, one, low, high, last, _turn(series, index))
        axes.set_ylim(low, high)
        axes.set_xlim(-0.025 * last, 1.025 * last)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _position: compact_count(x)))
        axes.set_xlabel("sequences drawn", color=_INK, fontsize=11, labelpad=6)
        if unit:
            # Above the labels of the axis; the empty title leaves room.
            axes.set_title(" ", fontsize=11, pad=8)
            figure.text(0.0, 1.0, unit, color=_INK, fontsize=11, verticalalignment="top")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _turn(series: Sequence[Series], index: int) -> tuple[int, int]:
    """The index of a series among those that share its dashed level, and their number: their dashes alternate."""
    sharing = [i for i, one in enumerate(series) if one.level is not None and one.level == series[index].level]
    return (sharing.index(index), len(sharing)) if index in sharing else (0, 1)


def _draw_series(axes: Any, one: Series, low: float, high: float, last: float, turn: tuple[int, int]) -> None:
    color = _SERIES[one.color]
    x = [point.sequences for point in one.points]
    y = [point.value for point in one.points]
    if one.level is not None:
        nth, of = turn
        dash = 5
        pattern = (nth * 2 * dash, (dash, dash + (of - 1) * 2 * dash))
        axes.axhline(one.level, color=color, linewidth=1.3, linestyle=pattern, alpha=0.9)
    lower = [point.value - 2 * _se(point) for point in one.points]
    upper = [point.value + 2 * _se(point) for point in one.points]
    axes.fill_between(x, lower, upper, color=color, alpha=0.16, linewidth=0)
    few = len(one.points) <= 2
    axes.plot(x, y, color=color, linewidth=1.8, solid_joinstyle="round", marker="o" if few else None, markersize=4)
    if one.start is not None:
        # The samples of the fit come before the first step and do not change the policy.
        axes.plot([0, *x[:1]], [one.start, *y[:1]], color=color, linewidth=1, alpha=0.5)
        axes.plot([0], [one.start], "o", markersize=6, color=color, markerfacecolor="none", clip_on=False, zorder=5)
    if one.end is not None:
        bar = 2 * _se(one.end)
        axes.errorbar([one.end.sequences], [one.end.value], [bar], fmt="o", markersize=6, color=color, clip_on=False)
    for marker, edge, cut in (
        ("^", high, [a for a, b in zip(x, y, strict=True) if b > high]),
        ("v", low, [a for a, b in zip(x, y, strict=True) if b < low]),
    ):
        if cut:
            axes.plot(cut, [edge] * len(cut), marker, markersize=5, color=color, clip_on=False)


def _inline(svg: str, name: str, attributes: str) -> str:
    """The drawing as one element of an HTML page: no prolog, no metadata, ids of its own, the page's colours."""
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'xlink:href="#', f'href="#{name}-', body)
    for color, variable in _VARIABLES.items():
        body = body.replace(color, variable)
    return f"<svg {attributes}>{body.strip()}"
