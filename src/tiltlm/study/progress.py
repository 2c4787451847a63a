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
REFRESH_SECONDS = 2.0


class StudyProgress:
    """Counts work in sequences to draw. The speed is that of this session alone."""

    def __init__(self, console: Console, runs: Sequence[PlannedRun], selected: Collection[str]) -> None:
        self.console, self.total = console, len(runs)
        self.remaining = {run.name: float(run.sequences) for run in runs if run.name in selected}
        self.count = {"done": 0, "failed": 0}
        self.worked, self.began, self.refreshed = 0.0, time.monotonic(), 0.0
        self.live: Live | None = None

    def __enter__(self) -> StudyProgress:
        if self.console.is_terminal:
            self.live = Live(console=self.console, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self.live is not None:
            self.live.stop()

    def note(self, text: str) -> None:
        """Print one line, above the live one if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def skip(self, run: PlannedRun) -> None:
        """Count a run that an earlier session finished."""
        self.remaining.pop(run.name, None)
        self.count["done"] += 1

    def ended(self, run: PlannedRun, status: str, error: str | None, seconds: float) -> None:
        """Count a run that has ended or was interrupted, and print it."""
        if status in self.count:
            self.worked += self.remaining.pop(run.name, 0.0) if seconds else 0.0
            self.remaining.pop(run.name, None)
            self.count[status] += 1
        if error is not None:
            self.note(f"{run.name} failed: {error}")
        elif status == "done":
            self.note(f"{run.name} done in {duration(seconds)}; {self._counts()}; {self.eta(0.0)}")

    def show_active(self, active: Sequence[tuple[str, PlannedRun | None]], directory: StudyDirectory) -> None:
        """Update the live line."""
        if self.live is None or time.monotonic() - self.refreshed < REFRESH_SECONDS:
            return
        self.refreshed = time.monotonic()
        shown, active_sequences = [], 0.0
        for name, run in active:
            share = _share(run, directory) if run is not None else 0.0
            active_sequences += share * (run.sequences if run is not None else 0)
            shown.append(f"{name} {100 * share:.0f}%" if run is not None else name)
        self.live.update(
            Text(f"{self._counts()}; {self.eta(active_sequences)}; {', '.join(shown)}", overflow="ellipsis")
        )

    def eta(self, active_sequences: float) -> str:
        """The remaining time at the speed of this session."""
        worked, remaining = self.worked + active_sequences, sum(self.remaining.values()) - active_sequences
        if worked <= 0 or remaining <= 0:
            return "ETA unknown" if remaining > 0 else "nothing remaining"
        return f"ETA {duration((time.monotonic() - self.began) * remaining / worked)}"

    def _counts(self) -> str:
        failed = f", {self.count['failed']} failed" if self.count["failed"] else ""
        return f"{self.count['done']} of {self.total} runs done{failed}"


def _share(run: PlannedRun, directory: StudyDirectory) -> float:
    """The finished share of a run, from the number of its metrics records."""
    path = directory.run(run.task, run.method, run.seed).metrics_path
    lines = path.read_bytes().count(b"\n") if path.exists() else 0
    return TRAINING_SHARE * min(1.0, lines / max(1, run.config.training.max_steps))
