"""The display of a running job: in a terminal a progress bar and the latest estimates, in a pipe plain lines."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from tiltlm.app.display import Display, plain_console
from tiltlm.estimation import Estimate
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.progress import Progress

NAME = "matches '[a-c][/x]'"


def metrics(moment: float) -> StepMetrics:
    some = Estimate(0.25, 0.01)
    moments = {NAME: Estimate(moment, 0.02)}
    return StepMetrics(some, some, some, some, Estimate(200.0, math.nan), moments, moments)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, markup=False, highlight=False)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_a_terminal_shows_a_bar_with_estimates_and_goals() -> None:
    console = terminal()
    display = Display(console, {NAME: 0.5})
    with display.counting("sampling [the base]") as progress:
        progress(128, 256)
    with display.training(0, 4):
        display.on_log(Progress(2, 4, 512, 1024, 1.0), metrics(0.125))
        display.say("a note with [brackets]")
    text = shown(console)
    for part in ("sampling [the base]", "128/256", "2/4", "ETA", "KL(p‖π)", "0.25 ± 0.01", "a note with [brackets]"):
        assert part in text
    assert re.search(re.escape(NAME) + r" +0\.125 ± 0\.02 \(goal 0\.5\)", text)
    assert display.live is None


def test_a_failure_restores_the_terminal() -> None:
    console = terminal()
    display = Display(console)
    with pytest.raises(RuntimeError, match="the step failed"), display.training(0, 4):
        raise RuntimeError("the step failed")
    assert display.live is None
    # The cursor is shown again.
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_a_pipe_gets_some_lines_and_always_the_last(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(plain_console(), {NAME: None})
    with display.training(0, 50):
        for step in range(1, 51):
            display.on_log(Progress(step, 50, 100 * step, 200 * step, 1.0), metrics(0.125))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/50", "step 50/50"]
    assert lines[1] == f"step 50/50  5,000 sequences  KL(p‖π) 0.25 ± 0.01  {NAME} 0.125 ± 0.02  ETA 0:00"


def test_the_eta_of_a_resumed_run_counts_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(plain_console())
    with display.training(90, 100):
        display.began -= 30.0
        display.on_log(Progress(95, 100, 1, 1, 1.0), metrics(0.1))
    # Five steps took thirty seconds and five are left; the ninety before them are not counted.
    assert "ETA 0:30" in capsys.readouterr().err
