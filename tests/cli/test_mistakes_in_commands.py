"""Wrong commands, folders and files, and failures during a run: one message, the right exit code, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import Command, assert_one_error, files_under, write_config

TUNE_AGAIN = ("tune", "run.yaml", "--output-dir", "runs/done")

# What is typed, and what the message must say; each is wrong as typed, so the exit code is 2.
MISTYPED: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "no such command": (("tun", "run.yaml"), ["No such command 'tun'"]),
    "no such option": (("tune", "run.yaml", "--learning-rate", 1), ["No such option: --learning-rate"]),
    "no config": (("tune",), ["CONFIG.yaml"]),
    "config that is not there": (("tune", "rnu.yaml"), ["rnu.yaml", "No such file", "tiltlm init"]),
    "config that is a folder": (("tune", "."), [".", "cannot be read"]),
    "override without a value": (("tune", "run.yaml", "seed"), ["'seed'", "key=value"]),
    "override without a key": (("tune", "run.yaml", "=3"), ["'=3'", "key=value"]),
    "override that is no YAML": (("tune", "run.yaml", "peft={r: 8"), ["'peft={r: 8'", "not valid YAML"]),
    "override of an unknown key": (
        ("tune", "run.yaml", "training.max_step=3"),
        ["'training.max_step'", "did you mean 'max_steps'"],
    ),
    "override below a value": (("tune", "run.yaml", "seed.x=3"), ["seed"]),
    "override of a whole section": (("tune", "run.yaml", "training=3"), ["'training=3'", "max_steps", "name one"]),
    "override outside of a list": (
        ("fit", "run.yaml", "target.constraints.1.moment=0.3"),
        ["'target.constraints.1.moment=0.3'", "list of 1", "count from 0"],
    ),
    "override of a list by name": (("fit", "run.yaml", "target.constraints.moment=0.3"), ["'moment'", "list of 1"]),
    "zero samples to evaluate": (("eval", "MODEL", "--samples", 0), ["--samples", "2"]),
    "words for a number": (("eval", "MODEL", "--samples", "many"), ["--samples", "integer"]),
    "top-p above one": (("eval", "MODEL", "--top-p", 2), ["--top-p", "2", "(0, 1]"]),
    "negative seed": (("eval", "MODEL", "--seed", -1), ["--seed", "0"]),
    "texts of no length": (("eval", "MODEL", "--max-completion-length", 0), ["--max-completion-length", "1"]),
    "texts longer than the model": (("sample", "MODEL", "--max-completion-length", 65), ["65", "64", "MODEL"]),
    "prompt longer than the model": (("sample", "MODEL", "--prompt", "she " * 65), ["65", "64", "shorten the prompts"]),
    "unknown device": (("sample", "MODEL", "--device", "gpu"), ["device", "'gpu'", "cpu or cuda"]),
    "no texts": (("sample", "MODEL", "-n", 0), ["-n", "1"]),
    "sampling with top-p above one": (("sample", "MODEL", "--top-p", 2), ["top_p", "2.0", "(0, 1]"]),
    "sampling at no temperature": (("sample", "MODEL", "--temperature", 0), ["temperature", "0.0", "above 0"]),
    "negative top-k": (("sample", "MODEL", "--top-k", -1), ["top_k", "-1", "at least 0"]),
    "model that is not there": (("sample", "no/such/model"), ["'no/such/model'", "embedded", "hub"]),
    "run that is not there": (("report", "runs/nowhere"), ["'runs/nowhere'", "does not exist", "--output-dir"]),
    "eval of a folder that is no run": (("eval", "notes"), ["'notes'", "run.json", "config.json"]),
    "sample of a folder that is no run": (("sample", "notes"), ["'notes'", "run.json", "config.json"]),
    "report of a folder that is no run": (("report", "notes"), ["'notes'", "run.json"]),
    "report of a file": (("report", "run.yaml"), ["'run.yaml' is a file", "--output-dir"]),
    "eval of a file": (("eval", "run.yaml"), ["'run.yaml' is a file", "run", "model"]),
    "eval without a tuned model": (("eval", "runs/young"), ["runs/young", "no tuned model", "running", "--resume"]),
    "sample without a tuned model": (("sample", "runs/young"), ["runs/young", "no tuned model", "--resume"]),
    "output of a run": (TUNE_AGAIN, ["runs/done", "already holds a run", "--resume", "--output-dir"]),
    "output among other files": (
        ("tune", "run.yaml", "--output-dir", "notes"),
        ["notes", "files that are not a run", "--output-dir"],
    ),
    "output that is a file": (
        ("tune", "run.yaml", "--output-dir", "run.yaml"),
        ["output_dir", "run.yaml", "--output-dir"],
    ),
    "resuming among other files": (("tune", "run.yaml", "--output-dir", "notes", "--resume"), ["notes", "no run"]),
    "resuming with another config": (
        (*TUNE_AGAIN, "training.learning_rate=0.1", "seed=3", "--resume"),
        ["--resume", "training.learning_rate was 0.002 and is 0.1", "seed was 0 and is 3"],
    ),
    "another evaluation of a finished run": (
        (*TUNE_AGAIN, "evaluation.samples=128", "--resume"),
        ["--resume", "evaluation.samples was 64 and is 128", "is done", "`tiltlm eval`"],
    ),
    "config that is there already": (("init", "run"), ["run.yaml exists", "NAME"]),
    "config in no folder": (("init", "no/such/folder/run"), ["no/such/folder/run.yaml", "cannot be written"]),
}


@pytest.mark.parametrize("mistake", MISTYPED)
def test_a_wrong_command_changes_nothing(tiltlm: Command, here: Path, finished: Path, tiny: Path, mistake: str) -> None:
    shutil.copytree(tiny, here / "MODEL")
    (here / "notes").mkdir()
    (here / "notes" / "diary.txt").write_text("dear diary")
    shutil.copytree(finished, here / "runs" / "young", ignore=shutil.ignore_patterns("policy", "report.html"))
    record = json.loads((finished / "run.json").read_text())
    (here / "runs" / "young" / "run.json").write_text(json.dumps(record | {"status": "running"}))
    before = files_under(here)
    words, said = MISTYPED[mistake]
    answer = tiltlm(*words)
    print(answer.err)
    assert_one_error(answer.err, said)
    assert (answer.code, answer.out) == (2, "")
    assert files_under(here) == before


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ["run.yaml", "keys and values", "None"]),
        (b"- model: embedded\n", ["run.yaml", "keys and values", "[{'model': 'embedded'}]"]),
        (b"model: {embedded\n", ["run.yaml", "not valid YAML", "line 2, column 1"]),
        (b"model: embedded\ntarget:\n\t- x\n", ["run.yaml", "not valid YAML", "line 3, column 1"]),
        (b"model: caf\xe9\n", ["run.yaml", "cannot be read", "utf-8"]),
        (b"1: 2\n", ["unknown key '1'"]),
        (b"model: embedded\nmodel: gpt2\n", ["run.yaml", "'model'", "twice", "line 2"]),
        (b"model: !!python/object:os.system {}\n", ["run.yaml", "not valid YAML"]),
    ],
    ids=["empty", "list", "broken", "tab", "latin1", "number", "twice", "object"],
)
def test_a_config_that_cannot_be_read(tiltlm: Command, here: Path, content: bytes, said: list[str]) -> None:
    (here / "run.yaml").write_bytes(content)
    before = files_under(here)
    answer = tiltlm("fit", "run.yaml")
    assert_one_error(answer.err, said)
    assert (answer.code, answer.out) == (2, "")
    assert files_under(here) == before


def without(*names: str) -> Callable[[Path], None]:
    def remove(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return remove


def cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def garbled(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"not safetensors at all" * 100)


def pickled(model: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def lacking_a_layer(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1" not in k}, model / "model.safetensors", {"format": "pt"})


def of_another_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def no_json(model: Path) -> None:
    (model / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("tokenizer.json", "tokenizer_config.json"), ["no tokenizer"]),
        (without("model.safetensors"), ["no model", "safetensors"]),
        (cut_short, ["no model"]),
        (garbled, ["no model"]),
        (pickled, ["no model", "safetensors"]),
        (lacking_a_layer, ["no model", "layers.1"]),
        (of_another_shape, ["no model", "mlp.down_proj.weight has shape (32, 48)", "(32, 64)"]),
        (no_json, ["MODEL"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_a_damaged_model_is_named(
    tiltlm: Command, here: Path, tiny: Path, settings: dict[str, Any], damage: Callable[[Path], None], said: list[str]
) -> None:
    damage(shutil.copytree(tiny, here / "MODEL"))
    write_config(here / "run.yaml", settings | {"model": "MODEL"})
    before = files_under(here)
    for words in (("tune", "run.yaml"), ("sample", "MODEL")):
        answer = tiltlm(*words)
        print(answer.err)
        assert_one_error(answer.err, ["model", "'MODEL'", "embedded", *said])
        assert (answer.code, answer.out) == (2, "")
    assert files_under(here) == before


def broken_file(name: str, content: bytes | None = None) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        path = run / name
        path.write_bytes(path.read_bytes()[:-40] if content is None else content)

    return damage


def unfinished(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same damage in an interrupted run; the checkpoints of a finished run are not read."""

    def interrupt(run: Path) -> None:
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
        damage(run)

    return interrupt


def newer(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"schema_version": 99}))


RESUME = (*TUNE_AGAIN, "--resume")


@pytest.mark.parametrize(
    ("damage", "words", "said"),
    [
        (broken_file("run.json"), RESUME, ["run.json", "broken", "restore a copy"]),
        (broken_file("run.json"), ("eval", "runs/done"), ["run.json", "broken", "restore a copy"]),
        (broken_file("run.json", b"[]"), ("report", "runs/done"), ["run.json", "not a JSON object"]),
        (broken_file("run.json", b"{}"), ("report", "runs/done"), ["run.json", "not written by tiltlm"]),
        (newer, ("sample", "runs/done"), ["run.json", "99", "Upgrade"]),
        (broken_file("metrics.jsonl", b"{\n{}\n"), ("report", "runs/done"), ["metrics.jsonl, line 1", "broken"]),
        (
            unfinished(broken_file("checkpoints/step-000004/tensors.pt")),
            RESUME,
            ["step-000004", "checksum", "Delete that folder"],
        ),
        (unfinished(broken_file("checkpoints/step-000004/state.json", b"{}")), RESUME, ["step-000004", "sha256"]),
        (
            unfinished(broken_file("checkpoints/base_sample.pt")),
            RESUME,
            ["base_sample.pt", "damaged", "another output directory"],
        ),
        (
            unfinished(broken_file("checkpoints/base_sample.pt", b"")),
            RESUME,
            ["base_sample.pt", "damaged (EOFError", "another output"],
        ),
    ],
)
def test_a_damaged_run_is_named_and_left_as_it_is(
    tiltlm: Command, here: Path, finished: Path, damage: Callable[[Path], None], words: tuple[str, ...], said: list[str]
) -> None:
    damage(finished)
    before = files_under(here)
    answer = tiltlm(*words)
    print(answer.err)
    assert_one_error(answer.err, said)
    assert (answer.code, answer.out) == (1, "")
    assert files_under(here) == before


def test_a_damaged_tuned_model_is_named(tiltlm: Command, here: Path, finished: Path) -> None:
    cut_short(finished / "policy")
    before = files_under(here)
    answer = tiltlm("eval", "runs/done")
    assert_one_error(answer.err, ["no model", "runs/done/policy"])
    assert (answer.code, answer.out) == (2, "")
    assert files_under(here) == before


MEASURES = """
import math

def raises(texts):
    return [1 / 0 for text in texts]

def nan(texts):
    return [math.nan for text in texts]

def none(texts):
    [1.0 for text in texts]

def skips(completions, **columns):
    return [None for text in completions]

def short(texts):
    return [1.0]

def later(texts, seen=[]):
    seen.append(len(texts))
    return [1 / 0 if len(seen) > 2 else float(i % 2) for i, text in enumerate(texts)]
"""


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        ([({"python": "measures:raises"}, 0.5)], ["'raises' raised ZeroDivisionError", "text 1 of 256", "one finite"]),
        ([({"python": "measures:nan"}, 0.5)], ["'nan' returned nan", "text 1 of 256", "one finite number per text"]),
        ([({"python": "measures:none"}, 0.5)], ["'none' returned None", "return"]),
        ([({"python": "measures:skips"}, 0.5)], ["'skips' returned None", "a target needs a number for each"]),
        ([({"python": "measures:short"}, 0.5)], ["'short' returned 1 values for 256 texts"]),
        ([({"python": "broken:short"}, 0.5)], ["target.constraints.0.feature", "'broken'", "SyntaxError"]),
        ([({"contains": "zebra"}, 1.0)], ["'contains 'zebra''", "never", "target.samples"]),
        ([({"contains": "zebra"}, 0.3)], ["'contains 'zebra''", "0.3", "target.samples"]),
        ([({"length": "words"}, 1000)], ["'length in words'", "1000", "256 samples"]),
        ([({"pronouns": "female"}, 0.7), ({"pronouns": "male"}, 0.7)], ["female = 0.7", "male = 0.7", "Relax one"]),
        ([({"pronouns": "female"}, 0.3), ({"not": {"pronouns": "female"}}, 0.4)], ["female", "Remove one"]),
    ],
)
def test_a_failed_fit_writes_nothing(
    tiltlm: Command, here: Path, settings: dict[str, Any], constraints: list[tuple[Any, float]], said: list[str]
) -> None:
    listed = [{"feature": feature, "moment": moment} for feature, moment in constraints]
    write_config(here / "run.yaml", settings | {"target": {"constraints": listed, "samples": 256}})
    (here / "measures.py").write_text(MEASURES)
    (here / "broken.py").write_text("def f(:\n")
    before = files_under(here)
    for command in ("fit", "tune"):
        answer = tiltlm(command, "run.yaml")
        print(answer.err)
        assert_one_error(answer.err, said)
        assert (answer.code, answer.out) == (1, "")
    assert files_under(here) == before


def failed_record(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed"
    return record


def test_a_diverging_run_keeps_its_checkpoints(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    answer = tiltlm(
        "tune", "run.yaml", "method=gdc++", "training.learning_rate=1e30", "training.optim=sgd", "training.save_steps=1"
    )
    print(answer.err)
    assert_one_error(answer.err, ["step 2", "not finite", "learning_rate"])
    assert (answer.code, answer.out) == (1, "")
    error = failed_record(here / "runs" / "run")["error"]
    assert error["type"] == "NumericalError"
    assert "learning_rate" in error["message"]
    assert (here / "runs" / "run" / "checkpoints" / "step-000001" / "tensors.pt").exists()


def test_a_feature_that_fails_in_training_leaves_a_failed_run(
    tiltlm: Command, here: Path, settings: dict[str, Any]
) -> None:
    (here / "measures.py").write_text(MEASURES)
    section = {"constraints": [{"feature": {"python": "measures:later"}, "moment": 0.4}], "samples": 256}
    write_config(here / "run.yaml", settings | {"target": section})
    answer = tiltlm("tune", "run.yaml", "training.reuse_fit_samples=false")
    print(answer.err)
    assert_one_error(answer.err, ["'later' raised ZeroDivisionError"])
    assert answer.code == 1
    assert failed_record(here / "runs" / "run")["error"]["type"] == "FeatureError"


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.serial
def test_a_full_disk_loses_nothing_and_the_run_resumes(
    tiltlm: Command, here: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    calls: list[int] = []

    def full_after_the_first_checkpoint(descriptor: int) -> None:
        calls.append(descriptor)
        if list((here / "runs" / "run" / "checkpoints").glob("step-*")):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_after_the_first_checkpoint)
        answer = tiltlm("tune", "run.yaml")
    assert_one_error(answer.err, ["space", "--resume"])
    assert (answer.code, answer.out) == (1, "")
    assert (here / "runs" / "run" / "checkpoints" / "step-000002" / "tensors.pt").exists()

    answer = tiltlm("tune", "run.yaml", "--resume")
    assert answer.code == 0, answer.err
    weights = "policy/model.safetensors"
    assert (here / "runs" / "run" / weights).read_bytes() == (finished_run / weights).read_bytes()


def pages(*files: Path) -> int:
    """Bytes that these files take on a disk with pages of 4 KiB."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in files)


@pytest.mark.parametrize("full_at", ["base_sample.pt", "tensors.pt", "model.safetensors", "report.html"])
@pytest.mark.serial
def test_a_disk_that_is_really_full(
    tiltlm: Command, here: Path, finished_run: Path, full_at: str, request: pytest.FixtureRequest
) -> None:
    if full_at != "report.html":
        request.getfixturevalue("no_pictures")
    steps, policy = sorted((finished_run / "checkpoints").glob("step-*/*")), [*(finished_run / "policy").iterdir()]
    written = {
        "base_sample.pt": [finished_run / "checkpoints" / "base_sample.pt"],
        "tensors.pt": steps,
        "samples.jsonl": [finished_run / name for name in ("samples.jsonl", "metrics.jsonl")],
        "model.safetensors": policy,
        "report.html": [finished_run / "report.html"],
    }
    # run.json is there twice for a moment: the old one and the new one.
    room, order = 2 * pages(finished_run / "run.json"), list(written)
    room += sum(pages(*written[name]) for name in order[: order.index(full_at)]) + pages(*written[full_at]) // 2
    disk, out = here / "disk", here / "disk" / "run"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root on Linux")
    try:
        answer = tiltlm("tune", "run.yaml", "--output-dir", out)
        assert_one_error(answer.err, ["space left on", "some space", "--resume"])
        assert (answer.code, answer.out) == (1, "")
        assert not [name for name in files_under(out) if "partial" in name or ".tmp" in name]

        subprocess.run(["mount", "-o", "remount,size=8M", str(disk)], check=True)
        answer = tiltlm("tune", "run.yaml", "--output-dir", out, "--resume")
        assert answer.code == 0, answer.err
        weights = "policy/model.safetensors"
        assert (out / weights).read_bytes() == (finished_run / weights).read_bytes()
    finally:
        subprocess.run(["umount", str(disk)], check=True)
