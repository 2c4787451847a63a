"""The run directory survives what happens to runs: kills, full disks, restarts, other people's files."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiltlm.errors import CheckpointError, RunExistsError, TiltError, UsageError
from tiltlm.estimation.estimate import Estimate
from tiltlm.runs import storage
from tiltlm.runs.directory import RUN_FIELDS, SCHEMA_VERSION, RunDirectory, git_commit, installed_versions


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "run", {"model": "embedded", "training": {"max_steps": 3}}, seed=5)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a write gets half of its bytes down and then finds the disk full."""

    def fill() -> None:
        write = os.write

        def half_then_full(descriptor: int, data: Any) -> int:
            if len(data) > 1:
                return write(descriptor, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(storage.os, "write", half_then_full)

    return fill


def test_create_records_what_made_the_run(run: RunDirectory) -> None:
    record = RunDirectory.open(run.path).read_run()
    assert set(record) <= set(RUN_FIELDS)
    assert record["schema_version"] == SCHEMA_VERSION
    assert (record["status"], record["error"], record["seed"]) == ("running", None, 5)
    assert record["config"] == {"model": "embedded", "training": {"max_steps": 3}}
    assert record["versions"]["python"] == sys.version.split()[0]


def test_create_refuses_a_directory_in_use_and_leaves_it(run: RunDirectory) -> None:
    before = run.run_path.read_bytes()
    with pytest.raises(RunExistsError, match=r"(?s)--resume.*--output-dir.*delete"):
        RunDirectory.create(run.path, {}, seed=0)
    assert run.run_path.read_bytes() == before


def test_create_takes_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert RunDirectory.create(tmp_path / "empty", {}, seed=0).run_path.is_file()


def test_create_takes_a_directory_in_which_a_run_was_killed_before_its_first_file(tmp_path: Path) -> None:
    left = tmp_path / ".run.json.4711.tmp"
    left.write_text('{"schema_ver')
    RunDirectory(tmp_path).check_free()
    assert left.exists()
    run = RunDirectory.create(tmp_path, {}, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert run.read_run()["status"] == "running"


@pytest.mark.parametrize("name", [".run.json.tmp", "run.json.4711.tmp", ".notes.4711.tmp", ".run.json.4711.tmp.txt"])
def test_a_file_that_only_looks_like_ours_is_someone_elses(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunExistsError, match="files that are not a run"):
        RunDirectory.create(tmp_path, {}, seed=0)
    assert (tmp_path / name).read_text() == "mine"


def test_overwrite_replaces_the_run_and_nothing_else(run: RunDirectory) -> None:
    run.append_metrics({"step": 1})
    run.write_samples([{"text": "a"}])
    for directory in (run.policy_dir, run.checkpoint_dir):
        directory.mkdir()
        (directory / "weights").write_text("old")
    notes = run.path / "notes.txt"
    notes.write_text("mine")
    RunDirectory.create(run.path, {"model": "other"}, seed=1, overwrite=True)
    assert run.read_run()["config"] == {"model": "other"}
    assert (run.read_metrics(), run.read_samples()) == ([], [])
    assert not run.policy_dir.exists()
    assert not run.checkpoint_dir.exists()
    assert notes.read_text() == "mine"


def test_overwrite_never_deletes_other_files(tmp_path: Path) -> None:
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "thesis.tex").write_text("years")
    with pytest.raises(RunExistsError, match="files that are not a run"):
        RunDirectory.create(tmp_path, {}, seed=0, overwrite=True)
    assert (tmp_path / "policy" / "thesis.tex").read_text() == "years"


def test_create_at_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make a directory"):
        RunDirectory.create(tmp_path / "file", {}, seed=0)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, UsageError, "no run.json"),
        ('{"schema_version": 1, "sta', CheckpointError, "broken"),
        ("[1, 2]", CheckpointError, "not a JSON object"),
        ("{}", CheckpointError, "not written by tiltlm"),
        ('{"schema_version": 99}', CheckpointError, "Upgrade tiltlm"),
    ],
)
def test_open_says_what_is_wrong(tmp_path: Path, content: str | None, error: type[TiltError], message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(error, match=message) as caught:
        RunDirectory.open(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_open_of_nothing_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        RunDirectory.open(tmp_path / "nowhere")


def test_status_goes_from_running_to_failed_to_done(run: RunDirectory) -> None:
    run.mark_failed(ValueError("moment out of reach"), seconds=2.5)
    record = run.read_run()
    assert (record["status"], record["seconds"]) == ("failed", 2.5)
    assert record["error"] == {"type": "ValueError", "message": "moment out of reach"}
    run.mark_running()
    assert (run.read_run()["status"], run.read_run()["error"]) == ("running", None)
    run.mark_interrupted(progress={"step": 2, "max_steps": 3})
    assert (run.read_run()["status"], run.read_run()["progress"]["step"]) == ("interrupted", 2)
    run.mark_done()
    assert (run.read_run()["status"], run.read_run()["seconds"]) == ("done", 2.5)


def test_unknown_fields_and_statuses_are_bugs(run: RunDirectory) -> None:
    with pytest.raises(AssertionError, match="secondz"):
        run.write_run(secondz=1.0)
    with pytest.raises(AssertionError, match="finished"):
        run.write_run(status="finished")


def test_numbers_of_every_kind_are_stored_as_json(run: RunDirectory) -> None:
    record = {
        "step": np.int64(1),
        "estimate": Estimate(0.5, math.inf),
        "nan": math.nan,
        "numpy": np.float32(0.25),
        "path": Path("a/b"),
        "list": (1, [math.inf]),
    }
    run.append_metrics(record)
    assert run.read_metrics() == [
        {
            "step": 1,
            "estimate": {"value": 0.5, "se": None},
            "nan": None,
            "numpy": 0.25,
            "path": "a/b",
            "list": [1, [None]],
        }
    ]
    with pytest.raises(TypeError, match="set"):
        run.append_metrics({"step": {1, 2}})


def test_any_text_comes_back_as_it_was(run: RunDirectory) -> None:
    texts = ["naïve – “quoted”\n\ttabs \\ and \x00", "line\u2028separator", "lone \ud83d surrogate", "漢字 🙂"]
    run.write_samples([{"model": "base", "text": text} for text in texts])
    assert [record["text"] for record in run.read_samples()] == texts
    assert "漢字".encode() in run.samples_path.read_bytes()


def test_a_half_written_line_is_dropped_and_the_next_one_is_whole(run: RunDirectory) -> None:
    run.append_metrics({"step": 1})
    run.append_metrics({"step": 2})
    with run.metrics_path.open("ab") as file:
        file.write(b'{"step": 3, "ses')
    assert [record["step"] for record in run.read_metrics()] == [1, 2]
    run.append_metrics({"step": 3})
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_an_error_with_its_number(run: RunDirectory) -> None:
    run.metrics_path.write_text('{"step": 1}\n{"step": oops}\n{"step": 3}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        run.read_metrics()


def test_truncate_keeps_the_steps_that_the_checkpoint_has(run: RunDirectory) -> None:
    run.truncate_metrics(after_step=0)
    for step in range(1, 6):
        run.append_metrics({"step": step})
    run.truncate_metrics(after_step=3)
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    run.append_metrics({"step": 4})
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4]


@pytest.mark.serial
def test_full_disk_loses_nothing_that_was_there(run: RunDirectory, full_disk: Callable[[], None]) -> None:
    run.append_metrics({"step": 1})
    run.write_samples([{"text": "kept"}])
    before = run.run_path.read_bytes()
    full_disk()
    with pytest.raises(CheckpointError, match=r"no space left .*metrics\.jsonl.*Nothing .*lost.*--resume"):
        run.append_metrics({"step": 2})
    with pytest.raises(CheckpointError, match=r"run\.json"):
        run.write_run(seconds=1.0)
    with pytest.raises(CheckpointError, match=r"samples\.jsonl"):
        run.write_samples([{"text": "new"}])
    assert run.metrics_path.read_bytes() == b'{"step": 1}\n'
    assert run.read_samples() == [{"text": "kept"}]
    assert run.run_path.read_bytes() == before
    assert not list(run.path.glob(".*.tmp"))


@pytest.mark.serial
def test_a_failure_on_a_full_disk_does_not_hide_the_first_error(
    run: RunDirectory, full_disk: Callable[[], None]
) -> None:
    full_disk()
    run.mark_failed(CheckpointError("no space left on the disk"))
    assert run.read_run()["status"] == "running"


@pytest.mark.serial
def test_a_run_killed_while_it_writes_stays_readable(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from tiltlm.runs.directory import RunDirectory\n"
        "run = RunDirectory.create(sys.argv[1], {}, seed=0)\n"
        "step = 0\n"
        "while True:\n"
        "    step += 1\n"
        "    run.append_metrics({'step': step, 'filler': 'x' * 20000})\n"
        "    run.write_run(progress={'step': step})\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        reached = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run = RunDirectory.open(tmp_path / "run")
    steps = [record["step"] for record in run.read_metrics()]
    assert steps == list(range(1, len(steps) + 1))
    assert run.read_run()["progress"]["step"] in (len(steps), len(steps) - 1)
    assert len(steps) >= reached


def test_a_reader_sees_the_whole_old_file_while_a_new_one_is_written(run: RunDirectory) -> None:
    before = run.run_path.read_bytes()
    with run.run_path.open("rb") as reader:
        run.write_run(seconds=99.0)
        assert reader.read() == before
    assert run.read_run()["seconds"] == 99.0


def test_git_commit_is_the_head_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    folder = tmp_path / "repository"
    folder.mkdir()
    assert git_commit(folder) is None
    identity = [
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "core.hooksPath=/dev/null",
    ]
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    assert git_commit(folder) is None
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "first"], cwd=folder, check=True)
    log = subprocess.run(["git", "log", "--format=%H"], cwd=folder, capture_output=True, text=True, check=True)
    assert git_commit(folder) == log.stdout.strip()
    monkeypatch.setenv("PATH", "")
    assert git_commit(folder) is None


def test_versions_are_those_that_run() -> None:
    import tiltlm

    versions = installed_versions()
    assert versions["tiltlm"] == tiltlm.__version__
    assert versions["numpy"] == np.__version__


def test_run_json_can_be_read_by_a_person(run: RunDirectory) -> None:
    text = run.run_path.read_text()
    assert json.loads(text) == run.read_run()
    assert '\n  "seed": 5,\n' in text
