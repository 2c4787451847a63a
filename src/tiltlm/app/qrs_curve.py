"""Divergence against acceptance rate of quasi-rejection sampling, as a table and a figure."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiltlm.errors import UsageError
from tiltlm.runs import storage

if TYPE_CHECKING:
    from tiltlm.estimation import Estimate
    from tiltlm.sampling import CurvePoint

COLUMNS = ("log_beta", "acceptance", "acceptance_se", "kl", "kl_se", "tv", "tv_se")
PICTURES = (".png", ".svg")
WIDTH, HEIGHT, DPI = 7.2, 3.0, 160
INK, GRID, LINE = "#444444", "#dddddd", "#2a6fb0"


def check_path(path: Path) -> None:
    """Raise UsageError for a file that cannot be written."""
    if path.suffix not in (".csv", *PICTURES):
        raise UsageError(f"--qrs-curve: '{path}' must end with .csv, .png or .svg")
    if not path.parent.is_dir():
        raise UsageError(f"--qrs-curve: there is no folder '{path.parent}'; make it first")


def write_curve(path: Path, points: Sequence[CurvePoint], chosen: float) -> list[Path]:
    """Write the table and, for .png and .svg, the figure, with a dot at the ``chosen`` acceptance rate.

    Returns the files that were written. Raises CheckpointError if one cannot be written.
    """
    numbers = path.with_suffix(".csv")
    storage.write_atomically(numbers, _table(points).encode())
    if path.suffix not in PICTURES:
        return [numbers]
    storage.write_atomically(path, _picture(points, chosen, path.suffix.removeprefix(".")))
    return [path, numbers]


def _table(points: Sequence[CurvePoint]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in points:
        estimates = (point.acceptance, point.closeness.kl, point.closeness.tv)
        writer.writerow([repr(x) for x in (point.log_beta, *(x for one in estimates for x in (one.value, one.se)))])
    return stream.getvalue()


def _picture(points: Sequence[CurvePoint], chosen: float, form: str) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with matplotlib.rc_context({"svg.hashsalt": "qrs", "font.size": 10}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        rates = [point.acceptance.value for point in points]
        for axes, title, values in zip(
            figure.subplots(1, 2),
            ("KL(p‖p_β), nats", "TV(p, p_β)"),
            ([point.closeness.kl for point in points], [point.closeness.tv for point in points]),
            strict=True,
        ):
            for edge in ("top", "right", "left"):
                axes.spines[edge].set_visible(False)
            axes.spines["bottom"].set_color(GRID)
            axes.tick_params(which="both", length=0, labelcolor=INK)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _position: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel("acceptance (dot: these texts)", color=INK)
            axes.set_title(title, color=INK, fontsize=10, loc="left")
            errors = [2 * _se(one) for one in values]
            lower = [max(one.value - error, 0.0) for one, error in zip(values, errors, strict=True)]
            upper = [one.value + error for one, error in zip(values, errors, strict=True)]
            few = "o" if len(points) == 1 else None
            axes.fill_between(rates, lower, upper, color=LINE, alpha=0.16, linewidth=0)
            axes.plot(rates, [one.value for one in values], color=LINE, linewidth=1.8, marker=few)
            nearest = min(range(len(rates)), key=lambda i: abs(math.log(rates[i] / chosen)))
            axes.plot([rates[nearest]], [values[nearest].value], "o", color=LINE, markersize=6, clip_on=False)
            axes.set_ylim(bottom=0)
        stream = io.BytesIO()
        figure.savefig(stream, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return stream.getvalue()


def _se(estimate: Estimate) -> float:
    return estimate.se if math.isfinite(estimate.se) else 0.0
