"""Arguments and helpers that several commands use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltlm.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from tiltlm.runs.directory import RunDirectory

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="a run file; `tiltlm init` writes one")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. training.max_steps=100")]
Source = Annotated[str, typer.Argument(metavar="RUN_DIR|MODEL", help="a run, or embedded, a model folder, a hub name")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else to standard output")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps")]


def terminal(*, stderr: bool = True) -> Console:
    """The console for progress (standard error) or for results (standard output)."""
    from tiltlm.app.display import plain_console

    return plain_console(stderr=stderr)


def quiet() -> None:
    """Keep other libraries' progress bars and notes out of the user's terminal."""
    from tiltlm.app.display import quiet_libraries

    quiet_libraries()


def run_of(source: str) -> RunDirectory | None:
    """The run directory that ``source`` names, or None if it names a model. Raises UsageError."""
    from tiltlm.runs.directory import RunDirectory

    folder = Path(source)
    if folder.is_file():
        raise UsageError(f"'{source}' is a file; give the directory of a run or a model, or a name on the hub")
    if not folder.is_dir() or (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return None
    if not (folder / "run.json").exists():
        raise UsageError(f"'{source}' is neither a run (it has no run.json) nor a model (it has no config.json)")
    return RunDirectory.open(folder)
