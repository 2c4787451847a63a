"""The examples parse, their features exist, and the page that shows the whole algorithm runs."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tiltlm.app.plan import plan_run
from tiltlm.config.run import load_config

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_config_is_valid(path: Path) -> None:
    config = load_config(path)
    plan_run(config)
    assert config.model == "embedded"


def test_the_one_page_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["one_page.py", "2", "16", "512"])
    runpy.run_path(str(EXAMPLES / "one_page.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1", "2"]
