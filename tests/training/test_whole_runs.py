"""Runs by their config in this process: stopped in every way, they go on to the same end, and say how they stand."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tiltlm.app.load import load_policy, load_run
from tiltlm.app.tune import Run, tune_config
from tiltlm.config.run import parse_config
from tiltlm.errors import CheckpointError, NumericalError, RunExistsError, UsageError
from tiltlm.lm import LanguageModel
from tiltlm.runs.directory import RunDirectory
from whole_runs import assert_same_run, metrics

LORA = {"r": 2, "target_modules": "all-linear"}

STOPPERS = """
import os, signal
import tiltlm

class Died(Exception):
    pass

class Stopper(tiltlm.Callback):
    step = {step}

    def on_step_end(self, progress, metrics):
        if progress.step == self.step:
            {action}
"""
ACTIONS = {
    "exception": "raise Died('in step %d' % progress.step)",
    "signal": "os.kill(os.getpid(), signal.SIGTERM)",
    "two signals": "os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)",
}


def tune(settings: dict[str, Any], folder: Path, *, resume: bool = False, **changes: Any) -> Run:
    console = Console(file=io.StringIO())
    return tune_config(parse_config({**settings, **changes}), folder, resume=resume, console=console)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs by the settings that they have beside the common ones; filled as they are asked for."""
    return {"root": tmp_path_factory.mktemp("references")}


def finished(reference: dict[str, Path], settings: dict[str, Any], name: str, **changes: Any) -> Path:
    if name not in reference:
        folder = reference["root"] / name
        assert tune(settings, folder, **changes).status == "done"
        reference[name] = folder
    return reference[name]


def stopper(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, step: int) -> str:
    """The name of a callback that stops a run in this way in this step."""
    name = f"stopper_{kind.replace(' ', '_')}_{step}_{abs(hash(folder))}"
    (folder / f"{name}.py").write_text(STOPPERS.format(step=step, action=ACTIONS[kind]))
    monkeypatch.syspath_prepend(str(folder))
    return f"{name}:Stopper"


@pytest.mark.serial
@pytest.mark.parametrize(
    ("kind", "step", "status"),
    [
        # Before the first checkpoint, between two, and in the last step.
        ("exception", 2, "failed"),
        ("exception", 5, "failed"),
        ("signal", 1, "interrupted"),
        ("signal", 7, "interrupted"),
        ("signal", 12, "interrupted"),
        ("two signals", 2, "interrupted"),
        ("two signals", 8, "interrupted"),
    ],
)
def test_a_run_that_stopped_is_resumed_to_the_same_end(
    settings: dict[str, Any],
    reference: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    step: int,
    status: str,
) -> None:
    folder = tmp_path / "run"
    callbacks = [stopper(monkeypatch, tmp_path, kind, step)]
    if kind == "signal":
        assert tune(settings, folder, callbacks=callbacks).status == "interrupted"
        assert (folder / "checkpoints" / f"step-{step:06d}").is_dir()
    else:
        error = KeyboardInterrupt if kind == "two signals" else Exception
        with pytest.raises(error, match="in step" if kind == "exception" else None):
            tune(settings, folder, callbacks=callbacks)
    stopped = record(folder)
    assert stopped["status"] == status
    if status == "failed":
        assert stopped["error"] == {"type": "Died", "message": f"in step {step}"}
    assert not (folder / "policy").exists()
    run = tune(settings, folder, resume=True)
    assert run.status == "done"
    assert_same_run(folder, finished(reference, settings, "full"))


def test_with_lora_too(
    settings: dict[str, Any], reference: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    callbacks = [stopper(monkeypatch, tmp_path, "signal", 7)]
    tune(settings, folder, peft=LORA, callbacks=callbacks)
    tune(settings, folder, resume=True, peft=LORA)
    whole = finished(reference, settings, "lora", peft=LORA)
    assert (folder / "policy" / "adapter_model.safetensors").read_bytes() == (
        whole / "policy" / "adapter_model.safetensors"
    ).read_bytes()
    assert metrics(folder) == metrics(whole)
    assert any(line["proposal"].startswith("step") for line in metrics(whole))


@pytest.mark.parametrize("lost", ["base_sample.pt", "everything"])
def test_a_run_killed_before_its_first_checkpoint_starts_over_to_the_same_end(
    settings: dict[str, Any], reference: dict[str, Path], tmp_path: Path, lost: str
) -> None:
    """run.json is there, and the samples that the target was fitted on perhaps not yet."""
    whole, folder = finished(reference, settings, "full"), tmp_path / "run"
    folder.mkdir()
    killed = record(whole) | {"status": "running"}
    (folder / "run.json").write_text(json.dumps({k: v for k, v in killed.items() if k not in ("evaluation", "target")}))
    if lost != "everything":
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "base_sample.pt.partial").write_bytes(b"half")
        lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    tune(settings, folder, resume=True)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("killed", [False, True], ids=["nothing", "killed before run.json"])
def test_resuming_where_there_is_nothing_starts_a_run(
    settings: dict[str, Any], reference: dict[str, Path], tmp_path: Path, killed: bool
) -> None:
    if killed:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / ".run.json.4711.tmp").write_bytes(b'{"schema_ver')
    tune(settings, tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "new", finished(reference, settings, "full"))


def test_a_run_killed_while_it_was_evaluated_is_finished(
    settings: dict[str, Any], reference: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tiltlm.app.tune.evaluate_both", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(settings, folder)
    assert record(folder)["status"] == "interrupted"
    monkeypatch.undo()
    tune(settings, folder, resume=True)
    assert_same_run(folder, finished(reference, settings, "full"))


def numbers(nested: Any) -> list[float | None]:
    """All numbers in a record; null stands for one that was not finite."""
    if isinstance(nested, dict | list):
        parts = nested.values() if isinstance(nested, dict) else nested
        return [number for part in parts for number in numbers(part)]
    return [] if isinstance(nested, str) else [nested]


def test_in_bf16_every_figure_is_finite_and_near_that_of_full_precision(
    settings: dict[str, Any], reference: dict[str, Path]
) -> None:
    whole = finished(reference, settings, "full")
    half = finished(reference, settings, "bf16", training={**settings["training"], "bf16": True})
    assert metrics(half) != metrics(whole)
    # From the base no scoring pass takes the law of the samples.
    assert None not in numbers([{**step, "mismatch": step["mismatch"] or {}} for step in metrics(half)])
    evaluations = [record(folder)["evaluation"]["policy"] for folder in (whole, half)]
    for figure in ("kl_p_pi", "kl_pi_a", "tv_p_pi", "log_z", "entropy"):
        one, other = (evaluation[figure] for evaluation in evaluations)
        assert abs(one["value"] - other["value"]) < 5 * max(one["se"], other["se"]), figure


def test_fp16_is_refused_on_a_cpu_before_anything_is_drawn(settings: dict[str, Any], tmp_path: Path) -> None:
    changed = {**settings["training"], "fp16": True}
    with pytest.raises(UsageError, match=r"training\.fp16: not possible on cpu; leave it out, or try bf16"):
        tune(settings, tmp_path / "run", training=changed, device="cpu")
    assert not (tmp_path / "run").exists()


CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("seed", {"seed": 5}, "seed was 4 and is 5"),
    ("training.learning_rate", {"learning_rate": 0.5}, "training.learning_rate was 0.001 and is 0.5"),
    ("training.max_steps", {"max_steps": 13}, "training.max_steps was 12 and is 13"),
    ("method", {"method": {"name": "gdc"}}, "method.name was 'gdc++' and is 'gdc'"),
    ("peft", {"peft": LORA}, "peft.r was None and is 2"),
    ("length", {"max_completion_length": 3}, "max_completion_length was 4 and is 3"),
]


@pytest.mark.parametrize(("field", "change", "part"), CHANGES, ids=[name for name, _, _ in CHANGES])
def test_a_changed_config_is_refused_on_resuming(
    settings: dict[str, Any], reference: dict[str, Path], field: str, change: dict[str, Any], part: str
) -> None:
    changed = copy.deepcopy(settings)
    if field.startswith("training."):
        changed["training"] |= change
    else:
        changed |= change
    whole = finished(reference, settings, "full")
    before = (whole / "run.json").read_bytes()
    with pytest.raises(UsageError, match="--resume: the config is not the one of") as caught:
        tune(changed, whole, resume=True)
    assert part in str(caught.value)
    assert (whole / "run.json").read_bytes() == before


def test_what_does_not_change_the_result_may_change_on_resuming(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    tune(settings, folder, callbacks=[stopper(monkeypatch, tmp_path, "signal", 4)])
    changed = copy.deepcopy(settings)
    changed["training"] |= {"save_steps": 1, "logging_steps": 5}
    changed["evaluation"]["samples"] = 30
    tune(changed, folder, resume=True)
    assert record(folder)["evaluation"]["policy"]["samples"] == 30
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-000011", "step-000012"]


def test_a_run_of_an_older_tiltlm_goes_on_where_what_it_lacks_is_at_its_default(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    tune(settings, folder, callbacks=[stopper(monkeypatch, tmp_path, "signal", 4)])
    known = record(folder)
    del known["config"]["training"]["keep_guide"], known["config"]["revision"]
    (folder / "run.json").write_text(json.dumps(known))
    changed = copy.deepcopy(settings)
    changed["training"]["keep_guide"] = True
    with pytest.raises(UsageError, match=r"training\.keep_guide was None and is True"):
        tune(changed, folder, resume=True)
    tune(settings, folder, resume=True)
    assert record(folder)["status"] == "done"


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_a_base_that_has_changed_under_its_name_is_refused(
    settings: dict[str, Any], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peft: Any
) -> None:
    """On resuming and on measuring; and the very same weights, put back, are taken."""
    mine, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(model_folder, mine)
    settings = {**settings, "model": str(mine), "peft": peft}
    tune(settings, folder, callbacks=[stopper(monkeypatch, tmp_path, "signal", 2)])

    overwritten = LanguageModel.from_pretrained(mine, device="cpu")
    with torch.no_grad():
        overwritten.model.get_input_embeddings().weight[0, 0] += 1e-3
    overwritten.save_pretrained(mine)
    before = (folder / "run.json").read_bytes()
    changed = f"the weights of its base '{mine}' have changed since it began .*another output directory"
    with pytest.raises(CheckpointError, match=changed):
        tune(settings, folder, resume=True)
    assert (folder / "run.json").read_bytes() == before

    shutil.copytree(model_folder, mine, dirs_exist_ok=True)
    assert tune(settings, folder, resume=True).status == "done"
    run = RunDirectory.open(folder)
    _, roles, _ = load_run(run, "cpu")
    overwritten.save_pretrained(mine)
    with pytest.raises(CheckpointError, match=changed):
        load_run(run, "cpu")
    if peft is None:
        # A policy with weights of its own needs no base to sample from.
        one, other = (m.sample(3, seed=0, max_completion_length=4) for m in (load_policy(run, "cpu")[1], roles.policy))
        assert one.texts == other.texts
    else:
        with pytest.raises(CheckpointError, match=changed):
            load_policy(run, "cpu")


def test_a_directory_in_use_is_left_alone(settings: dict[str, Any], reference: dict[str, Path]) -> None:
    whole = finished(reference, settings, "full")
    before = (whole / "run.json").read_bytes()
    with pytest.raises(RunExistsError, match="--resume"):
        tune(settings, whole)
    assert (whole / "run.json").read_bytes() == before


def test_a_run_that_diverges_fails_with_a_reason_and_keeps_its_checkpoints(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """From the third step on the weights are beyond all bounds."""
    folder = tmp_path / "run"
    diverging = copy.deepcopy(settings)
    diverging["training"] |= {
        "optim": "sgd",
        "learning_rate": 1e30,
        "lr_scheduler_type": "polynomial",
        "lr_scheduler_kwargs": {"power": 1.0, "lr_end": 0.0},
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "save_steps": 1,
        "reuse_fit_samples": False,
    }
    diverging["method"] = {"name": "gdc++", "proposal": "on_policy"}
    with pytest.raises(NumericalError, match="learning_rate"):
        tune(diverging, folder)
    run = record(folder)
    assert run["status"] == "failed"
    assert run["error"]["type"] == "NumericalError"
    assert "learning_rate" in run["error"]["message"]
    kept = sorted((folder / "checkpoints").glob("step-*"))
    assert kept
    assert len(metrics(folder)) == int(kept[-1].name.removeprefix("step-"))


def test_the_same_seed_gives_the_same_run_and_another_another(
    settings: dict[str, Any], reference: dict[str, Path], tmp_path: Path
) -> None:
    whole = finished(reference, settings, "full")
    # Whatever the global generators do.
    torch.manual_seed(12345)
    tune(settings, tmp_path / "again")
    assert_same_run(tmp_path / "again", whole)
    tune(settings, tmp_path / "other", seed=5)
    assert metrics(tmp_path / "other")[0]["log_z"] != metrics(whole)[0]["log_z"]
