"""The progress of a study: one line with an ETA in a terminal, a line per run if output is piped."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tiltlm.reports.report import duration
from tiltlm.study.grid import PlannedRun
from tiltlm.study.record import StudyDirectory

# The share of a run's time spent training; the rest is its evaluation.
TRAINING_SHARE = 0.8
LOOK_EVERY = 2.0


class StudyProgress:
    """Counts work in sequences to draw; earlier sessions do not count for its speed."""

    def __init__(self, console: Console, runs: Sequence[PlannedRun], wanted: Collection[str]) -> None:
        self.console, self.total = console, len(runs)
        self.left = {run.name: float(run.sequences) for run in runs if run.name in wanted}
        self.count = {"done": 0, "failed": 0}
        self.worked, self.began, self.looked = 0.0, time.monotonic(), 0.0
        self.live: Live | None = None

    def __enter__(self) -> StudyProgress:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print one line, above the live one if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def already(self, run: PlannedRun) -> None:
        """Note a run that an earlier session did."""
        self.left.pop(run.name, None)
        self.count["done"] += 1

    def ended(self, run: PlannedRun, status: str, error: str | None, seconds: float) -> None:
        """Note the end of a run, or its interruption."""
        if status in self.count:
            self.worked += self.left.pop(run.name, 0.0) if seconds else 0.0
            self.left.pop(run.name, None)
            self.count[status] += 1
        if error is not None:
            self.say(f"{run.name} failed: {error}")
        elif status == "done":
            self.say(f"{run.name} done in {duration(seconds)}; {self._counts()}; {self.eta(0.0)}")

    def at_work(self, active: Sequence[tuple[str, PlannedRun | None]], directory: StudyDirectory) -> None:
        """The live line."""
        if self.live is None or time.monotonic() - self.looked < LOOK_EVERY:
            return
        self.looked = time.monotonic()
        shown, under_way = [], 0.0
        for name, run in active:
            share = _share(run, directory) if run is not None else 0.0
            under_way += share * (run.sequences if run is not None else 0)
            shown.append(f"{name} {100 * share:.0f}%" if run is not None else name)
        self.live.update(Text(f"{self._counts()}; {self.eta(under_way)}; {', '.join(shown)}", overflow="ellipsis"))

    def eta(self, under_way: float) -> str:
        """The remaining time at the speed of this session."""
        worked, left = self.worked + under_way, sum(self.left.values()) - under_way
        if worked <= 0 or left <= 0:
            return "ETA unknown" if left > 0 else "nothing left"
        return f"ETA {duration((time.monotonic() - self.began) * left / worked)}"

    def _counts(self) -> str:
        failed = f", {self.count['failed']} failed" if self.count["failed"] else ""
        return f"{self.count['done']} of {self.total} runs done{failed}"


def _share(run: PlannedRun, directory: StudyDirectory) -> float:
    """The finished share of a run, from its lines of metrics."""
    path = directory.run(run.task, run.method, run.seed).metrics_path
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    return TRAINING_SHARE * min(1.0, lines / max(1, run.config.training.max_steps))
