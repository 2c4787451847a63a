"""The figures of a study: a panel for each task, and for each feature where moments are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from tiltlm.reports.summary import Measured, plain_number
from tiltlm.study.record import Row, Study, StudyTask
from tiltlm.study.report.drawing import INK, Panel, StudyFigure, draw_figure, method_styles
from tiltlm.study.report.tables import TITLES
from tiltlm.study.rows import NOISE_METRICS
from tiltlm.study.statistics import last_values, over_seeds

BATCH_SIZE_METRICS = {
    "kl_p_pi": TITLES["kl_p_pi"],
    "moment_error": "distance of moments from goals",
    "kl_pi_a": TITLES["kl_pi_a"],
}
# The axis of these metrics is logarithmic if the largest value is more than this multiple of the median.
LOG_SCALED, LOG_SCALE_RATIO = ("kl_p_pi", "kl_pi_a"), 3.0
NOISE_TITLES = {
    "gradient_variance": "variance of the gradient",
    "advantage_variance": "variance of the advantage",
    "advantage_mean_abs": "mean |advantage|",
}


def study_figures(study: Study) -> Iterator[StudyFigure]:
    """All figures with data."""
    band = (
        "Lines: means over seeds. Bands: ± two standard errors over seeds (with one seed, of its estimate). "
        "Open marks: the end of a run."
    )
    drawn = (
        "The first sequences of a run are its fit samples. Steps on these draw no more: a line can be vertical there."
    )
    log_scale = "An axis is logarithmic if one line would otherwise flatten the others."
    for metric in ("kl_p_pi", "kl_pi_a", "distinct_1", "self_bleu_5"):
        panels = [_curve(study, task.name, task.label, metric) for task in study.tasks]
        text = f"{band} {drawn} {log_scale}" if metric in LOG_SCALED else f"{band} {drawn}"
        text += _note_on_curve_sample(study) if metric == "kl_p_pi" else ""
        yield from draw_figure(study, metric, TITLES[metric], text, panels, "sequences drawn")
    panels = [
        _curve(study, task.name, _panel_title(task, name), f"moment:{name}", goal)
        for task in study.tasks
        for name, goal in task.goals.items()
    ]
    yield from draw_figure(study, "moments", "E_π[φ]", f"{band} Dashed: the goal. {drawn}", panels, "sequences drawn")
    panels = [_curve(study, task.name, task.label, "kl_p_pi", passes=True) for task in study.tasks]
    yield from draw_figure(
        study,
        "kl_p_pi_passes",
        "KL(p‖π), nats, against forward passes",
        f"{band} {log_scale}{_note_on_curve_sample(study)}",
        panels,
        "forward passes",
    )
    for metric, name in (("self_bleu_5", "alignment_diversity"), ("kl_pi_a", "kl_frontier")):
        panels = [
            _trajectory(
                study,
                task.name,
                _panel_title(task, feature),
                feature,
                goal,
                metric,
            )
            for task in study.tasks
            for feature, goal in task.goals.items()
        ]
        title = f"E_π[φ] against {TITLES[metric]}"
        text = (
            "Lines: means over seeds, from the base (grey dot) to the end of the runs (large mark). Dashed: the goal."
        )
        yield from draw_figure(study, name, title, text, panels, TITLES[metric])
    yield from _gradient_noise(study)
    yield from _batch_sizes(study)


def _means_over_seeds(study: Study, task: str, method: str, metric: str) -> list[tuple[int, int, Measured]]:
    """Means over seeds at each number of sequences and passes, in order, with errors over seeds."""
    at: dict[tuple[int, int], dict[int, Measured]] = {}
    for row in study.series.get((task, method, metric), []):
        at.setdefault((row.sequences, row.forward_passes), {})[row.seed] = Measured(row.value, row.se)
    seeds = max((len(values) for values in at.values()), default=0)
    # Passes differ slightly between seeds, and a mean over other seeds at each point would jump.
    points = _matched_by_index(study, task, method, metric) if any(len(v) < seeds for v in at.values()) else at
    return [(sequences, passes, over_seeds(values)) for (sequences, passes), values in points.items()]


def _matched_by_index(study: Study, task: str, method: str, metric: str) -> dict[tuple[int, int], dict[int, Measured]]:
    """The same, with the k-th points of all seeds at their mean numbers of sequences and passes."""
    by_seed: dict[int, list[Row]] = {}
    for row in study.series.get((task, method, metric), []):
        by_seed.setdefault(row.seed, []).append(row)
    found = {}
    for k in range(min(len(rows) for rows in by_seed.values())):
        rows = [own[k] for own in by_seed.values()]
        place = round(fmean(r.sequences for r in rows)), round(fmean(r.forward_passes for r in rows))
        found[place] = {row.seed: Measured(row.value, row.se) for row in rows}
    return found


def _note_on_curve_sample(study: Study) -> str:
    """A note if KL(p‖π) uses fewer texts of the reference during a run than at its end."""
    settings = study.made.get("study") or {}
    reference, during = settings.get("reference", {}), settings.get("curve", {}).get("reference", 0)
    end = min(reference.get("scored", 0), reference.get("samples", 0))
    text = (
        f" During a run KL(p‖π) is measured on the first {during:,} texts of the reference, "
        f"at the end on up to {end:,}."
    )
    return text if during < end else ""


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
    lines = {m.name: _means_over_seeds(study, task, m.name, metric) for m in study.methods}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    style = method_styles(study.methods)

    def draw(axes: Any) -> None:
        if goal is not None:
            axes.axhline(goal, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for name, points in lines.items():
            x = [point[1 if passes else 0] for point in points]
            y = [point[2].value for point in points]
            error = [2 * point[2].se if math.isfinite(point[2].se) else 0.0 for point in points]
            low, high = ([v + s * e for v, e in zip(y, error, strict=True)] for s in (-1, 1))
            axes.fill_between(x, low, high, color=style[name].color, alpha=0.14, linewidth=0)
            axes.plot(x, y, color=style[name].color, linestyle=style[name].dash, linewidth=1.5)
            axes.plot(
                x[-1:], y[-1:], style[name].marker, color=style[name].color, markersize=5, markerfacecolor="white"
            )
        if metric in LOG_SCALED:
            _linear_or_log_scale(axes, [point[2].value for points in lines.values() for point in points])

    return Panel(title, draw, y)


def _linear_or_log_scale(axes: Any, values: list[float]) -> None:
    """An axis from 0, or a logarithmic one if one line would otherwise flatten all others."""
    from matplotlib.ticker import LogLocator, NullLocator

    if min(values) <= 0 or max(values) < LOG_SCALE_RATIO * median(values):
        axes.set_ylim(bottom=0)
        return
    written = axes.yaxis.get_major_formatter()
    axes.set_yscale("log")
    # Bands may reach below 0.
    axes.set_ylim(bottom=0.8 * min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(written)


def _trajectory(study: Study, task: str, title: str, feature: str, goal: float | None, metric: str) -> Panel | None:
    """A panel of a moment against another metric, from the base to the end."""
    style, lines, start = method_styles(study.methods), {}, None
    for method in study.methods:
        up = {point[:2]: point[2].value for point in _means_over_seeds(study, task, method.name, f"moment:{feature}")}
        across = {point[:2]: point[2].value for point in _means_over_seeds(study, task, method.name, metric)}
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
            axes.plot(x, y, color=style[name].color, linestyle=style[name].dash, linewidth=1.1, alpha=0.75)
            axes.plot(x[-1:], y[-1:], style[name].marker, color=style[name].color, markersize=6.5)
        axes.plot([start[0]], [start[1]], "o", color="#888888", markersize=5)

    return Panel(title, draw)


def _gradient_noise(study: Study) -> Iterator[StudyFigure]:
    panels = [
        _curve(study, task.name, task.label, metric, passes=True, y=title)
        for task in study.tasks
        for metric, title in NOISE_TITLES.items()
        if any(row.metric == metric for row in study.rows)
    ]
    text = (
        "Over single samples of a batch, before its update: the trace of the gradient's covariance, and variance and "
        "mean absolute value of the coefficient of ∇ log π. Lines: means over seeds and adjacent steps. Bands: ± two "
        "standard errors."
    )
    yield from draw_figure(
        study, "variance", "Variance along training", text, panels, "forward passes", len(NOISE_METRICS)
    )


def _batch_sizes(study: Study) -> Iterator[StudyFigure]:
    sized = [method for method in study.methods if method.batch_size is not None]
    families = list(dict.fromkeys(method.family for method in sized))
    style = method_styles(study.methods)

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
                    color=style[name].color,
                    marker=style[name].marker,
                    markersize=5,
                    linewidth=1.5,
                    capsize=2,
                )
            sizes = sorted({size for points in lines.values() for size, _ in points})
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _position: plain_number(x))

        return Panel(title, draw, y)

    panels = [
        panel(task.name, task.label, metric, y) for task in study.tasks for metric, y in BATCH_SIZE_METRICS.items()
    ]
    text = "The end of the runs, at equal numbers of sequences. Points: means over seeds. Bars: ± two standard errors."
    firsts = [next(m for m in sized if m.family == family) for family in families]
    firsts = [replace(m, label=m.label.removesuffix(f", batch {m.batch_size}")) for m in firsts]
    yield from draw_figure(study, "batch_size", "Batch size", text, panels, "batch size", 3, firsts)


def _panel_title(task: StudyTask, feature: str) -> str:
    return task.label if len(task.goals) == 1 else f"{task.label}: {feature}"
