"""`tiltlm compare`: a study of tasks × methods × seeds, or existing runs side by side."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltlm.cli.common import quiet, terminal
from tiltlm.errors import UsageError

if TYPE_CHECKING:
    from tiltlm.study.record import Study

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="STUDY.yaml [KEY=VALUE]...|RUN_DIR...",
        help="a study file, with overrides such as seeds=1; or the directories of runs, or of one study",
    ),
]


def compare(
    sources: Sources,
    output_dir: Annotated[
        Path | None, typer.Option(help="where results go; default: runs/NAME of the study; for runs: comparison")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="processes at a time; each has its share of the cores")] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="run only what matches, e.g. 'TASK/*/seed-0'; may be repeated"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print the grid and an estimate of the time")] = False,
) -> None:
    """Compare methods: do the remaining runs of a study, and write tables and figures."""
    first, rest = Path(sources[0]), sources[1:]
    if first.is_dir():
        if dry_run or only:
            raise UsageError(f"--{'dry-run' if dry_run else 'only'}: needs a study file; these are directories")
        for given in rest:
            if not Path(given).is_dir():
                raise UsageError(f"'{given}' is not the directory of a run; only directories may follow a directory")
        _written(*_existing([first, *map(Path, rest)], output_dir))
        return
    if not first.is_file():
        raise UsageError(f"'{first}' does not exist; give a study file, or the directories of runs")
    _study(first, rest, output_dir, jobs, only or [], dry_run)


def _existing(folders: list[Path], output_dir: Path | None) -> tuple[Study, Path]:
    from tiltlm.study.of_runs import study_of_runs
    from tiltlm.study.record import StudyDirectory
    from tiltlm.study.rows import read_study

    if len(folders) == 1 and not (folders[0] / "run.json").exists():
        return read_study(StudyDirectory(folders[0])), output_dir or folders[0]
    return study_of_runs(folders), output_dir or Path("comparison")


def _study(
    file: Path, overrides: list[str], output_dir: Path | None, jobs: int, only: list[str], dry_run: bool
) -> None:
    from tiltlm.config.study import load_study

    config = load_study(file, overrides)
    folder = output_dir or Path(config.output_dir or Path("runs") / file.stem)
    from tiltlm.study.dry_run import show_grid
    from tiltlm.study.execute import Execution, new_record
    from tiltlm.study.grid import expand
    from tiltlm.study.progress import StudyProgress
    from tiltlm.study.record import StudyDirectory
    from tiltlm.study.rows import read_study

    quiet()
    grid, directory, console = expand(config, strict=not dry_run), StudyDirectory(folder), terminal()
    selected = grid.matching(only)
    before = directory.read_record() if directory.record_path.exists() else None
    if dry_run:
        show_grid(terminal(stderr=False), grid, directory, before, jobs, selected)
        return
    command = ["tiltlm", "compare", str(file), *overrides]
    if output_dir is not None:
        command += ["--output-dir", str(output_dir)]
    resume_command = [*command, *(word for pattern in only for word in ("--only", pattern)), "--jobs", str(jobs)]
    record = new_record(grid, config.title or file.stem, before, command)
    with StudyProgress(console, grid.runs, selected) as progress:
        completed = Execution(grid, directory, record, jobs, selected).go(progress)
    _written(read_study(directory), folder)
    failed = sum(one["status"] == "failed" for one in record["runs"])
    if not completed:
        console.print(f"stopped; go on with: {shlex.join(resume_command)}", soft_wrap=True)
        raise typer.Exit(130)
    if failed:
        console.print(
            f"{failed} of {len(record['runs'])} runs failed; the same command tries them again", soft_wrap=True
        )
        raise typer.Exit(1)


def _written(study: Study, folder: Path) -> None:
    from tiltlm.study.report.write import write_study

    for path in write_study(study, folder):
        typer.echo(str(path))
