"""Existing runs as a study: which of them share a task, and how their methods differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiltlm.errors import UsageError
from tiltlm.reports.summary import plain_number
from tiltlm.runs.directory import RunDirectory, git_commit, installed_versions
from tiltlm.study.record import Entry, Study, StudyMethod, StudyTask
from tiltlm.study.rows import goals_of, run_rows

# The parts of a config that define a task; the samples of the fit and their seed do not.
TASK_KEYS = ("model", "revision", "prompts", "max_completion_length")
METHOD_KEYS = ("method", "training", "peft")


def study_of_runs(folders: Sequence[Path]) -> Study:
    """The runs of these directories side by side. Raises UsageError for a directory without a run, or a duplicate."""
    runs = [RunDirectory.open(folder) for folder in folders]
    records = [run.read_run() for run in runs]
    tasks, methods = _task_names(records), _method_names(records)
    entries, rows = [], []
    seen: dict[tuple[str, str, int], Path] = {}
    goals: dict[str, Mapping[str, float | None]] = {}
    for run, record, task, method in zip(runs, records, tasks, methods, strict=True):
        key = (task, method, int(record["seed"]))
        if key in seen:
            raise UsageError(f"'{seen[key]}' and '{run.path}' have the same task, method and seed; leave one out")
        seen[key] = run.path
        error = (record.get("error") or {}).get("message")
        entry = Entry(*key, record["status"], error, record.get("seconds"))
        entries.append(entry)
        goals.setdefault(task, goals_of(record))
        if record["status"] == "done":
            rows += run_rows(entry, run)
    return Study(
        title="Comparison of runs",
        tasks=[StudyTask(name, name, goals[name]) for name in dict.fromkeys(tasks)],
        methods=[StudyMethod(name, name, name) for name in dict.fromkeys(methods)],
        entries=entries,
        rows=rows,
        made={"versions": installed_versions(), "git_commit": git_commit(), "runs": [str(run.path) for run in runs]},
    )


def _task_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for the task of each run, from its features and goals."""
    settings = [_task_of(record["config"]) for record in records]
    keys = [json.dumps(one, sort_keys=True) for one in settings]
    names: dict[str, str] = {}
    for key, record in zip(keys, records, strict=True):
        if key not in names:
            name = _in_words(record)
            same = sum(other == name or other.startswith(f"{name} #") for other in names.values())
            names[key] = name if not same else f"{name} #{same + 1}"
    return [names[key] for key in keys]


def _task_of(config: Mapping[str, Any]) -> dict[str, Any]:
    target = {key: value for key, value in (config.get("target") or {}).items() if key not in ("samples", "seed")}
    return {"target": target, **{key: config.get(key) for key in TASK_KEYS}}


def _in_words(record: Mapping[str, Any]) -> str:
    goals = goals_of(record)
    parts = [name if goal is None else f"{name} {plain_number(goal)}" for name, goal in goals.items()]
    return ", ".join(parts) or "target not fitted"


def _method_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each run's method, with the settings in which others of that name differ."""
    flat = [_flat({key: record["config"].get(key) for key in METHOD_KEYS}) for record in records]
    named = [str((record["config"].get("method") or {}).get("name")) for record in records]
    result = []
    for own, name in zip(flat, named, strict=True):
        same_name = [other for other, called in zip(flat, named, strict=True) if called == name]
        keys = sorted({key for other in same_name for key in own | other if own.get(key) != other.get(key)})
        differing = [f"{key.split('.')[-1]}={own.get(key)}" for key in keys]
        result.append(f"{name} ({', '.join(differing)})" if differing else name)
    return result


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in nested.items():
        inner = isinstance(value, Mapping) and value
        result |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return result
