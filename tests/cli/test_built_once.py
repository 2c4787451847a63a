"""A config becomes objects once: each command reads the prompts and makes the user's own objects one time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from command_line import Command, write_config
from tiltlm.app import plan, prompts
from tiltlm.training import acceleration

PARTS = """
from tiltlm import Callback, Objective

def note(what):
    with open("made.txt", "a") as file:
        file.write(what + "\\n")

class Counted(Callback):
    def __init__(self):
        note("callback")

class Half(Objective):
    name = "half"

    def __init__(self):
        note("method")

    def coefficients(self, record):
        return 0.5 * (record.target_logscore - record.log_z - record.proposal_logprob).exp()

class Words:
    def __init__(self):
        note("feature")

    def __call__(self, texts):
        return [len(text.split()) for text in texts]
"""


def test_everything_is_made_once(
    tiltlm: Command, here: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    (here / "parts.py").write_text(PARTS)
    (here / "prompts.txt").write_text("she\\nhe\\n")
    counts = {"prompts": 0, "accelerator": 0}
    read, build = prompts.parse_prompts, acceleration.build_accelerator

    def counted_read(*args: Any, **kwargs: Any) -> Any:
        counts["prompts"] += 1
        return read(*args, **kwargs)

    def counted_build(*args: Any) -> Any:
        counts["accelerator"] += 1
        return build(*args)

    monkeypatch.setattr(prompts, "parse_prompts", counted_read)
    for place in ("tiltlm.app.tune", "tiltlm.training.trainer"):
        monkeypatch.setattr(f"{place}.build_accelerator", counted_build)
    changed = {
        **settings,
        "target": {"constraints": [{"feature": {"python": "parts:Words"}, "moment": 9}], "samples": 128},
        "method": "parts:Half",
        "callbacks": "parts:Counted",
        "prompts": "prompts.txt",
    }
    write_config(here / "run.yaml", changed)
    answer = tiltlm("tune", "run.yaml", "--output-dir", "run")
    assert answer.code == 0, answer.err
    assert sorted((here / "made.txt").read_text().split()) == ["callback", "feature", "method"]
    assert counts == {"prompts": 1, "accelerator": 1}

    for command in (
        ("eval", "run", "--samples", 20, "--device", "cpu"),
        ("eval", "run", "--samples", 20, "--device", "cpu", "--prompts", "she"),
        ("sample", "run", "--sampler", "resample", "-n", 2, "--pilot", 64, "--device", "cpu"),
        ("sample", "run.yaml", "--sampler", "resample", "-n", 2, "--pilot", 64),
        ("fit", "run.yaml"),
    ):
        (here / "made.txt").unlink()
        counts["prompts"] = 0
        answer = tiltlm(*command)
        assert answer.code == 0, answer.err
        made = (here / "made.txt").read_text().split()
        assert made.count("feature") == 1, command
        assert len(made) == len(set(made)), command
        assert counts["prompts"] == 1, command


def test_a_plan_needs_no_model(settings: dict[str, Any]) -> None:
    from tiltlm.config.run import parse_config

    made = plan.plan_run(parse_config({**settings, "model": "/nowhere/at/all"}))
    assert [feature.name for feature in made.features] == ["female"]
    assert made.method.objective.name == "kept_guide"
