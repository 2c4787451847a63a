"""The run directory: the only writer and reader of run.json, metrics.jsonl and samples.jsonl."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tiltlm.errors import CheckpointError, RunExistsError, UsageError
from tiltlm.runs import storage

SCHEMA_VERSION = 1

STATUSES = ("running", "done", "failed", "interrupted")

# An estimate is {"value": number or null, "se": number or null} wherever one is stored.
RUN_FIELDS = {
    "schema_version": "version of this layout; a reader refuses a newer one than it knows",
    "status": "running, done, failed or interrupted",
    "error": "null, or type and message of the exception that ended the run",
    "created": "when the run began, ISO 8601 in UTC",
    "updated": "when this file was last written, ISO 8601 in UTC",
    "seconds": "wall-clock time of the run so far, over all resumptions",
    "config": "the full configuration, defaults included",
    "seed": "the seed that every random generator was derived from",
    "versions": "versions of tiltlm, python and the packages that decide the numbers",
    "git_commit": "commit of the working directory, or null outside a repository",
    "base_fingerprint": "hash of the base's weights, null before they are loaded; a run resumes only with these",
    "device": "device of the models, null before they are loaded",
    "target": "the fitted target: its features with base, goal and achieved moments, log Z, ESS, KL(p‖a)",
    "evaluation": "estimates on fresh samples of base and policy; absent until there are any",
    "progress": "step, max_steps, and sequences and forward passes spent so far",
}

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")


@dataclass(frozen=True)
class RunDirectory:
    """One run on disk: run.json, metrics.jsonl, samples.jsonl, policy/, checkpoints/ and report.html.

    Files are replaced atomically: a run killed at any moment leaves the old file or the new one.
    """

    path: Path

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], seed: int, *, overwrite: bool = False) -> RunDirectory:
        """Start a run in an empty or new directory; with ``overwrite``, in place of the run in it.

        Raises RunExistsError if the directory is not empty (with ``overwrite``: if it holds anything but a run),
        UsageError if it cannot be created.
        """
        run = cls(Path(path))
        run._make_room(overwrite)
        now = _now()
        record = {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "error": None,
            "created": now,
            "updated": now,
            "seconds": 0.0,
            "config": config,
            "seed": seed,
            "versions": installed_versions(),
            "git_commit": git_commit(),
            "base_fingerprint": None,
            "device": None,
        }
        storage.write_object(run.run_path, record)
        storage.remove_unfinished(run.run_path)
        return run

    def check_free(self) -> None:
        """Raise RunExistsError if ``create`` would; creates nothing."""
        if self.path.exists():
            self._make_room(overwrite=False)

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The run in an existing directory.

        Raises UsageError if there is none, CheckpointError if its ``run.json`` is broken or written by a newer tiltlm.
        """
        run = cls(Path(path))
        if not run.path.is_dir():
            what = "is a file" if run.path.exists() else "does not exist"
            raise UsageError(f"run directory: '{path}' {what}. Give the --output-dir of an earlier run.")
        if not run.run_path.is_file():
            raise UsageError(
                f"run directory: '{path}' is not a run directory: it has no run.json. Give the --output-dir of a run."
            )
        run.read_run()
        return run

    @property
    def run_path(self) -> Path:
        """``run.json``: configuration, status and results."""
        return self.path / "run.json"

    @property
    def metrics_path(self) -> Path:
        """``metrics.jsonl``: one line per step."""
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        """``samples.jsonl``: one line per text."""
        return self.path / "samples.jsonl"

    @property
    def policy_dir(self) -> Path:
        """``policy/``: the tuned model, a Hugging Face checkpoint or PEFT adapter, and its guide if it keeps one."""
        return self.path / "policy"

    @property
    def checkpoint_dir(self) -> Path:
        """``checkpoints/``: the state for resuming."""
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        """``report.html``: one self-contained file."""
        return self.path / "report.html"

    def read_run(self) -> dict[str, Any]:
        """``run.json``, with the fields of ``RUN_FIELDS``; raises CheckpointError if it is broken or newer."""
        record = storage.read_object(self.run_path)
        version = record.get("schema_version")
        if not isinstance(version, int):
            raise CheckpointError(f"'{self.run_path}' has no schema_version, so it was not written by tiltlm.")
        if version > SCHEMA_VERSION:
            raise CheckpointError(
                f"'{self.run_path}' has schema_version {version}, but this tiltlm reads up to {SCHEMA_VERSION}. "
                "Upgrade tiltlm to read this run."
            )
        return record

    def write_run(self, **updates: Any) -> None:
        """Replace some of the ``RUN_FIELDS`` of ``run.json``; null where a number is not finite."""
        unknown = set(updates) - set(RUN_FIELDS)
        assert not unknown, f"run.json has no field {sorted(unknown)}"
        assert updates.get("status", "running") in STATUSES, f"no status {updates['status']!r}"
        storage.write_object(self.run_path, self.read_run() | {"updated": _now()} | updates)

    def mark_running(self, **updates: Any) -> None:
        """Mark the run as running, without its earlier failure; ``updates`` are further fields of ``run.json``."""
        self.write_run(status="running", error=None, **updates)

    def mark_done(self, **updates: Any) -> None:
        """Mark the run as done: trained and evaluated; ``updates`` are further fields of ``run.json``."""
        self.write_run(status="done", error=None, **updates)

    def mark_interrupted(self, **updates: Any) -> None:
        """Mark the run as interrupted; it can be resumed; ``updates`` are further fields of ``run.json``."""
        self.write_run(status="interrupted", error=None, **updates)

    def mark_failed(self, error: BaseException, **updates: Any) -> None:
        """Mark the run as failed with ``error``; never raises, so that the first error stays visible."""
        with suppress(OSError):
            record = {"type": type(error).__name__, "message": str(error)}
            self.write_run(status="failed", error=record, **updates)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one step's line; a line that cannot be written whole leaves the file as it was."""
        storage.append_line(self.metrics_path, record)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every step's record in order, without an unfinished last line of a killed process."""
        return storage.read_lines(self.metrics_path)

    def truncate_metrics(self, after_step: int) -> None:
        """Drop the lines of steps after ``after_step``, which a resumed run writes again."""
        records = [record for record in self.read_metrics() if record["step"] <= after_step]
        if self.metrics_path.exists():
            storage.write_lines(self.metrics_path, records)

    def write_samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace all the sampled texts."""
        storage.write_lines(self.samples_path, records)

    def read_samples(self) -> list[dict[str, Any]]:
        """Every sampled text's record in order; empty before the evaluation."""
        return storage.read_lines(self.samples_path)

    def _make_room(self, overwrite: bool) -> None:
        """Create the directory, or remove an earlier run from it; never deletes a file that no run wrote."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            occupied = any(not storage.is_unfinished(path, self.run_path) for path in self.path.iterdir())
        except OSError as error:
            raise UsageError(
                f"output_dir: cannot make a directory at '{self.path}': {error.strerror}. Choose another --output-dir."
            ) from error
        is_run = self.run_path.is_file()
        if occupied and not (overwrite and is_run):
            held = "a run" if is_run else "files that are not a run"
            advice = (
                "Continue it with --resume, choose another --output-dir, or delete it."
                if is_run
                else "Choose another --output-dir, or delete it; there is no run in it to --resume."
            )
            raise RunExistsError(f"output_dir: '{self.path}' already holds {held}. {advice}")
        if occupied:
            with storage.writing(self.path):
                # run.json goes last, so that an interrupted deletion leaves a run that can be overwritten.
                for directory in (self.policy_dir, self.checkpoint_dir):
                    if directory.exists():
                        shutil.rmtree(directory)
                for file in (self.metrics_path, self.samples_path, self.report_path, self.run_path):
                    file.unlink(missing_ok=True)


def installed_versions() -> dict[str, str]:
    """Versions of tiltlm, of Python and of the installed packages that decide a run's numbers; imports none of them."""
    from tiltlm._version import __version__

    versions = {"tiltlm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_commit(folder: Path | None = None) -> str | None:
    """The commit that ``folder`` (by default the working directory) is at; None outside a repository or without git."""
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
