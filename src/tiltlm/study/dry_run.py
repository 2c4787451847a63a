"""A dry run of a study: its grid as a table, and the time it would take, estimated from finished runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from tiltlm.reports.report import duration
from tiltlm.study.grid import Grid, PlannedRun
from tiltlm.study.record import StudyDirectory


def show_grid(
    console: Console,
    grid: Grid,
    directory: StudyDirectory,
    record: Mapping[str, Any] | None,
    jobs: int,
    selected: Collection[str],
) -> None:
    """Print the steps of each cell, omitted cells with the reason, and the estimated time."""
    cells = {(run.task, run.method): run for run in grid.runs}
    table = Table(box=None, pad_edge=False)
    table.add_column("steps of a run", no_wrap=True)
    for variant in grid.variants:
        table.add_column(variant.name, justify="right")
    for task in grid.study.tasks:
        shown = [cells.get((task, variant.name)) for variant in grid.variants]
        table.add_row(task, *(f"{run.config.training.max_steps:,}" if run is not None else "–" for run in shown))
    console.print(table)
    reasons: dict[tuple[str, str], list[str]] = {}
    for one in grid.skipped:
        reasons.setdefault((one.method, one.reason), []).append(one.task)
    for (method, reason), tasks in reasons.items():
        console.print(f"– {method} on {', '.join(tasks)}: {reason}", soft_wrap=True)
    for task, problem in grid.unchecked.items():
        console.print(f"not checked here: {task}: {problem}", soft_wrap=True)
    seeds = grid.study.seed_list
    drawn = sum(run.sequences for run in grid.runs)
    console.print(
        f"{len(grid.runs)} runs ({len(cells)} cells, seeds {', '.join(map(str, seeds))}), {drawn:,} sequences, "
        f"into {directory.path}",
        soft_wrap=True,
    )
    console.print(time_in_words(grid, record, jobs, selected), soft_wrap=True)


def time_in_words(grid: Grid, record: Mapping[str, Any] | None, jobs: int, selected: Collection[str]) -> str:
    """The estimated time of the remaining runs, from finished runs of this study on this machine."""
    done = {
        (one["task"], one["method"], one["seed"]): one.get("seconds")
        for one in (record or {}).get("runs", [])
        if one["status"] == "done"
    }
    timed = {key: float(seconds) for key, seconds in done.items() if seconds}
    remaining = [run for run in grid.runs if run.name in selected and (run.task, run.method, run.seed) not in done]
    every = len(selected) == len(grid.runs)
    if not remaining:
        return f"all {len(grid.runs)} runs are done" if every else "all runs that match are done"
    if not timed:
        known = f"{len(done)} runs are done; " if done else ""
        return (
            f"{known}time: unknown, as no run of this study was done here; after the first runs this command estimates "
            f"the time of the others"
        )
    total = sum(_seconds(run, timed, grid) for run in remaining) / jobs
    others = f"the other {len(remaining)}" if every else f"the other {len(remaining)} that match"
    return f"{len(done)} runs are done; {others} take about {duration(total)} with --jobs {jobs}, at the same speed"


def _seconds(run: PlannedRun, done: Mapping[tuple[str, str, int], float], grid: Grid) -> float:
    """Estimated from runs of the same cell, else the same method, else all, in proportion to the sequences drawn."""
    drawn = {(one.task, one.method, one.seed): one.sequences for one in grid.runs}
    known = [key for key in done if key in drawn]
    for same in (
        [key for key in known if key[:2] == (run.task, run.method)],
        [key for key in known if key[1] == run.method],
        known,
    ):
        if same:
            return run.sequences * sum(done[key] for key in same) / sum(drawn[key] for key in same)
    return sum(done.values()) / len(done)
