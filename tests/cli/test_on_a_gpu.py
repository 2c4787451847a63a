"""Commands on a simulated GPU: every method runs, and no operation mixes tensors of GPU and CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Command, write_config, write_stops
from pretended_gpu import PretendedGPU, pretended_gpu
from tiltlm.config.study import load_study
from tiltlm.objectives import BUILT_IN
from tiltlm.study.grid import expand
from tiltlm.study.worker import work

pytestmark = pytest.mark.usefixtures("no_pictures")

TRAINING = {"max_steps": 3, "batch_size": 12, "save_steps": 1}
CASES: dict[str, dict[str, Any]] = {name: {"method": name, "training": TRAINING} for name in BUILT_IN} | {
    "kept": {"method": "guided", "training": {**TRAINING, "keep_guide": True}, "peft": {"r": 2}},
    "pool": {"method": "guided", "training": {**TRAINING, "pool": 100, "num_iterations": 2}},
    "kl": {"method": {"name": "gdc++", "proposal": "kl"}, "training": {**TRAINING, "gradient_samples": 4}},
    "published": {"method": {"name": "gdc", "proposal": "published"}, "training": TRAINING},
}


@pytest.fixture
def gpu() -> Iterator[PretendedGPU]:
    with pretended_gpu() as mode:
        yield mode


def test_mixed_devices_fail(gpu: PretendedGPU) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there.device.type, there[1:].is_cuda, there.cpu().device.type) == ("cuda", True, "cpu")
    assert gpu.is_there((there.view(3, 1) * 2).to(torch.float64))
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        here[there.long()]
    with pytest.raises(RuntimeError, match="generator"):
        there.uniform_(generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert gpu.is_there(there[here.long().clamp(max=2)] + here[0].to("cuda"))
    assert torch.equal((there + here.cuda() + here[0]).cpu(), torch.full((3,), 3.0))


@pytest.mark.parametrize("case", CASES)
def test_every_method_runs(tiltlm: Command, tiny: Path, here: Path, gpu: PretendedGPU, case: str) -> None:
    target = {"constraints": [{"feature": {"contains": "team"}, "moment": 0.4}], "samples": 150}
    common = {"model": str(tiny), "target": target, "max_completion_length": 8, "device": "cuda"}
    write_config(here / "run.yaml", {**common, "evaluation": {"samples": 20, "texts": 4}, **CASES[case]})
    answer = tiltlm("tune", "run.yaml", "--output-dir", "out")
    assert answer.code == 0, answer.err
    record = json.loads((here / "out" / "run.json").read_text())
    assert (record["status"], record["device"]) == ("done", "cuda:0")
    lines = [json.loads(line) for line in (here / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    maximizes = case in ("reinforce", "kl_control", "rloo", "ppo", "grpo")
    assert ("cannot stop at a moment" in answer.err) == maximizes
    assert not any("critic" in path.name for path in (here / "out" / "policy").iterdir())


@pytest.mark.serial
def test_a_run_resumes_from_a_checkpoint(
    tiltlm: Command, here: Path, settings: dict[str, Any], gpu: PretendedGPU
) -> None:
    write_stops(here)
    write_config(here / "run.yaml", {**settings, "device": "cuda", "callbacks": ["stops:Stops"]})
    assert tiltlm("tune", "run.yaml", "--output-dir", "out").code == 130
    answer = tiltlm("tune", "run.yaml", "callbacks=[]", "--output-dir", "out", "--resume")
    assert answer.code == 0, answer.err
    for command in (("eval", "out", "--samples", 16), ("sample", "out", "-n", 4)):
        answer = tiltlm(*command, "--device", "cuda")
        assert answer.code == 0, answer.err


def test_a_study_draws_its_reference_and_measures_on_it(
    here: Path, settings: dict[str, Any], gpu: PretendedGPU
) -> None:
    study = {
        "sequences": 320,
        "seeds": 1,
        "shared": {key: settings[key] for key in ("model", "evaluation", "max_completion_length")} | {"device": "cuda"},
        "reference": {"samples": 128, "scored": 64, "proposal": "guided"},
        "curve": {"points": 1, "samples": 16, "reference": 32},
        "tasks": {"female": {"target": settings["target"]}},
        "methods": {"gdc++": {"method": "gdc++", "training": {"batch_size": 32}}},
    }
    write_config(here / "study.yaml", study)
    grid = expand(load_study(here / "study.yaml"))
    order = {"config": grid.runs[0].config.to_json(), "scored": 64, "curve": study["curve"]}
    reference = {"kind": "reference", "folder": "reference", "reference": study["reference"] | {"seed": 0}}
    assert work(order | reference) == "done"
    assert work(order | {"kind": "run", "folder": "run", "reference": "reference"}) == "done"
    assert json.loads((here / "run" / "reference_kl.json").read_text())["kl_p_pi"]["value"] > 0
