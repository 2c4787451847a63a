"""The measurements of a study's runs as tidy rows, from base to end, each estimate with its error."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from tiltlm.errors import CheckpointError
from tiltlm.reports.summary import Measured
from tiltlm.runs import storage
from tiltlm.runs.directory import RunDirectory
from tiltlm.study.record import Entry, Row, Study, StudyDirectory, StudyMethod, StudyTask

# Metrics of an evaluation under full sampling and, under the key ``top_p``, under top-p sampling.
FIGURES = ("kl_pi_a", "distinct_1", "distinct_1_corpus", "self_bleu_5", "entropy", "perplexity_base")
# Metrics that depend on the number of texts, so that different numbers cannot be compared.
BY_CORPUS = ("distinct_1_corpus", "self_bleu_5")
NOISE_METRICS = ("gradient_variance", "advantage_variance", "advantage_mean_abs")
# The most points from a run's own batches, if it has no curve.
MOST_POINTS = 24


def read_study(directory: StudyDirectory) -> Study:
    """A study with the rows of all its runs that are done. Raises UsageError, CheckpointError.

    A run whose directory is missing keeps its rows of ``results.csv``.
    """
    record = directory.read_record()
    entries = [Entry(**{f.name: one.get(f.name) for f in fields(Entry)}) for one in record["runs"]]
    done = [(e, directory.run(e.task, e.method, e.seed)) for e in entries if e.status == "done"]
    stored = stored_rows(directory)
    rows = [
        row
        for entry, run in done
        for row in (run_rows(entry, run) if run.run_path.exists() else stored.get(key_of(entry), []))
    ]
    goals = {entry.task: goals_of(run.read_run()) for entry, run in reversed(done) if run.run_path.exists()}
    tasks = []
    for name, label in record["tasks"].items():
        path = directory.reference(name) / "reference.json"
        reference = storage.read_object(path) if path.exists() else None
        tasks.append(StudyTask(name, label, goals.get(name) or goals_of(reference or {}), reference))
    methods = [StudyMethod(name, **shown) for name, shown in record["methods"].items()]
    made = {key: record.get(key) for key in ("updated", "versions", "git_commit", "command", "study")}
    return Study(record["title"], tasks, methods, entries, rows, record["skipped"], made)


def key_of(one: Entry | Row) -> tuple[str, str, int]:
    """The identity of a run in a study."""
    return one.task, one.method, one.seed


def stored_rows(directory: StudyDirectory) -> dict[tuple[str, str, int], list[Row]]:
    """The rows of each run in ``results.csv``. Raises CheckpointError for another file."""
    path = directory.results_path
    if not path.is_file():
        return {}
    kinds = {one.name: {"int": int, "float": float}.get(str(one.type), str) for one in fields(Row)}
    found: dict[tuple[str, str, int], list[Row]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file, strict=True):
                row = Row(**{name: kind(line[name] or "nan") for name, kind in kinds.items()})
                found.setdefault(key_of(row), []).append(row)
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); restore it, or delete it to repeat its runs") from error
    return found


def goals_of(record: Mapping[str, Any]) -> dict[str, float | None]:
    """The wanted mean of each feature in a ``run.json`` or ``reference.json`` record; a reward has none."""
    found = (record.get("target") or {}).get("features") or []
    return {one["name"]: 1.0 if one["kind"] == "filter" else one["goal"] for one in found}


def run_rows(entry: Entry, run: RunDirectory) -> list[Row]:
    """Every estimate of a finished run: of the base, during training, at the end."""
    record = run.read_run()
    goals, progress = goals_of(record), record["progress"]

    def row(at: Mapping[str, Any], metric: str, estimate: Measured) -> Row:
        count = int(at["sequences"]), int(at["forward_passes"])
        return Row(entry.task, entry.method, entry.seed, *count, metric, estimate.value, estimate.se)

    kl = _reference_kl(run)
    start = dict(_evaluated(record["evaluation"]["base"], goals))
    start |= {"kl_pi_a": Measured(0.0, 0.0), "kl_p_pi": kl[0] if kl else Measured.read(record["target"]["kl_p_a"])}
    fitted = record["target"]["samples"]
    # After the fit the policy still is the base.
    rows = [
        row({"sequences": count, "forward_passes": count}, metric, found)
        for count in (0, fitted)
        for metric, found in start.items()
    ]
    lines = [line for line in run.read_metrics() if line["step"] <= progress["step"]]
    curve = read_curve(run)
    evaluated = record["evaluation"]["policy"].get("samples")
    for line in curve:
        alike = line.get("samples") == evaluated
        rows += [
            row(line, metric, found) for metric, found in _curve_point(line, goals) if alike or metric not in BY_CORPUS
        ]
    for group in _groups(lines):
        # The evaluation replaces the estimates of the last batches.
        noise_only = bool(curve) or group[-1] is lines[-1]
        for metric, found in _batches(group, goals, noise_only=noise_only):
            rows.append(row(group[-1], metric, found))
    end = dict(_evaluated(record["evaluation"]["policy"], goals))
    if kl:
        end["kl_p_pi"] = kl[1]
    return rows + [row(progress, metric, found) for metric, found in end.items()]


def read_curve(run: RunDirectory) -> list[dict[str, Any]]:
    """The measurements during a run; empty if there are none."""
    return storage.read_lines(curve_path(run))


def curve_path(run: RunDirectory) -> Path:
    """``curve.jsonl``: a line a measurement."""
    return run.path / "curve.jsonl"


def reference_kl_path(run: RunDirectory) -> Path:
    """``reference_kl.json``: KL(p‖a) and KL(p‖π) on the frozen reference of the task."""
    return run.path / "reference_kl.json"


def write_results(path: Path, rows: Sequence[Row]) -> None:
    """``results.csv``; unknown values are empty cells. Raises CheckpointError."""
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
        yield f"moment_error{suffix}", Measured(sum(distance for distance, _ in off) / len(off), error)


def _curve_point(line: Mapping[str, Any], goals: Mapping[str, float | None]) -> Iterator[tuple[str, Measured]]:
    yield from _moments(line["moments"], goals)
    for name, value in line["figures"].items():
        yield name, Measured.read(value)


def _batches(
    lines: Sequence[Mapping[str, Any]], goals: Mapping[str, float | None], *, noise_only: bool
) -> Iterator[tuple[str, Measured]]:
    """Means over the batches of some steps."""
    for name in NOISE_METRICS:
        found = _mean([Measured.read((line.get("spread") or {}).get(name)) for line in lines])
        if found.known:
            yield name, found
    if noise_only:
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
