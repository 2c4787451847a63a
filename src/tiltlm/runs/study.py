"""A study on disk: the record of its runs, and what each of them measured as tidy rows; loads no model."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from tiltlm.errors import CheckpointError, UsageError
from tiltlm.runs import storage
from tiltlm.runs.directory import RunDirectory, git_commit, installed_versions
from tiltlm.runs.summary import Measured

SCHEMA_VERSION = 1
STATUSES = ("waiting", "done", "failed", "interrupted")

# What an evaluation holds of a model's writing, by full sampling and, under the key ``top_p``, by top-p.
FIGURES = ("kl_pi_a", "distinct_1", "distinct_1_corpus", "self_bleu_5", "entropy", "perplexity_base")
SPREADS = ("gradient_variance", "advantage_variance", "advantage_mean_abs")
# Points of a run's own batches, where there is no curve: more could not be told apart in a figure.
MOST_POINTS = 24


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
class Task:
    """A task as tables show it: its features with their goals (None: a reward), and the record of its reference."""

    name: str
    label: str
    goals: Mapping[str, float | None] = field(default_factory=dict)
    reference: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Method:
    """A method as tables show it; ``family`` is common to its variants of several batch sizes."""

    name: str
    label: str
    family: str
    batch_size: int | None = None


@dataclass(frozen=True)
class Entry:
    """One run of a study and how it stands."""

    task: str
    method: str
    seed: int
    status: str
    error: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Study:
    """All that tables, figures and page are made of."""

    title: str
    tasks: Sequence[Task]
    methods: Sequence[Method]
    entries: Sequence[Entry]
    rows: Sequence[Row]
    skipped: Sequence[Mapping[str, str]] = ()
    made: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def series(self) -> dict[tuple[str, str, str], list[Row]]:
        """The known values by task, method and metric, in order."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.rows:
            if math.isfinite(row.value):
                found.setdefault((row.task, row.method, row.metric), []).append(row)
        return found

    @cached_property
    def ends(self) -> dict[tuple[str, str, str], dict[int, Row]]:
        """The last row of each seed by task, method and metric, known or not: what came before is no substitute."""
        found: dict[tuple[str, str, str], dict[int, Row]] = {}
        for row in self.rows:
            found.setdefault((row.task, row.method, row.metric), {})[row.seed] = row
        return found

    @property
    def frozen(self) -> bool:
        """Whether KL(p‖π) of all runs was taken on one reference for each task."""
        return bool(self.tasks) and all(task.reference is not None for task in self.tasks)


@dataclass(frozen=True)
class StudyDirectory:
    """The folder of a study: study.json, runs/, references/, logs/ and the results."""

    path: Path

    @property
    def record_path(self) -> Path:
        """``study.json``: the file of the study, and how each run stands."""
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
        """What a process said while it worked."""
        return self.path / "logs" / f"{name.replace('/', ' ')}.log"

    def read_record(self) -> dict[str, Any]:
        """``study.json``. Raises UsageError where there is none, CheckpointError where it is broken or newer."""
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


def read_study(directory: StudyDirectory) -> Study:
    """A study with the rows of all its runs that are done. Raises UsageError, CheckpointError."""
    record = directory.read_record()
    entries = [Entry(**{f.name: one.get(f.name) for f in fields(Entry)}) for one in record["runs"]]
    done = [(e, directory.run(e.task, e.method, e.seed)) for e in entries if e.status == "done"]
    rows = [row for entry, run in done for row in run_rows(entry, run)]
    goals: dict[str, Mapping[str, float | None]] = {}
    for entry, run in done:
        goals.setdefault(entry.task, goals_of(run.read_run()))
    tasks = []
    for name, label in record["tasks"].items():
        path = directory.reference(name) / "reference.json"
        tasks.append(Task(name, label, goals.get(name, {}), storage.read_object(path) if path.exists() else None))
    methods = [Method(name, **shown) for name, shown in record["methods"].items()]
    made = {key: record.get(key) for key in ("updated", "versions", "git_commit", "command", "study")}
    return Study(record["title"], tasks, methods, entries, rows, record["skipped"], made)


def goals_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The wanted mean of each feature in a ``run.json`` record; a reward has none."""
    found = (record.get("target") or {}).get("features") or []
    return {one["name"]: 1.0 if one["kind"] == "filter" else one["goal"] for one in found}


def run_rows(entry: Entry, run: RunDirectory) -> list[Row]:
    """Every estimate of a finished run: its base, its way, and its end."""
    record = run.read_run()
    goals, progress = goals_of(record), record["progress"]

    def row(at: Mapping[str, Any], metric: str, estimate: Measured) -> Row:
        count = int(at["sequences"]), int(at["forward_passes"])
        return Row(entry.task, entry.method, entry.seed, *count, metric, estimate.value, estimate.se)

    kl = _reference_kl(run)
    start = dict(_evaluated(record["evaluation"]["base"], goals))
    start |= {"kl_pi_a": Measured(0.0, 0.0), "kl_p_pi": kl[0] if kl else Measured.read(record["target"]["kl_p_a"])}
    fitted = record["target"]["samples"]
    # Once the fit's samples are drawn the policy still is the base.
    rows = [
        row({"sequences": count, "forward_passes": count}, metric, found)
        for count in (0, fitted)
        for metric, found in start.items()
    ]
    lines = [line for line in run.read_metrics() if line["step"] <= progress["step"]]
    curve = read_curve(run)
    for line in curve:
        rows += [row(line, metric, found) for metric, found in _curve_point(line, goals)]
    for group in _groups(lines):
        for metric, found in _batches(group, goals, spreads_only=bool(curve)):
            rows.append(row(group[-1], metric, found))
    end = dict(_evaluated(record["evaluation"]["policy"], goals))
    if kl:
        end["kl_p_pi"] = kl[1]
    return rows + [row(progress, metric, found) for metric, found in end.items()]


def read_curve(run: RunDirectory) -> list[dict[str, Any]]:
    """The measurements taken while a run went on; empty where none were asked for."""
    return storage.read_lines(curve_path(run))


def curve_path(run: RunDirectory) -> Path:
    """``curve.jsonl``: a line a measurement."""
    return run.path / "curve.jsonl"


def reference_kl_path(run: RunDirectory) -> Path:
    """``reference_kl.json``: KL(p‖a) and KL(p‖π) on the frozen reference of the task."""
    return run.path / "reference_kl.json"


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """``results.csv``; what is unknown is an empty cell. Raises CheckpointError."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [one.name for one in fields(Row)]
    writer.writerow(names)
    for row in rows:
        writer.writerow(_cell(getattr(row, name)) for name in names)
    storage.write_atomically(path, stream.getvalue().encode("utf-8", errors="replace"))


def _cell(value: str | int | float) -> str | int:
    if not isinstance(value, float):
        return value
    return f"{value:.8g}" if math.isfinite(value) else ""


def _reference_kl(run: RunDirectory) -> tuple[Measured, Measured] | None:
    path = reference_kl_path(run)
    if not path.exists():
        return None
    record = storage.read_object(path)
    return Measured.read(record["kl_p_a"]), Measured.read(record["kl_p_pi"])


def _evaluated(evaluation: Mapping[str, Any], goals: Mapping[str, float | None]) -> Iterator[tuple[str, Measured]]:
    yield from _moments(evaluation["moments"], goals)
    yield from _moments(evaluation.get("moments_top_p") or {}, goals, "_top_p")
    yield "kl_p_pi", Measured.read(evaluation["kl_p_pi"])
    for name in FIGURES:
        yield name, Measured.read(evaluation.get(name))
    for name, value in (evaluation.get("top_p") or {}).items():
        yield f"{name}_top_p", Measured.read(value)


def _moments(
    moments: Mapping[str, Any], goals: Mapping[str, float | None], suffix: str = ""
) -> Iterator[tuple[str, Measured]]:
    """Each mean, and the mean distance of those with a goal from it, in the features' own units."""
    found = {name: Measured.read(value) for name, value in moments.items()}
    for name, value in found.items():
        yield f"moment{suffix}:{name}", value
    off = [
        (abs(value.value - goal), value.se) for name, value in found.items() if (goal := goals.get(name)) is not None
    ]
    if off:
        error = math.sqrt(sum(se**2 for _, se in off)) / len(off)
        yield f"moment_error{suffix}", Measured(sum(apart for apart, _ in off) / len(off), error)


def _curve_point(line: Mapping[str, Any], goals: Mapping[str, float | None]) -> Iterator[tuple[str, Measured]]:
    yield from _moments(line["moments"], goals)
    for name, value in line["figures"].items():
        yield name, Measured.read(value)


def _batches(
    lines: Sequence[Mapping[str, Any]], goals: Mapping[str, float | None], *, spreads_only: bool
) -> Iterator[tuple[str, Measured]]:
    """Means over the batches of some steps."""
    for name in SPREADS:
        found = _mean([Measured.read((line.get("spread") or {}).get(name)) for line in lines])
        if found.known:
            yield name, found
    if spreads_only:
        return
    for name in ("kl_p_pi", "kl_pi_a"):
        yield name, _mean([Measured.read(line[name]) for line in lines])
    yield from _moments({n: _mean([Measured.read(line["moments"][n]) for line in lines]) for n in goals}, goals)


def _groups(lines: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    size = math.ceil(len(lines) / MOST_POINTS) or 1
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def _mean(values: Sequence[Measured]) -> Measured:
    """The mean of independent estimates."""
    known = [one for one in values if one.known]
    if not known:
        return Measured()
    errors = [one.se if math.isfinite(one.se) else 0.0 for one in known]
    return Measured(sum(one.value for one in known) / len(known), math.sqrt(sum(e * e for e in errors)) / len(known))
