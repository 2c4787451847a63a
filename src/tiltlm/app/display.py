"""The display of a running job: live in a terminal, plain lines in a file or pipe."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tiltlm.training.callbacks import Callback
from tiltlm.training.progress import Progress as RunProgress

if TYPE_CHECKING:
    from tiltlm.estimation import Estimate
    from tiltlm.evaluation.scores import Mismatch
    from tiltlm.training.metrics import StepMetrics

PLAIN_LINE_EVERY = 5.0
# Wide enough for each row of a table in a file or pipe.
PIPED_WIDTH = 200


def plain_console(*, stderr: bool = True) -> Console:
    """A console that prints markup as it is: names of features and files may look like markup of rich."""
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


class Display(Callback):
    """Shows phases with a progress bar and ETA, and the latest estimates with their goals."""

    def __init__(self, console: Console, goals: dict[str, float | None] | None = None) -> None:
        self.console, self.goals = console, goals or {}
        self.live: Live | None = None
        self.bar: Progress | None = None
        self.began, self.first_step, self.last_line = 0.0, 0, 0.0
        self.warned = False

    def say(self, text: str) -> None:
        """Print one line, above the live display if there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def note_mismatch(self, mismatch: Mismatch | None) -> None:
        """Print a note, once, if sampler and scoring pass differ by more than rounding."""
        if mismatch is not None and mismatch.is_large and not self.warned:
            self.warned = True
            self.say(
                f"note: log-probabilities of sampling and scoring differ by {mismatch}. This adds noise to "
                f"weights, log Z and KL. Use dtype: float32 to avoid it (docs/speed.md)"
            )

    @contextmanager
    def counting(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """A progress bar; call the yielded function with (done, total)."""
        if not self.console.is_terminal:
            self.say(f"{title} …")
            yield lambda done, total: None
            return
        with _bar(self.console, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    @contextmanager
    def training(self, step: int, max_steps: int) -> Iterator[None]:
        """The display of the training loop, from ``step`` on."""
        self.began, self.first_step = time.monotonic(), step
        if not self.console.is_terminal:
            yield
            return
        self.bar = _bar(self.console)
        self.bar.add_task("tuning", total=max_steps, completed=step)
        try:
            with Live(self.bar, console=self.console, refresh_per_second=4) as self.live:
                yield
        finally:
            self.live = None

    def on_log(self, progress: RunProgress, metrics: StepMetrics) -> None:
        self.note_mismatch(metrics.mismatch)
        if self.live is not None and self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=progress.step)
            table = Table.grid()
            table.add_row(self.bar)
            table.add_row(self._table(metrics))
            self.live.update(table)
        elif time.monotonic() - self.last_line > PLAIN_LINE_EVERY or progress.step == progress.max_steps:
            self.last_line = time.monotonic()
            moments = "  ".join(f"{name} {self._with_goal(name, m)}" for name, m in metrics.moments.items())
            self.say(
                f"step {progress.step}/{progress.max_steps}  {progress.sequences:,} sequences  "
                f"KL(p‖π) {_short(metrics.kl_p_pi)}  {moments}  ETA {self._eta(progress)}"
            )

    def _eta(self, progress: RunProgress) -> str:
        done = progress.step - self.first_step
        left = (time.monotonic() - self.began) / max(done, 1) * (progress.max_steps - progress.step)
        return f"{int(left) // 60}:{int(left) % 60:02d}"

    def _with_goal(self, name: str, value: Estimate) -> str:
        goal = self.goals.get(name)
        return _short(value) + (f" (goal {goal:g})" if goal is not None else "")

    def _table(self, metrics: StepMetrics) -> Table:
        table = Table(box=None, pad_edge=False, show_header=False)
        for title, value in (
            ("KL(p‖π)", metrics.kl_p_pi),
            ("KL(π‖a)", metrics.kl_pi_a),
            ("TV(p, π)", metrics.tv_p_pi),
            ("ESS", metrics.ess),
        ):
            table.add_row(Text(title, style="dim"), _short(value))
        for name, value in metrics.moments.items():
            table.add_row(name, self._with_goal(name, value))
        return table


def _short(value: Estimate) -> str:
    return f"{value.value:.3g} ± {value.se:.1g}"


def _bar(console: Console, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )


def quiet_libraries() -> None:
    """Keep other libraries' progress bars and notes out of the user's terminal."""
    if os.environ.get("TILTLM_TRACEBACK"):
        return
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
