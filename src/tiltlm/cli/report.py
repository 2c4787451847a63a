"""`tiltlm report`: write report.html of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the directory of a run")]) -> None:
    """Write report.html of a run again; loads no model."""
    from tiltlm.reports.report import write_report

    typer.echo(str(write_report(run_dir)))
