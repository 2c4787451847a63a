"""A synthetic run for the tests of its report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from synthetic_run import write_synthetic_run
from tiltlm.runs.directory import RunDirectory


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """Writes a synthetic run into the test's own folder."""

    def make(name: str = "parity", **choices: Any) -> RunDirectory:
        return write_synthetic_run(tmp_path / name, **choices)

    return make
