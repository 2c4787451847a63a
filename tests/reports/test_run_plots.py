"""Plots: axes that fit the numbers, and whole SVG elements that do not affect the rest of the page."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

from tiltlm.reports.plots import Plot, Point, Series, compact_count, line_plot


def decay(n: int, start: float = 0.2, end: float = 0.04, se: float = 0.005) -> list[Point]:
    return [Point(100.0 * (i + 1), end + (start - end) * math.exp(-4 * i / n), se) for i in range(n)]


def drawn(points: list[Point], **choices: float | None) -> Plot:
    plot = line_plot("test", "a test", [Series(0, points)], **choices)
    assert plot is not None
    return plot


def tick_values(plot: Plot) -> list[float]:
    """The labels of the y axis, which are the right-aligned texts."""
    labels = re.findall(r"<text[^>]*text-anchor: end[^>]*>([^<]*)</text>", plot.svg)
    return [float(label.replace("−", "-")) for label in labels]


def test_an_early_spike_is_cut_off_and_counted() -> None:
    points = decay(60)
    points[2] = Point(points[2].sequences, 40.0, 30.0)
    plot = drawn(points, floor=0.0)
    assert max(tick_values(plot)) < 1
    assert plot.note == "1 of 60 points lie above the axis (▲), up to 40."
    assert drawn(decay(60), floor=0.0).note == ""


def test_the_end_of_the_run_is_never_cut_off() -> None:
    points = decay(60)
    points[-8:] = [Point(point.sequences, 70.0, 1.0) for point in points[-8:]]
    plot = drawn(points, floor=0.0)
    assert plot.note == ""
    assert max(tick_values(plot)) >= 60


def test_levels_and_end_points_fit_the_axis() -> None:
    series = Series(0, decay(30), level=3.0, start=0.2, end=Point(3000, 4.0, 0.5))
    plot = line_plot("test", "a test", [series], floor=0.0)
    assert plot is not None
    assert max(tick_values(plot)) >= 4


def test_the_axis_stays_within_its_bounds_unless_estimates_exceed_them() -> None:
    assert min(tick_values(drawn(decay(30, se=0.2), floor=0.0))) == 0
    assert max(tick_values(drawn(decay(30, start=0.99, end=0.98, se=0.2), floor=0.0, ceiling=1.0))) == 1
    negative = [Point(point.sequences, point.value - 0.1, 0.01) for point in decay(30)]
    assert min(tick_values(drawn(negative, floor=0.0))) < 0


def test_values_that_are_not_finite_are_omitted() -> None:
    assert line_plot("test", "a test", [Series(0, [Point(1, math.nan, math.nan)])]) is None
    assert line_plot("test", "a test", []) is None
    points = [Point(1, 0.5, math.nan), Point(2, math.nan, 0.1), Point(3, 0.6, math.inf)]
    plot = line_plot("test", "a test", [Series(0, points, level=math.nan, start=math.nan, end=Point(3, math.nan, 0.0))])
    assert plot is not None
    assert "nan" not in plot.svg.lower()


def test_one_point_alone_can_be_drawn() -> None:
    assert drawn([Point(512, 0.3, 0.01)]).svg.count("<svg") == 1


def test_many_steps_are_averaged_and_the_error_shrinks_with_them() -> None:
    noisy = [Point(i, 0.5, 0.1) for i in range(700)]
    plot = drawn(noisy)
    assert plot.averaged == 10
    assert len(plot.svg) < 60_000
    # Two standard errors of a mean of ten, 0.2/√10, not of one.
    assert max(tick_values(plot)) < 0.6


def test_the_unit_stands_above_the_axis() -> None:
    plot = line_plot("test", "a test", [Series(0, decay(20))], unit="nats")
    assert plot is not None
    assert re.findall(r"<text[^>]*>(nats)</text>", plot.svg) == ["nats"]


def test_the_svg_is_one_element_with_ids_of_its_own() -> None:
    plots = [
        line_plot(name, "a test", [Series(0, decay(20)), Series(1, decay(20, end=0.1))]) for name in ("one", "two")
    ]
    ids = [set(re.findall(r'\bid="([^"]+)"', plot.svg)) for plot in plots if plot]
    assert not ids[0] & ids[1]
    for plot in plots:
        assert plot is not None
        root = ElementTree.fromstring(plot.svg.replace("<svg", '<svg xmlns:xlink="http://www.w3.org/1999/xlink"', 1))
        assert root.get("role") == "img"
        own = {element.get("id") for element in root.iter()}
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', plot.svg)
        assert used
        assert set(used) <= own


def test_the_svg_uses_the_colours_of_the_page_and_loads_nothing() -> None:
    svg = drawn(decay(20)).svg
    assert "var(--series-0)" in svg
    assert "var(--quiet)" in svg
    assert not re.findall(r"#0[0-9a-f]{5}\b", svg)
    assert "http" not in svg
    assert "<style" not in svg
    assert "<metadata" not in svg


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert drawn(decay(20)).svg == drawn(decay(20)).svg


def test_dashes_of_series_that_share_a_level_alternate() -> None:
    together = [Series(0, decay(20), level=0.1), Series(1, decay(20, end=0.1), level=0.1)]
    apart = [Series(0, decay(20), level=0.1), Series(1, decay(20, end=0.1), level=0.15)]
    dashes = []
    for series in (together, apart):
        plot = line_plot("test", "a test", series)
        assert plot is not None
        dashes.append(re.findall(r"stroke-dasharray: ([\d.]+),([\d.]+); stroke-dashoffset: ([\d.-]+)", plot.svg))
    (first, second), (third, fourth) = dashes
    assert float(first[1]) == 3 * float(first[0])
    assert float(second[2]) - float(first[2]) == 2 * float(first[0])
    assert third == fourth


def test_counts_are_short() -> None:
    assert [compact_count(n) for n in (0, 950, 1000, 12_345, 1_500_000)] == ["0", "950", "1k", "12.3k", "1.5M"]
