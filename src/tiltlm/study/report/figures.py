"""The figures of a study: a panel for each task, and for each feature where moments are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from tiltlm.reports.summary import Measured, plain_number
from tiltlm.study.record import Row, Study, Task
from tiltlm.study.report.drawing import INK, Panel, StudyFigure, draw_figure, styles
from tiltlm.study.report.tables import TITLES
from tiltlm.study.rows import SPREADS
from tiltlm.study.statistics import last_values, over_seeds

SIZED = {"kl_p_pi": TITLES["kl_p_pi"], "moment_error": "distance of moments from goals", "kl_pi_a": TITLES["kl_pi_a"]}
# For these metrics one method may be far beyond the others; the axis is logarithmic if the largest exceeds the median
# so many times.
FAR_APART, TOWERS = ("kl_p_pi", "kl_pi_a"), 3.0
SPREAD_TITLES = {
    "gradient_variance": "variance of the gradient",
    "advantage_variance": "variance of the advantage",
    "advantage_mean_abs": "mean |advantage|",
}


def study_figures(study: Study) -> Iterator[StudyFigure]:
    """All figures with data."""
    band = "Lines are means over seeds, bands two standard errors (of one seed: its estimate's); open marks end runs."
    drawn = (
        "The first sequences of a run are those of its fit; it trains on them once all are drawn, so lines fall there."
    )
    by_decades = "The axis is logarithmic where one line would flatten the others."
    for metric in ("kl_p_pi", "kl_pi_a", "distinct_1", "self_bleu_5"):
        panels = [_curve(study, task.name, task.label, metric) for task in study.tasks]
        text = f"{band} {drawn} {by_decades}" if metric in FAR_APART else f"{band} {drawn}"
        text += _fewer_on_the_way(study) if metric == "kl_p_pi" else ""
        yield from draw_figure(study, metric, TITLES[metric], text, panels, "sequences drawn")
    panels = [
        _curve(study, task.name, _of_feature(task, name), f"moment:{name}", goal)
        for task in study.tasks
        for name, goal in task.goals.items()
    ]
    yield from draw_figure(study, "moments", "E_π[φ]", f"{band} Dashed: the goal. {drawn}", panels, "sequences drawn")
    panels = [_curve(study, task.name, task.label, "kl_p_pi", passes=True) for task in study.tasks]
    yield from draw_figure(
        study,
        "kl_p_pi_passes",
        "KL(p‖π), nats, against forward passes",
        f"{band} {by_decades}{_fewer_on_the_way(study)}",
        panels,
        "forward passes",
    )
    for metric, name in (("self_bleu_5", "alignment_diversity"), ("kl_pi_a", "kl_frontier")):
        panels = [
            _way(
                study,
                task.name,
                _of_feature(task, feature),
                feature,
                goal,
                metric,
            )
            for task in study.tasks
            for feature, goal in task.goals.items()
        ]
        title = f"E_π[φ] against {TITLES[metric]}"
        text = (
            "Each method's way from the base (grey dot), means over seeds; the large mark is its end. Dashed: the goal."
        )
        yield from draw_figure(study, name, title, text, panels, TITLES[metric])
    yield from _spreads(study)
    yield from _batch_sizes(study)


def _along(study: Study, task: str, method: str, metric: str) -> list[tuple[int, int, Measured]]:
    """Means over seeds at each number of sequences and passes, in order, with errors over seeds."""
    at: dict[tuple[int, int], dict[int, Measured]] = {}
    for row in study.series.get((task, method, metric), []):
        at.setdefault((row.sequences, row.forward_passes), {})[row.seed] = Measured(row.value, row.se)
    seeds = max((len(values) for values in at.values()), default=0)
    # A mean would jump where some seeds have no point; passes differ a little between seeds.
    points = _by_place(study, task, method, metric) if any(len(v) < seeds for v in at.values()) else at
    return [(sequences, passes, over_seeds(values)) for (sequences, passes), values in points.items()]


def _by_place(study: Study, task: str, method: str, metric: str) -> dict[tuple[int, int], dict[int, Measured]]:
    """The same, with the k-th points of all seeds at their mean position."""
    by_seed: dict[int, list[Row]] = {}
    for row in study.series.get((task, method, metric), []):
        by_seed.setdefault(row.seed, []).append(row)
    found = {}
    for k in range(min(len(rows) for rows in by_seed.values())):
        rows = [own[k] for own in by_seed.values()]
        place = round(fmean(r.sequences for r in rows)), round(fmean(r.forward_passes for r in rows))
        found[place] = {row.seed: Measured(row.value, row.se) for row in rows}
    return found


def _fewer_on_the_way(study: Study) -> str:
    """A note if KL(p‖π) uses fewer texts during a run than at its end: the line may jump there."""
    stated = study.made.get("study") or {}
    reference, way = stated.get("reference", {}), stated.get("curve", {}).get("reference", 0)
    end = min(reference.get("scored", 0), reference.get("samples", 0))
    text = f" On the way it is of the first {way:,} texts of the reference, at the end of up to {end:,}."
    return text if way < end else ""


def _curve(
    study: Study,
    task: str,
    title: str,
    metric: str,
    goal: float | None = None,
    *,
    passes: bool = False,
    y: str = "",
) -> Panel | None:
    lines = {m.name: _along(study, task, m.name, metric) for m in study.methods}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    look = styles(study.methods)

    def draw(axes: Any) -> None:
        if goal is not None:
            axes.axhline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for name, points in lines.items():
            x = [point[1 if passes else 0] for point in points]
            y = [point[2].value for point in points]
            error = [2 * point[2].se if math.isfinite(point[2].se) else 0.0 for point in points]
            low, high = ([v + s * e for v, e in zip(y, error, strict=True)] for s in (-1, 1))
            axes.fill_between(x, low, high, color=look[name].color, alpha=0.14, linewidth=0)
            axes.plot(x, y, color=look[name].color, linestyle=look[name].dash, linewidth=1.5)
            axes.plot(x[-1:], y[-1:], look[name].marker, color=look[name].color, markersize=5, markerfacecolor="white")
        if metric in FAR_APART:
            _from_zero_or_by_decades(axes, [point[2].value for points in lines.values() for point in points])

    return Panel(title, draw, y)


def _from_zero_or_by_decades(axes: Any, values: list[float]) -> None:
    """An axis from 0, or a logarithmic one if one line would flatten all others."""
    from matplotlib.ticker import LogLocator, NullLocator

    if min(values) <= 0 or max(values) < TOWERS * median(values):
        axes.set_ylim(bottom=0)
        return
    written = axes.yaxis.get_major_formatter()
    axes.set_yscale("log")
    # Bands may reach below 0.
    axes.set_ylim(bottom=0.8 * min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(written)


def _way(study: Study, task: str, title: str, feature: str, goal: float | None, metric: str) -> Panel | None:
    """Moment against another metric, from the base to the end."""
    look, lines, start = styles(study.methods), {}, None
    for method in study.methods:
        up = {point[:2]: point[2].value for point in _along(study, task, method.name, f"moment:{feature}")}
        across = {point[:2]: point[2].value for point in _along(study, task, method.name, metric)}
        both = [(across[place], up[place]) for place in up if place in across]
        if both:
            lines[method.name] = both
            start = both[0]
    if start is None:
        return None

    def draw(axes: Any) -> None:
        if goal is not None:
            axes.axhline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for name, points in lines.items():
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=look[name].color, linestyle=look[name].dash, linewidth=1.1, alpha=0.75)
            axes.plot(x[-1:], y[-1:], look[name].marker, color=look[name].color, markersize=6.5)
        axes.plot([start[0]], [start[1]], "o", color="#888888", markersize=5)

    return Panel(title, draw)


def _spreads(study: Study) -> Iterator[StudyFigure]:
    panels = [
        _curve(study, task.name, task.label, metric, passes=True, y=title)
        for task in study.tasks
        for metric, title in SPREAD_TITLES.items()
        if any(row.metric == metric for row in study.rows)
    ]
    text = (
        "Of single samples of each batch, before the update on it: the trace of the gradient's covariance, and the "
        "coefficient of ∇ log π. Lines are means over seeds and steps beside each other, bands two standard errors."
    )
    yield from draw_figure(study, "variance", "Variance along training", text, panels, "forward passes", len(SPREADS))


def _batch_sizes(study: Study) -> Iterator[StudyFigure]:
    sized = [method for method in study.methods if method.batch_size is not None]
    families = list(dict.fromkeys(method.family for method in sized))
    look = styles(study.methods)

    def panel(task: str, title: str, metric: str, y: str) -> Panel | None:
        cells = last_values(study, metric)
        lines = {}
        for family in families:
            own = sorted((m for m in sized if m.family == family), key=lambda m: m.batch_size or 0)
            points = [(m.batch_size or 0, over_seeds(cells[task, m.name])) for m in own if (task, m.name) in cells]
            if points:
                lines[own[0].name] = points
        if not lines:
            return None

        def draw(axes: Any) -> None:
            from matplotlib.ticker import FixedLocator, NullLocator

            axes.set_xscale("log", base=2)
            for name, points in lines.items():
                error = [2 * one.se if math.isfinite(one.se) else 0.0 for _, one in points]
                axes.errorbar(
                    [size for size, _ in points],
                    [one.value for _, one in points],
                    error,
                    color=look[name].color,
                    marker=look[name].marker,
                    markersize=5,
                    linewidth=1.5,
                    capsize=2,
                )
            sizes = sorted({size for points in lines.values() for size, _ in points})
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _position: plain_number(x))

        return Panel(title, draw, y)

    panels = [panel(task.name, task.label, metric, y) for task in study.tasks for metric, y in SIZED.items()]
    text = "The end of each run, at equal total samples: means over seeds, bars two standard errors over them."
    firsts = [next(m for m in sized if m.family == family) for family in families]
    firsts = [replace(m, label=m.label.removesuffix(f", batch {m.batch_size}")) for m in firsts]
    yield from draw_figure(study, "batch_size", "Batch size", text, panels, "batch size", 3, firsts)


def _of_feature(task: Task, feature: str) -> str:
    return task.label if len(task.goals) == 1 else f"{task.label}: {feature}"
