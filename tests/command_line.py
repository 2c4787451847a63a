"""Typing commands, and looking at what they leave behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiltlm.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command came to: its exit code and both streams."""

    code: int
    out: str
    err: str


Command = Callable[..., Answer]
Files = dict[str, bytes]
STOPS = """
import os, signal
import tiltlm

class Stops(tiltlm.Callback):
    def on_step_end(self, progress, metrics):
        if progress.step == 3:
            os.kill(os.getpid(), signal.{signal})
"""


def type_command(*words: object) -> int:
    """Run the command line on these words in this process; returns the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tiltlm", *map(str, words)])
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0


def write_config(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def write_stops(folder: Path, name: str = "SIGTERM") -> None:
    """Put ``stops.py`` into a folder: with ``callbacks=stops:Stops`` a run gets this signal in its third step."""
    (folder / "stops.py").write_text(STOPS.replace("{signal}", name))


def files_under(folder: Path) -> Files:
    """Every file with its content; directories that are empty count as well."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"<directory>"
        for path in sorted(folder.rglob("*"))
    }


def assert_one_error(err: str, said: list[str]) -> None:
    """One message, in words for users, that says all of this."""
    errors = [line for line in err.splitlines() if line.lower().startswith("error:")]
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert "not expected" not in err
    for part in said:
        assert part in errors[0], f"{part!r} is not in: {errors[0]}"


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("seconds", "created", "updated", "git_commit")}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [without_times(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
