"""Runs whose policy keeps its guide: from the run file to the saved model, also after a stop and a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from command_line import Command, metrics_of, write_config, write_stops

LORA = {"r": 2, "target_modules": "all-linear"}


def with_kept_guide(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return slowly(settings) | {"training": slowly(settings)["training"] | {"keep_guide": True}} | changes


def slowly(settings: dict[str, Any]) -> dict[str, Any]:
    """A low learning rate: a few steps change little, so the end of a run shows its beginning."""
    return settings | {"training": settings["training"] | {"learning_rate": 1e-4}}


@pytest.mark.parametrize(
    "changes", [{}, {"peft": LORA}, {"method": "guided"}, {"method": {"name": "gdc++", "proposal": "kl"}}]
)
def test_a_run_begins_at_the_guide_and_its_model_is_saved_with_it(
    tiltlm: Command, here: Path, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    changes = {"method": "gdc++"} | changes
    plain, kept = slowly(settings) | changes, with_kept_guide(settings, **changes)
    for name, config in {"plain": plain, "kept": kept}.items():
        write_config(here / f"{name}.yaml", config)
        answer = tiltlm("tune", f"{name}.yaml", "--output-dir", f"runs/{name}")
        assert answer.code == 0, answer.err
    first = {name: metrics_of(here / "runs" / name)[0]["kl_p_pi"]["value"] for name in ("plain", "kept")}
    assert first["kept"] < 0.5 * first["plain"]
    assert (here / "runs/kept/policy/guide.safetensors").exists()
    assert not (here / "runs/plain/policy/guide.safetensors").exists()
    cards = {name: (here / "runs" / name / "policy/README.md").read_text() for name in ("plain", "kept")}
    assert ["guide.safetensors" in cards[name] for name in ("plain", "kept")] == [False, True]

    def evaluated(name: str) -> dict[str, float]:
        evaluation = json.loads(tiltlm("eval", f"runs/{name}", "--samples", 256, "--seed", 5, "--json").out)
        assert evaluation["mismatch"]["worst"] < 1e-3, evaluation["mismatch"]
        return {"kl": evaluation["kl_p_pi"]["value"], "mean": next(iter(evaluation["moments"].values()))["value"]}

    plain_found, found = evaluated("plain"), evaluated("kept")
    assert found["kl"] < plain_found["kl"]
    assert abs(found["mean"] - 0.5) < abs(plain_found["mean"] - 0.5)
    answer = tiltlm("sample", "runs/kept", "-n", 200, "--seed", 1)
    assert answer.code == 0, answer.err


@pytest.mark.usefixtures("no_pictures")
def test_the_default_method_distills_the_guide_that_it_keeps(
    tiltlm: Command, here: Path, settings: dict[str, Any]
) -> None:
    assert "method" not in settings
    spelled = with_kept_guide(settings, method={"name": "guided", "proposal": "on_policy"})
    spelled["training"]["num_iterations"] = 2
    for name, config in {"default": slowly(settings), "spelled": spelled}.items():
        write_config(here / f"{name}.yaml", config)
        answer = tiltlm("tune", f"{name}.yaml", "--output-dir", f"runs/{name}")
        assert answer.code == 0, answer.err
        assert ("kept_guide: the policy is its weights and a guide" in answer.err) == (name == "default")
    assert metrics_of(here / "runs/default") == metrics_of(here / "runs/spelled")
    for file in ("guide.safetensors", "model.safetensors"):
        one, other = (here / "runs" / name / "policy" / file for name in ("default", "spelled"))
        assert one.read_bytes() == other.read_bytes()
    assert "guide.safetensors" in (here / "runs/default/policy/README.md").read_text()


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("changes", [{}, {"peft": LORA, "method": {"name": "gdc", "proposal": "kl"}}])
@pytest.mark.serial
def test_a_stopped_run_resumes_with_the_same_guide(
    tiltlm: Command, here: Path, settings: dict[str, Any], changes: dict[str, Any]
) -> None:
    write_stops(here)
    write_config(here / "kept.yaml", with_kept_guide(settings, **changes))
    assert tiltlm("tune", "kept.yaml", "--output-dir", "runs/whole").code == 0
    assert tiltlm("tune", "kept.yaml", "callbacks=stops:Stops", "--output-dir", "runs/stopped").code == 130
    assert tiltlm("tune", "kept.yaml", "--output-dir", "runs/stopped", "--resume").code == 0
    assert metrics_of(here / "runs/stopped") == metrics_of(here / "runs/whole")
    for file in ("guide.safetensors", "adapter_model.safetensors" if "peft" in changes else "model.safetensors"):
        one, other = (here / "runs" / name / "policy" / file for name in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes()
    assert math.isfinite(metrics_of(here / "runs/whole")[-1]["kl_p_pi"]["value"])


def test_a_model_with_a_guide_cannot_be_a_base(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    write_config(here / "kept.yaml", with_kept_guide(settings))
    assert tiltlm("tune", "kept.yaml", "--output-dir", "runs/kept").code == 0
    write_config(here / "next.yaml", settings | {"model": str(here / "runs/kept/policy")})
    answer = tiltlm("fit", "next.yaml")
    assert answer.code == 2
    assert "keeps a guide (method kept_guide, or training.keep_guide) and cannot be a base" in answer.err
