"""`tiltlm report`: report.html of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run's directory")]) -> None:
    """Write report.html of a run; no model is loaded."""
    from tiltlm.reports.report import write_report

    typer.echo(str(write_report(run_dir)))
