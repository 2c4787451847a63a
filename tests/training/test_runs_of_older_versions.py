"""Run directories that tiltlm 0.1.0 wrote: they resume to the end that 0.1.0 reached, and report."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tiltlm.app.load import load_run
from tiltlm.app.tune import tune_config
from tiltlm.config.run import parse_config
from tiltlm.reports.report import write_report

RUNS = Path(__file__).parents[1] / "fixtures" / "runs_of_0.1.0"
# Fit samples, sampling and scores come from other CPUs: equal up to the rounding of float32.
CLOSE = {"rel": 2e-3, "abs": 2e-3}


@pytest.fixture(autouse=True)
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixtures in the current directory, where the runs' relative model path leads to."""
    torch.set_num_threads(1)
    shutil.copytree(RUNS, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["kept_guide", "guided", "pooled", "ppo"])
def test_a_stopped_run_goes_on_to_the_same_end(name: str) -> None:
    folder, whole = Path(f"stopped-{name}"), lines(Path(f"whole-{name}.jsonl"))
    config = parse_config(json.loads((folder / "run.json").read_text())["config"])
    run = tune_config(config, folder, resume=True, console=Console(file=io.StringIO()))
    assert run.status == "done"
    found = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in whole] == [*range(1, 7)]
    for line, before in zip(found, whole, strict=True):
        assert line.keys() == before.keys()
        for key in ("sequences", "forward_passes", "proposal", "proposal_updated", "passes_per_token"):
            assert line[key] == before[key], (line["step"], key)
        for key in ("log_z", "kl_p_pi", "kl_pi_a", "tv_p_pi"):
            assert line[key]["value"] == pytest.approx(before[key]["value"], **CLOSE), (line["step"], key)
        assert line["grad_norm"] == pytest.approx(before["grad_norm"], rel=0.02)


def test_a_finished_run_reports_and_loads() -> None:
    folder = Path("done-pooled")
    text = write_report(folder).read_text()
    assert "female" in text
    config, roles, target = load_run(folder, "cpu")
    assert config.method.name == "pooled"
    assert [feature.name for feature in target.features] == ["female"]
    assert len(roles.policy.sample(3, seed=0, max_completion_length=5).texts) == 3
