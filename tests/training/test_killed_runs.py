"""The command line as a process of its own: interrupted, killed without warning, and resumed to the same end."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tiltlm.app.tune import tune_config
from tiltlm.config.run import load_config
from whole_runs import assert_same_run, metrics

pytestmark = pytest.mark.serial

STEPS = 60
PATIENCE = 200


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> Path:
    settings["training"] |= {"max_steps": STEPS, "save_steps": 7}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def whole(config: Path, tmp_path: Path) -> Path:
    """The run that nobody disturbed."""
    folder = tmp_path / "whole"
    tune_config(load_config(config), folder, console=Console(file=io.StringIO()))
    return folder


def environment() -> dict[str, str]:
    """One thread, as in this process: the order of a sum decides its last bit."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def start(config: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tiltlm", "tune", str(config), "--output-dir", str(folder), *options]
    return subprocess.Popen(
        command, env=environment(), cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    path, deadline = folder / "metrics.jsonl", time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def status(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def test_interrupted_then_killed_then_resumed_it_ends_as_if_nothing_had_happened(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "disturbed"
    first = start(config, folder)
    wait_for_step(first, folder, random.randint(1, 20))
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=PATIENCE)
    assert first.returncode == 130, said
    assert f"tiltlm tune {config} --output-dir {folder} --resume" in said
    assert status(folder) == "interrupted"
    done = len(metrics(folder))
    assert (folder / "checkpoints" / f"step-{done:06d}").is_dir()

    second = start(config, folder, "--resume")
    wait_for_step(second, folder, done + random.randint(1, 40))
    time.sleep(random.uniform(0, 0.05))
    second.kill()
    second.communicate(timeout=PATIENCE)
    assert second.returncode == -signal.SIGKILL
    assert status(folder) == "running"
    assert not (folder / "policy").exists()
    moment = f"killed with {len((folder / 'metrics.jsonl').read_bytes())} bytes of metrics"

    third = start(config, folder, "--resume")
    _, said = third.communicate(timeout=PATIENCE)
    assert third.returncode == 0, (moment, said)
    assert len(metrics(folder)) == STEPS
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("peft", [None, {"r": 2, "target_modules": "all-linear"}], ids=["full", "lora"])
def test_killed_a_dozen_times_it_ends_as_if_nothing_had_happened(
    settings: dict[str, Any], tmp_path: Path, peft: dict[str, Any] | None
) -> None:
    settings["training"] |= {"max_steps": STEPS, "save_steps": 5}
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**settings, "peft": peft}))
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    tune_config(load_config(config), whole, console=Console(file=io.StringIO()))
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_often.py")), config, folder, "12", "0.5"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert answer.returncode == 0, answer
    assert answer.stdout.count("kill ") == 12
    assert status(folder) == "done"
    assert_same_run(folder, whole)
