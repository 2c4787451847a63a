"""Drawing of a study's figures: small panels and one legend; a method looks the same everywhere."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tiltlm.reports.plots import compact_count
from tiltlm.study.record import Study, StudyMethod

# Distinguishable with colour blindness: Okabe & Ito (2008) without yellow, which is too light for lines, then two
# colours of Tol (2021). Each also has its own marker.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D46", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p", "h", ">", "d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (5, 1.5, 1, 1.5)))
# These methods look the same in every study; others get the remaining colours.
FAMILIAR = ("reinforce", "kl_control", "ppo", "gdc", "gdc++", "gdc++ on-policy", "f_dpg js", "kept", "guided", "pooled")
INK, GRID = "#333333", "#dddddd"
PANEL, COLUMNS = (3.1, 2.35), 4
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
    """One of a figure's panels: its title, its drawing function, and the label of its y axis if panels differ in it."""

    title: str
    draw: Callable[[Any], None]
    y: str = ""


@dataclass(frozen=True)
class Style:
    """The look of a method: the colour of its family, and its own dash within it."""

    color: str
    marker: str
    dash: Any


def method_styles(methods: Sequence[StudyMethod]) -> dict[str, Style]:
    """The look of each method, the same in all figures."""
    families = list(dict.fromkeys(method.family for method in methods))
    indices = {family: FAMILIAR.index(family) for family in families if family in FAMILIAR}
    free = [index for index in range(len(FAMILIAR) + len(families)) if index not in indices.values()]
    indices |= dict(zip((family for family in families if family not in FAMILIAR), free, strict=False))
    found = {}
    for method in methods:
        index = indices[method.family]
        variants = [other.name for other in methods if other.family == method.family]
        dash = (variants.index(method.name) + index // len(COLORS)) % len(DASHES)
        found[method.name] = Style(COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)], DASHES[dash])
    return found


def draw_figure(
    study: Study,
    name: str,
    title: str,
    explanation: str,
    panels: Sequence[Panel | None],
    x: str,
    columns: int = COLUMNS,
    methods: Sequence[StudyMethod] | None = None,
) -> Iterator[StudyFigure]:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D

    shown = [panel for panel in panels if panel is not None]
    if not shown:
        return
    style = method_styles(study.methods)
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    ran = {row.method for row in study.rows}
    legend = [method for method in methods or study.methods if method.name in ran]
    fonts = {"svg.fonttype": "path", "pdf.fonttype": 42, "font.size": 9, "text.parse_math": False}
    with matplotlib.rc_context({"svg.hashsalt": name, **fonts}):
        per_row = max(1, int(columns * PANEL[0] / (0.5 + 0.085 * max(len(m.label) for m in legend))))
        below = 0.35 + 0.22 * math.ceil(len(legend) / per_row)
        width, height = max(columns, 2) * PANEL[0], rows * PANEL[1] + below
        # The vertical padding separates a panel's title from the axis labels of the panel above.
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.09), facecolor="white")
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, panel in zip(grid, shown, strict=False):
            _plain_axes(axes)
            axes.set_title(_shortened(panel.title), color=INK, fontsize=9, loc="left")
            axes.set_ylabel(panel.y, color=INK, fontsize=8)
            panel.draw(axes)
        for axes in grid[len(shown) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(shown) - columns) : len(shown)]:
            axes.set_xlabel(x, color=INK, fontsize=9)
        handles = [
            Line2D(
                [],
                [],
                color=style[m.name].color,
                marker=style[m.name].marker,
                linestyle=style[m.name].dash,
                markersize=5,
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
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda x, _position: compact_count(x)))


def _shortened(title: str, most: int = 38) -> str:
    return title if len(title) <= most else f"{title[: most - 1]}…"
