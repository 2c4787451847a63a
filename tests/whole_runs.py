"""Whole runs compared: everything that a run leaves, without what a clock says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def left_behind(folder: Path) -> dict[str, Any]:
    """What must be the same in two runs of one config, however often one of them was stopped."""
    run = json.loads((folder / "run.json").read_text())
    # Callbacks may differ between two sittings.
    run["config"].pop("callbacks")
    weights = [*folder.glob("policy/*.safetensors")]
    assert len(weights) == 1
    return {
        "weights": weights[0].read_bytes(),
        "metrics": metrics(folder),
        "samples": (folder / "samples.jsonl").read_bytes(),
        **{key: run[key] for key in ("status", "error", "target", "evaluation", "progress", "config")},
    }


def assert_same_run(one: Path, other: Path) -> None:
    first, second = left_behind(one), left_behind(other)
    for part in first:
        assert first[part] == second[part], part
