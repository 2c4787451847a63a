"""Real packages of third parties, run through tiltlm by ``package.module:name`` for two steps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from enumerable import tiny_model
from tiltlm.app.tune import tune_config
from tiltlm.config.run import parse_config
from tiltlm.errors import UnreachableTargetError, UsageError
from whole_runs import metrics

PACKAGES = Path(__file__).parent


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The packages on Python's path, as pip would put them, and an empty current directory."""
    torch.set_num_threads(1)
    for package in ("brevity_rewards", "steady_tilts"):
        monkeypatch.syspath_prepend(str(PACKAGES / package))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("gpt2", "pad_is_eos", dtype=torch.float32).save_pretrained(folder)
    return folder


def tune(model: Path, name: str, **changes: Any) -> Path:
    """The directory of a run of two steps."""
    settings: dict[str, Any] = {
        "model": str(model),
        "target": {"reward": {"feature": {"length": "words"}, "beta": 2.0}, "samples": 100},
        "method": "gdc++",
        "training": {"max_steps": 2, "batch_size": 40, "save_steps": 2, "reuse_fit_samples": False},
        "max_completion_length": 4,
        "evaluation": {"samples": 30, "texts": 4, "top_p": None},
        **changes,
    }
    run = tune_config(parse_config(settings), Path(name), console=Console(file=io.StringIO()))
    assert run.status == "done"
    assert len(metrics(Path(name))) == 2
    assert (Path(name) / "report.html").exists()
    return Path(name)


def weights(folder: Path) -> bytes:
    return (folder / "policy" / "model.safetensors").read_bytes()


def test_an_objective_pulls_as_it_says(model_folder: Path) -> None:
    def objective(strength: float) -> dict[str, Any]:
        name = "steady_tilts.objectives:PartialBaseline"
        return {"name": name, "args": {"strength": strength}, "proposal": "interval", "check_steps": 1}

    built_in = tune(model_folder, "built-in", method={"name": "gdc++", "proposal": "interval", "check_steps": 1})
    same = tune(model_folder, "same", method=objective(1.0))
    assert metrics(same) == metrics(built_in)
    assert weights(same) == weights(built_in)
    half = tune(model_folder, "half", method=objective(0.5))
    assert metrics(half)[0]["kl_p_pi"] == metrics(built_in)[0]["kl_p_pi"]
    assert metrics(half)[0]["grad_norm"] != metrics(built_in)[0]["grad_norm"]
    assert weights(half) != weights(built_in)


def test_an_objective_without_arguments_is_on_policy_by_default(model_folder: Path) -> None:
    run = tune(model_folder, "run", method="steady_tilts.objectives:PartialBaseline")
    assert {line["proposal"] for line in metrics(run)} == {"policy"}


def test_a_target_scores_as_it_says(model_folder: Path) -> None:
    reward = tune(model_folder, "reward")
    own = {"python": "steady_tilts.targets:Capped", "args": {"strength": 0.5}, "samples": 100}
    same = tune(model_folder, "same", target=own)
    assert metrics(same) == metrics(reward)
    assert weights(same) == weights(reward)
    record = json.loads((same / "run.json").read_text())["target"]
    assert [entry["name"] for entry in record["features"]] == ["length in words"]
    assert record["log_z"] == json.loads((reward / "run.json").read_text())["target"]["log_z"]


def test_a_target_may_leave_texts_out(model_folder: Path) -> None:
    own = {"python": "steady_tilts.targets:Capped", "args": {"strength": 0.5, "words": 2}, "samples": 200}
    run = tune(model_folder, "run", target=own)
    (entry,) = json.loads((run / "run.json").read_text())["target"]["features"]
    assert entry["base"]["value"] > 0.1
    assert entry["achieved"]["value"] <= 2
    with pytest.raises(UnreachableTargetError, match="none of 50 samples"):
        tune(model_folder, "nothing", target={**own, "samples": 50, "args": {"strength": 0.5, "words": -1}})
    assert not Path("nothing", "run.json").exists()


def test_a_callback_is_told_of_steps_logs_and_saves(model_folder: Path) -> None:
    run = tune(model_folder, "run", callbacks="steady_tilts.callbacks:Diary")
    first, second = metrics(run)
    assert Path("diary.txt").read_text().splitlines() == [
        f"step 1 of 2: KL {first['kl_p_pi']['value']:.6f}",
        f"log 1: ESS {first['ess']['value']:.6f}",
        f"step 2 of 2: KL {second['kl_p_pi']['value']:.6f}",
        f"log 2: ESS {second['ess']['value']:.6f}",
        "save 2: step-000002",
    ]


def test_a_reward_function_written_for_trl_is_a_feature(model_folder: Path) -> None:
    constraint = {"feature": {"python": "brevity_rewards:at_most", "args": {"words": 1}}, "moment": 0.7}
    run = tune(model_folder, "run", target={"constraints": [constraint], "samples": 200}, prompts="a b")
    (entry,) = json.loads((run / "run.json").read_text())["target"]["features"]
    assert entry["achieved"]["value"] == pytest.approx(0.7)
    assert entry["name"] in metrics(run)[1]["moments"]


def test_all_of_them_together(model_folder: Path) -> None:
    run = tune(
        model_folder,
        "run",
        method="steady_tilts.objectives:PartialBaseline",
        target={"python": "steady_tilts.targets:Capped", "args": {"strength": -0.2, "words": 3}, "samples": 200},
        callbacks=["steady_tilts.callbacks:Diary"],
        peft={"r": 2, "target_modules": "all-linear"},
    )
    assert len(Path("diary.txt").read_text().splitlines()) == 5
    assert (run / "policy" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"method": "steady_tilts.objectives:Nameless"}, ["Nameless", "coefficients(record)"]),
        ({"method": "steady_tilts.objectives:PartialBaselin"}, ["PartialBaselin", "PartialBaseline"]),
        ({"method": "steady_tilt.objectives:PartialBaseline"}, ["steady_tilt"]),
        (
            {"method": {"name": "steady_tilts.objectives:PartialBaseline", "args": {"strenght": 1.0}}},
            ["strenght"],
        ),
        ({"target": {"python": "steady_tilts.targets:Capped"}}, ["Capped", "strength"]),
        ({"target": {"python": "steady_tilts.objectives:Nameless"}}, ["Nameless", "log_score"]),
        ({"callbacks": "steady_tilts.objectives:Nameless"}, ["Nameless", "Callback"]),
    ],
)
def test_what_is_no_such_thing_is_a_usage_error(model_folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        tune(model_folder, "run", **changes)
    for part in parts:
        assert part in str(caught.value)
    assert not Path("run").exists()
