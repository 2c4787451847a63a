"""A study on disk and in memory: tasks, methods, runs and their rows; loads no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tiltlm.errors import CheckpointError, UsageError
from tiltlm.runs import storage
from tiltlm.runs.directory import RunDirectory, git_commit, installed_versions

SCHEMA_VERSION = 1
STATUSES = ("waiting", "done", "failed", "interrupted")


@dataclass(frozen=True)
class Row:
    """One line of ``results.csv``: an estimate at a number of sequences drawn and of forward passes."""

    task: str
    method: str
    seed: int
    sequences: int
    forward_passes: int
    metric: str
    value: float
    se: float


@dataclass(frozen=True)
class StudyTask:
    """A task as tables show it: its features with their goals (None: a reward), and the record of its reference."""

    name: str
    label: str
    goals: Mapping[str, float | None] = field(default_factory=dict)
    reference: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class StudyMethod:
    """A method as tables show it; ``family`` is common to its variants of several batch sizes."""

    name: str
    label: str
    family: str
    batch_size: int | None = None


@dataclass(frozen=True)
class Entry:
    """One run of a study and its status."""

    task: str
    method: str
    seed: int
    status: str
    error: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Study:
    """The data of all tables, figures and the page."""

    title: str
    tasks: Sequence[StudyTask]
    methods: Sequence[StudyMethod]
    entries: Sequence[Entry]
    rows: Sequence[Row]
    skipped: Sequence[Mapping[str, str]] = ()
    made: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def series(self) -> dict[tuple[str, str, str], list[Row]]:
        """The finite values by task, method and metric, in order."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            if math.isfinite(row.value):
                found.setdefault((row.task, row.method, row.metric), []).append(row)
        return found

    @cached_property
    def ends(self) -> dict[tuple[str, str, str], dict[int, Row]]:
        """The last row of each seed by task, method and metric, also if its value is not finite."""
        found: dict[tuple[str, str, str], dict[int, Row]] = {}
        for row in self.rows:
            found.setdefault((row.task, row.method, row.metric), {})[row.seed] = row
        return found

    @property
    def frozen(self) -> bool:
        """Whether KL(p‖π) of all runs was measured on one reference per task."""
        return bool(self.tasks) and all(task.reference is not None for task in self.tasks)


@dataclass(frozen=True)
class StudyDirectory:
    """The folder of a study: study.json, runs/, references/, logs/ and the results."""

    path: Path

    @property
    def record_path(self) -> Path:
        """``study.json``: the study file and the status of each run."""
        return self.path / "study.json"

    @property
    def results_path(self) -> Path:
        """``results.csv``: every estimate of every run."""
        return self.path / "results.csv"

    def run(self, task: str, method: str, seed: int) -> RunDirectory:
        """The directory of one run."""
        return RunDirectory(self.path / "runs" / task / method / f"seed-{seed}")

    def reference(self, task: str) -> Path:
        """The folder of a task's frozen reference."""
        return self.path / "references" / task

    def log(self, name: str) -> Path:
        """The log of a process."""
        return self.path / "logs" / f"{name.replace('/', ' ')}.log"

    def read_record(self) -> dict[str, Any]:
        """``study.json``. Raises UsageError if it is missing, CheckpointError if it is broken or newer."""
        if not self.record_path.is_file():
            raise UsageError(f"'{self.path}' is no study (it has no study.json) and no run (it has no run.json)")
        record = storage.read_object(self.record_path)
        if record.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(
                f"'{self.record_path}' has schema_version {record.get('schema_version')}, but this tiltlm reads "
                f"{SCHEMA_VERSION}. Upgrade tiltlm to read this study."
            )
        return record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replace ``study.json``, with versions, commit and time of writing."""
        self.path.mkdir(parents=True, exist_ok=True)
        made = {
            "schema_version": SCHEMA_VERSION,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": installed_versions(),
            "git_commit": git_commit(),
        }
        storage.write_object(self.record_path, {**made, **record})
