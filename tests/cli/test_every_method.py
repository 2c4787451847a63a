"""Every method by its name in a run file: it tunes, evaluates and publishes, and says what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command_line import Command, write_config
from tiltlm.objectives import BUILT_IN

pytestmark = pytest.mark.usefixtures("no_pictures")

TARGET = {"constraints": [{"feature": {"contains": "team"}, "moment": 0.4}], "samples": 150}
TRAINING = {"max_steps": 2, "batch_size": 12}
CASES: dict[str, dict[str, Any]] = {name: {"method": name, "training": TRAINING} for name in BUILT_IN} | {
    "guided, pool": {"method": "guided", "training": {**TRAINING, "pool": 100, "num_iterations": 2}}
}


@pytest.mark.parametrize("case", CASES)
def test_it_runs_to_its_report(tiltlm: Command, tiny: Path, here: Path, case: str) -> None:
    common = {"model": str(tiny), "target": TARGET, "max_completion_length": 8, "device": "cpu"}
    write_config(here / "run.yaml", {**common, "evaluation": {"samples": 20, "texts": 4}, **CASES[case]})
    answer = tiltlm("tune", "run.yaml", "--output-dir", "out")
    assert answer.code == 0, answer.err
    record = json.loads((here / "out" / "run.json").read_text())
    assert record["status"] == "done"
    lines = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    maximizes = case in ("reinforce", "kl_control", "rloo", "ppo", "grpo")
    assert ("cannot be told to stop at a moment" in answer.err) == maximizes
    assert not any("critic" in path.name for path in (here / "out" / "policy").iterdir())
