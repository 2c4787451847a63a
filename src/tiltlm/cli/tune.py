"""`tiltlm tune`: tune a model toward the target of a config."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tiltlm.cli.common import ConfigFile, Overrides, quiet, terminal


def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    output_dir: Annotated[Path | None, typer.Option(help="the run directory; default: runs/NAME of the config")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in the output directory")] = False,
) -> None:
    """Tune a model toward the target of a config."""
    from tiltlm.config.run import load_config

    parsed = load_config(config, overrides or [])
    folder = output_dir or Path(parsed.output_dir or Path("runs") / config.stem)
    console = terminal()
    from tiltlm.app.tune import finished, tune_config
    from tiltlm.reports.tables import run_table

    quiet()
    directory = finished(parsed, folder) if resume else None
    if directory is not None:
        console.print(f"{folder} is done; `tiltlm eval` measures it on fresh samples", soft_wrap=True)
    else:
        try:
            run = tune_config(parsed, folder, resume=resume, console=console)
            directory = run.directory if run.status == "done" else None
        except KeyboardInterrupt:
            pass
    if directory is None:
        again = ["tiltlm", "tune", str(config), *(overrides or []), "--output-dir", str(folder), "--resume"]
        if (folder / "run.json").exists():
            console.print(f"stopped; go on with: {shlex.join(again)}", soft_wrap=True)
        raise typer.Exit(130)
    console.print(run_table(directory.read_run()))
    typer.echo(f"model   {directory.policy_dir}")
    typer.echo(f"report  {directory.report_path}")
