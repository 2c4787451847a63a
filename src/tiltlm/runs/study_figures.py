"""The figures of a study: small panels, one for each task, in which a method has the same colour everywhere."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tiltlm.runs.plots import compact_count
from tiltlm.runs.study import SPREADS, Method, Row, Study, Task
from tiltlm.runs.study_statistics import last_values, over_seeds
from tiltlm.runs.study_tables import TITLES
from tiltlm.runs.summary import Measured, plain_number

# Told apart by all common kinds of colour vision: Okabe & Ito (2008) without its yellow, which is too light for lines,
# then two of Tol's (2021). Beside the colour each has a marker of its own.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D46", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", "h", ">", "d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK, GRID = "#333333", "#dddddd"
PANEL, COLUMNS = (3.1, 2.35), 4
SPREAD_TITLES = {
    "gradient_variance": "variance of the gradient",
    "advantage_variance": "variance of the advantage",
    "advantage_mean_abs": "mean |advantage|",
}
FORMATS = ("pdf", "svg", "png")


@dataclass(frozen=True)
class StudyFigure:
    """A figure under its file name, as the bytes of each format."""

    name: str
    title: str
    explanation: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class Panel:
    """One of a figure's axes: its title, and what draws on it."""

    title: str
    draw: Callable[[Any], None]


@dataclass(frozen=True)
class Style:
    """How a method looks: the colour of its family, and a dash of its own among that."""

    color: str
    marker: str
    dash: Any


def styles(methods: Sequence[Method]) -> dict[str, Style]:
    """The look of each method, the same in all figures."""
    families = list(dict.fromkeys(method.family for method in methods))
    found = {}
    for method in methods:
        place = families.index(method.family)
        variants = [other.name for other in methods if other.family == method.family]
        dash = (variants.index(method.name) + place // len(COLORS)) % len(DASHES)
        found[method.name] = Style(COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)], DASHES[dash])
    return found


def study_figures(study: Study) -> Iterator[StudyFigure]:
    """All figures that the study has numbers for."""
    band = "Lines are means over seeds, bands two standard errors over them; a ring is the end of a run."
    drawn = (
        "The first sequences of a run are those of its fit; it trains on them once all are drawn, so lines fall there."
    )
    for metric in ("kl_p_pi", "kl_pi_a", "distinct_1", "self_bleu_5"):
        panels = [_curve(study, task.name, task.label, metric) for task in study.tasks]
        yield from _figure(study, metric, TITLES[metric], f"{band} {drawn}", panels, "sequences drawn")
    panels = [
        _curve(
            study, task.name, task.label if len(task.goals) == 1 else f"{task.label}: {name}", f"moment:{name}", goal
        )
        for task in study.tasks
        for name, goal in task.goals.items()
    ]
    yield from _figure(study, "moments", "E_π[φ]", f"{band} Dashed: the goal. {drawn}", panels, "sequences drawn")
    panels = [_curve(study, task.name, task.label, "kl_p_pi", passes=True) for task in study.tasks]
    yield from _figure(study, "kl_p_pi_passes", "KL(p‖π), nats, against forward passes", band, panels, "forward passes")
    for metric, name in (("self_bleu_5", "alignment_diversity"), ("kl_pi_a", "kl_frontier")):
        panels = [
            _way(
                study,
                task.name,
                task.label if len(task.goals) == 1 else f"{task.label}: {feature}",
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
        yield from _figure(study, name, title, text, panels, TITLES[metric])
    yield from _spreads(study)
    yield from _batch_sizes(study)


def _figure(
    study: Study,
    name: str,
    title: str,
    explanation: str,
    panels: Sequence[Panel | None],
    x: str,
    columns: int = COLUMNS,
    methods: Sequence[Method] | None = None,
) -> Iterator[StudyFigure]:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return
    look = styles(study.methods)
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    ran = {row.method for row in study.rows}
    legend = [method for method in methods or study.methods if method.name in ran]
    fonts = {"svg.fonttype": "path", "pdf.fonttype": 42, "font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context({"svg.hashsalt": name, **fonts}):
        per_row = max(1, int(columns * PANEL[0] / (0.5 + 0.085 * max(len(m.label) for m in legend))))
        below = 0.35 + 0.22 * math.ceil(len(legend) / per_row)
        width, height = max(columns, 2) * PANEL[0], rows * PANEL[1] + below
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, shown, strict=False):
            _plain_axes(axes)
            axes.set_title(_shortened(panel.title), color=INK, fontsize=9, loc="left")
            panel.draw(axes)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel(x, color=INK, fontsize=9)
        handles = [
            Line2D(
                [], [], color=look[m.name].color, marker=look[m.name].marker, linestyle=look[m.name].dash, markersize=5
            )
            for m in legend
        ]
        figure.legend(
            handles,
            [m.label for m in legend],
            loc="outside lower center",
            ncols=min(per_row, len(legend)),
            frameon=False,
        )
        files = {}
        for form in FORMATS:
            stream = io.BytesIO()
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form)
            figure.savefig(stream, format=form, dpi=160, metadata=metadata)
            files[form] = stream.getvalue()
    yield StudyFigure(name, title, explanation, files)


def _plain_axes(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    for edge in ("bottom", "left"):
        axes.spines[edge].set_color(GRID)
    axes.tick_params(length=0, labelcolor=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _position: compact_count(x)))


def _along(study: Study, task: str, method: str, metric: str) -> list[tuple[int, int, Measured]]:
    """Means over seeds at each number of sequences and passes, in order, with errors over seeds."""
    at: dict[tuple[int, int], dict[int, Measured]] = {}
    for row in study.series.get((task, method, metric), []):
        at.setdefault((row.sequences, row.forward_passes), {})[row.seed] = Measured(row.value, row.se)
    seeds = max((len(values) for values in at.values()), default=0)
    # Where some seeds have no point a mean would jump; passes can differ a little from seed to seed.
    points = _by_place(study, task, method, metric) if any(len(v) < seeds for v in at.values()) else at
    return [(sequences, passes, over_seeds(values)) for (sequences, passes), values in points.items()]


def _by_place(study: Study, task: str, method: str, metric: str) -> dict[tuple[int, int], dict[int, Measured]]:
    """The same with the k-th points of all seeds at their mean place."""
    by_seed: dict[int, list[Row]] = {}
    for row in study.series.get((task, method, metric), []):
        by_seed.setdefault(row.seed, []).append(row)
    found = {}
    for k in range(min(len(rows) for rows in by_seed.values())):
        rows = [own[k] for own in by_seed.values()]
        place = round(fmean(r.sequences for r in rows)), round(fmean(r.forward_passes for r in rows))
        found[place] = {row.seed: Measured(row.value, row.se) for row in rows}
    return found


def _curve(
    study: Study, task: str, title: str, metric: str, goal: float | None = None, *, passes: bool = False
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
        if metric == "kl_p_pi":
            axes.set_ylim(bottom=0)

    return Panel(title, draw)


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
        _curve(study, task.name, f"{task.label}: {title}", metric)
        for task in study.tasks
        for metric, title in SPREAD_TITLES.items()
        if any(row.metric == metric for row in study.rows)
    ]
    text = (
        "Of single samples of each batch, before the update on it: the trace of the gradient's covariance, and the "
        "coefficient of ∇ log π. Lines are means over seeds and steps beside each other, bands two standard errors."
    )
    yield from _figure(study, "variance", "Variance along training", text, panels, "sequences drawn", len(SPREADS))


def _batch_sizes(study: Study) -> Iterator[StudyFigure]:
    sized = [method for method in study.methods if method.batch_size is not None]
    families = list(dict.fromkeys(method.family for method in sized))
    look = styles(study.methods)

    def panel(task: str, title: str, metric: str) -> Panel | None:
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

        return Panel(title, draw)

    panels = [
        panel(task.name, f"{task.label}: {TITLES[metric]}", metric)
        for task in study.tasks
        for metric in ("kl_p_pi", "moment_error", "kl_pi_a")
    ]
    text = "The end of each run, at equal total samples: means over seeds, bars two standard errors over them."
    firsts = [next(m for m in sized if m.family == family) for family in families]
    yield from _figure(study, "batch_size", "Batch size", text, panels, "batch size", 3, firsts)


def _of_feature(task: Task, feature: str) -> str:
    return task.label if len(task.goals) == 1 else f"{task.label}: {feature}"


def _shortened(title: str, most: int = 38) -> str:
    return title if len(title) <= most else f"{title[: most - 1]}…"
