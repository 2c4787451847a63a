"""Runs a study in several processes: nothing twice, a failure stops no other run, Ctrl-C pauses it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tiltlm.errors import TiltError, UsageError
from tiltlm.runs import storage
from tiltlm.runs.resuming import check_same_config, has_ended
from tiltlm.study.curve_callback import is_measured
from tiltlm.study.grid import Grid, PlannedRun, run_name, with_fit
from tiltlm.study.progress import StudyProgress
from tiltlm.study.record import StudyDirectory
from tiltlm.study.reference import RECORD, has_reference, reference_key
from tiltlm.study.rows import stored_rows
from tiltlm.training.interrupt import sigterm_interrupts

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerJob:
    """The task of one process; ``run`` is None for a reference."""

    name: str
    settings: dict[str, Any]
    run: PlannedRun | None = None


@dataclass
class ActiveJob:
    """A running process and its job."""

    job: WorkerJob
    process: subprocess.Popen[str]
    log: IO[str]
    began: float


class Execution:
    """One session of a study, for the runs named ``selected``.

    ``record`` is the content of ``study.json``, written after every run.
    """

    def __init__(
        self, grid: Grid, directory: StudyDirectory, record: dict[str, Any], jobs: int, selected: Collection[str]
    ) -> None:
        self.grid, self.directory, self.record, self.jobs, self.selected = grid, directory, record, jobs, selected
        self.entries = {run_name(one["task"], one["method"], one["seed"]): one for one in record["runs"]}
        self.planned = {run.name: run for run in grid.runs}
        self.active: list[ActiveJob] = []
        self.without_reference: set[str] = set()
        self.stored = self._stored_runs()

    def go(self, progress: StudyProgress) -> bool:
        """Draw the references, then do the remaining runs; False if interrupted."""
        self.progress = progress
        with _study_lock(self.directory.path) as lock, sigterm_interrupts():
            self.lock = lock
            self.directory.write_record(self.record)
            try:
                self._work(self._references())
                self._work(self._runs())
            except KeyboardInterrupt:
                self._stop()
                return False
            finally:
                self.directory.write_record(self.record)
        return True

    def _references(self) -> Iterator[WorkerJob]:
        settings = self.grid.study.reference
        for task in self.grid.study.tasks:
            runs = [run for run in self.grid.of_task(task) if run.name in self.selected and run.name not in self.stored]
            folder = self.directory.reference(task)
            if not runs:
                continue
            try:
                if has_reference(folder, reference_key(runs[0].config, settings)):
                    continue
            except UsageError as error:
                self._fail_task(task, str(error))
                continue
            job = {"config": runs[0].config.to_json(), "folder": str(folder), "reference": settings.model_dump()}
            yield WorkerJob(f"reference of {task}", {"kind": "reference", **job})

    def _runs(self) -> Iterator[WorkerJob]:
        fits = {task: _fit_size(self.directory.reference(task)) for task in self.grid.study.tasks}
        for planned in self.grid.runs:
            entry, run, fit = self.entries[planned.name], planned, fits[planned.task]
            if run.name in self.stored:
                self.progress.skip(run)
                continue
            folder, reference = self.directory.run(run.task, run.method, run.seed), self.directory.reference(run.task)
            if fit is None or run.task in self.without_reference:
                continue
            try:
                run = with_fit(planned, self.grid.study.budget(run.task), fit)
                if folder.run_path.exists():
                    # A run without its tuned model, deleted or left on another machine, still counts as done.
                    done = has_ended(folder) and is_measured(folder, reference)
                    check_same_config(folder, run.config.to_json(), run.config.non_defaults(), done=done)
                    if done:
                        self._settle(entry, "done")
                        entry["kept"] = settings_key(planned)
                        self.progress.skip(run)
                        continue
            except TiltError as error:
                self._settle(entry, "failed", str(error))
                self.progress.ended(run, "failed", str(error), 0.0)
                continue
            if run.name not in self.selected:
                continue
            settings = {
                "kind": "run",
                "config": run.config.to_json(),
                "folder": str(folder.path),
                "reference": str(reference),
                "scored": self.grid.study.reference.scored,
                "curve": self.grid.study.curve.model_dump(),
            }
            yield WorkerJob(run.name, settings, run)

    def _stored_runs(self) -> set[str]:
        """The runs found only in ``results.csv``, e.g. because another machine did them. They count as done.

        Raises UsageError if the study lacks one of them or has other settings for it: its rows would be lost.
        """
        found = set()
        for task, method, seed in stored_rows(self.directory):
            name = run_name(task, method, seed)
            if self.directory.run(task, method, seed).run_path.exists():
                continue
            if name not in self.planned or self.entries[name]["kept"] != settings_key(self.planned[name]):
                raise UsageError(
                    f"{self.directory.results_path} has results of {name}, whose run directory is missing. This study "
                    f"does not have that run, or has other settings for it, and would lose them; restore its task, "
                    f"method, seed and settings, or choose another --output-dir"
                )
            # At once, so that an interrupted session writes the rows of finished runs too.
            self._settle(self.entries[name], "done")
            found.add(name)
        return found

    def _work(self, jobs: Iterator[WorkerJob]) -> None:
        """Run ``self.jobs`` processes at a time until all jobs are done."""
        waiting = deque(jobs)
        while waiting or self.active:
            while waiting and len(self.active) < self.jobs:
                self.active.append(self._begin(waiting.popleft()))
            time.sleep(POLL_SECONDS)
            for one in [one for one in self.active if one.process.poll() is not None]:
                self.active.remove(one)
                self._end(one)
            self.progress.show_active([(one.job.name, one.job.run) for one in self.active], self.directory)

    def _begin(self, job: WorkerJob) -> ActiveJob:
        path = self.directory.log(job.name)
        with storage.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            log = path.open("a", encoding="utf-8")
        threads = str(max(1, (os.cpu_count() or 1) // self.jobs))
        # A process group of its own: Ctrl-C reaches only this process, which then asks the others to finish their step.
        process = subprocess.Popen(
            [sys.executable, "-m", "tiltlm.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            start_new_session=True,
            pass_fds=(self.lock,) if self.lock is not None else (),
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(job.settings))
        process.stdin.close()
        return ActiveJob(job, process, log, time.monotonic())

    def _end(self, one: ActiveJob) -> None:
        status, error = _result_of(one.process)
        one.log.close()
        seconds = time.monotonic() - one.began
        if error is not None:
            error = f"{error} (log: {self.directory.log(one.job.name)})"
        if one.job.run is None:
            if status != "done":
                task = one.job.name.removeprefix("reference of ")
                self._fail_task(task, f"its reference could not be drawn: {error or 'interrupted'}")
            return
        entry = self.entries[one.job.run.name]
        entry["seconds"] = (entry.get("seconds") or 0.0) + seconds
        self._settle(entry, status, error)
        entry["kept"] = settings_key(self.planned[one.job.run.name]) if status == "done" else None
        self.progress.ended(one.job.run, status, error, seconds)
        self.directory.write_record(self.record)

    def _fail_task(self, task: str, error: str) -> None:
        self.without_reference.add(task)
        for run in self.grid.of_task(task):
            if run.name in self.stored or run.name not in self.selected:
                continue
            entry = self.entries[run.name]
            self._settle(entry, "failed", error)
            self.progress.ended(run, "failed", None, 0.0)
        self.progress.note(f"{task}: {error}")

    def _settle(self, entry: dict[str, Any], status: str, error: str | None = None) -> None:
        entry["status"], entry["error"] = status, error

    def _stop(self) -> None:
        """Let all processes finish their step and save; after a second Ctrl-C kill them."""
        self.progress.note("stopping: each run finishes its step and saves; Ctrl-C again ends them at once")
        try:
            for one in self.active:
                one.process.send_signal(signal.SIGTERM)
            for one in self.active:
                one.process.wait()
        except KeyboardInterrupt:
            for one in self.active:
                one.process.kill()
                one.process.wait()
        for one in self.active:
            status, _ = _result_of(one.process)
            one.log.close()
            if one.job.run is not None:
                entry = self.entries[one.job.run.name]
                entry["seconds"] = (entry.get("seconds") or 0.0) + time.monotonic() - one.began
                self._settle(entry, "done" if status == "done" else "interrupted")
        self.active = []


def new_record(grid: Grid, title: str, before: dict[str, Any] | None, command: Sequence[str]) -> dict[str, Any]:
    """``study.json`` of a grid; what an earlier session recorded of the same runs is kept."""
    known = {(one["task"], one["method"], one["seed"]): one for one in (before or {}).get("runs", [])}
    fresh = {"status": "waiting", "error": None, "seconds": None, "kept": None}
    runs = []
    for run in grid.runs:
        key = {"task": run.task, "method": run.method, "seed": run.seed}
        earlier = known.get((run.task, run.method, run.seed), {})
        known_of = {name: earlier.get(name) for name in ("seconds", "kept")}
        runs.append({**fresh, **key, **known_of, "sequences": run.sequences})
    return {
        "title": title,
        "command": list(command),
        "study": grid.study.model_dump(mode="json"),
        "tasks": {name: task.label or name for name, task in grid.study.tasks.items()},
        "methods": {
            one.name: {"label": one.label, "family": one.family, "batch_size": one.batch_size} for one in grid.variants
        },
        "runs": runs,
        "skipped": [vars(one) for one in grid.skipped],
    }


def settings_key(run: PlannedRun) -> str:
    """A hash of a finished run's settings, which its rows in ``results.csv`` belong to.

    Only settings that differ from their defaults count, so settings added to tiltlm later do not change it.
    """
    return hashlib.sha256(json.dumps(run.config.non_defaults(), sort_keys=True).encode()).hexdigest()


def _fit_size(reference: Path) -> int | None:
    """The number of samples of a task's fit; None without a reference."""
    record = reference / RECORD
    return int(storage.read_object(record)["target"]["samples"]) if record.exists() else None


def _result_of(process: subprocess.Popen[str]) -> tuple[str, str | None]:
    """The result that a process reported, or how it ended."""
    assert process.stdout is not None
    output = process.stdout.read().strip()
    process.stdout.close()
    try:
        answer = json.loads(output.splitlines()[-1])
        return answer["status"], answer["error"]
    except (IndexError, ValueError, KeyError):
        code = process.returncode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return "failed", f"the process ended without a result, by {how}"


@contextmanager
def _study_lock(folder: Path) -> Iterator[int | None]:
    """Hold the study's lock, which its processes inherit. Raises UsageError if another session holds it."""
    try:
        import fcntl
    except ImportError:  # fcntl does not exist on this system
        yield None
        return
    with storage.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"{folder}: another `tiltlm compare` is running this study; wait for it, or stop it"
            ) from error
        yield file
    finally:
        os.close(file)
