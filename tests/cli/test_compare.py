"""`tiltlm compare`: study files, whole small studies, and runs that exist already."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from command_line import Command, assert_one_error, write_config
from tiltlm.config.study import load_study
from tiltlm.study.grid import expand

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
FEMALE = {"constraints": [{"feature": {"pronouns": "female"}, "moment": 0.5}], "samples": 64}


@pytest.fixture
def study(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A study file that takes seconds."""
    training = {"batch_size": 32, "learning_rate": 0.002, "save_steps": 1}
    shared = {"model": settings["model"], "training": training, "max_completion_length": 12, "device": "cpu"}
    return {
        "title": "Small <script>alert(1)</script> study",
        "sequences": 128,
        "seeds": 1,
        "shared": {**shared, "evaluation": {"samples": 32, "top_p": 0.9, "texts": 2}},
        "reference": {"samples": 128},
        "curve": {"points": 1, "samples": 16, "reference": 32},
        "tasks": {"female": {"label": "half <b>female</b> & 50%", "target": FEMALE}},
        "methods": {"gdc++": {"method": "gdc++"}},
    }


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_this_repository_can_be_run(tiltlm: Command, path: Path) -> None:
    answer = tiltlm("compare", path, "--dry-run")
    assert answer.code == 0, answer.err
    grid = expand(load_study(path), strict=False)
    assert f"{len(grid.runs)} runs" in answer.out
    assert all(task in answer.out for task in grid.study.tasks)
    assert "time: unknown" in answer.out
    assert all(run.sequences <= (grid.study.tasks[run.task].sequences or grid.study.sequences) for run in grid.runs)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"task": {}}, ["unknown key 'task'", "did you mean 'tasks'"]),
        ({"tasks": {}}, ["tasks", "at least 1"]),
        ({"tasks": {"a/b": {"target": FEMALE}}}, ["tasks.a/b", "becomes a folder"]),
        ({"tasks": {"A": {"target": FEMALE}, "a": {"target": FEMALE}}}, ["differs from it in case only"]),
        ({"tasks": {"x": {"target": FEMALE, "labl": "y"}}}, ["unknown key 'tasks.x.labl'", "did you mean 'label'"]),
        ({"tasks": {"x": {"target": {"constrains": []}}}}, ["tasks.x", "target.constrains", "constraints"]),
        ({"methods": {"m": {"method": "gdcc"}}}, ["methods.m", "gdcc", "did you mean 'gdc'"]),
        ({"methods": {"m": {"method": "gdc", "tasks": ["femal"]}}}, ["methods.m.tasks", "femal", "female"]),
        ({"methods": {"m": {"method": "gdc", "training": {"batch_sise": 1}}}}, ["methods.m", "training.batch_sise"]),
        ({"methods": {"m": {"method": "gdc", "training": {"max_steps": 1}}}}, ["max_steps", "follows from sequences"]),
        ({"methods": {"m": {"method": "gdc", "batch_sizes": [8, 8]}}}, ["batch_sizes", "none twice"]),
        ({"shared": {"model": "embedded", "seed": 1}}, ["shared.seed", "give seeds"]),
        ({"shared": {"modell": "embedded"}}, ["shared.modell", "did you mean 'model'"]),
        ({"shared": {}}, ["tasks.female", "'model' is missing"]),
        ({"sequences": 60}, ["60 sequences leaves no step", "raise sequences"]),
        ({"sequences": True}, ["sequences: must be a number"]),
        ({"seeds": [1, 1]}, ["seeds", "none twice"]),
        ({"reference": {"proposal": "guide"}}, ["reference.proposal", "did you mean 'guided'"]),
        ({"curve": {"points": -1}}, ["curve.points", "greater than or equal to 0"]),
    ],
)
def test_a_bad_study_file_is_explained(
    tiltlm: Command, here: Path, study: dict[str, Any], change: dict[str, Any], said: list[str]
) -> None:
    write_config(here / "study.yaml", {**study, "title": "x", **change})
    answer = tiltlm("compare", "study.yaml", "--dry-run")
    assert answer.code == 2
    assert_one_error(answer.err, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere.yaml",), ["nowhere.yaml", "does not exist"]),
        (("empty",), ["'empty' is no study", "no run"]),
        (("empty", "other.yaml"), ["other.yaml", "only directories"]),
        (("empty", "--dry-run"), ["--dry-run", "study file"]),
        (("run.yaml", "seeds"), ["'seeds'", "key=value"]),
    ],
)
def test_a_wrong_source_is_explained(tiltlm: Command, here: Path, words: tuple[str, ...], said: list[str]) -> None:
    (here / "empty").mkdir()
    answer = tiltlm("compare", *words)
    assert answer.code == 2
    assert_one_error(answer.err, said)


def test_a_small_study_from_end_to_end(tiltlm: Command, here: Path, study: dict[str, Any]) -> None:
    never = {"constraints": [{"feature": {"length": "words"}, "moment": 500.0}], "samples": 64}
    write_config(here / "study.yaml", study | {"tasks": {**study["tasks"], "never": {"target": never}}})
    folder = here / "runs" / "study"

    # A part of the study can be run first.
    nothing = tiltlm("compare", "study.yaml", "--only", "femal/*")
    assert nothing.code == 2
    assert_one_error(nothing.err, ["--only 'femal/*'", "TASK/METHOD/seed-N", "female/gdc++/seed-0"])
    assert tiltlm("compare", "study.yaml", "--only", "female/*").code == 0
    record = json.loads((folder / "study.json").read_text())
    assert {run["task"]: run["status"] for run in record["runs"]} == {"female": "done", "never": "waiting"}
    assert not (folder / "references" / "never").exists()
    done = (folder / "runs/female/gdc++/seed-0/run.json").stat().st_mtime_ns
    answer = tiltlm("compare", "study.yaml", "--jobs", 2)
    assert done == (folder / "runs/female/gdc++/seed-0/run.json").stat().st_mtime_ns

    # A target that cannot be reached is reported, and stops no other task.
    assert answer.code == 1
    assert "1 of 2 runs failed" in answer.err
    assert "moment 500" in answer.err
    record = json.loads((folder / "study.json").read_text())
    assert {run["task"]: run["status"] for run in record["runs"]} == {"female": "done", "never": "failed"}
    assert "moment 500" in record["runs"][1]["error"]

    rows = rows_of(folder)
    assert list(rows[0]) == ["task", "method", "seed", "sequences", "forward_passes", "metric", "value", "se"]
    kl = [row for row in rows if row["metric"] == "kl_p_pi"]
    assert [row["sequences"] for row in kl] == ["0", "64", "64", "128"]
    # Self-BLEU of 16 texts during the run cannot be compared with that of 32 at both ends.
    assert [row["sequences"] for row in rows if row["metric"] == "self_bleu_5"] == ["0", "64", "128"]
    run = json.loads((folder / "runs/female/gdc++/seed-0/run.json").read_text())
    reference = json.loads((folder / "references/female/reference.json").read_text())
    assert run["target"] == reference["target"]
    assert float(kl[0]["value"]) == pytest.approx(reference["kl_p_a"]["value"])
    assert run["progress"]["sequences"] == 128
    last = {row["metric"]: float(row["value"]) for row in rows if row["sequences"] == "128" and row["value"]}
    assert last["kl_p_pi"] != run["evaluation"]["policy"]["kl_p_pi"]["value"]
    assert last["moment:female"] == pytest.approx(run["evaluation"]["policy"]["moments"]["female"]["value"])
    assert last["self_bleu_5_top_p"] == pytest.approx(run["evaluation"]["policy"]["top_p"]["self_bleu_5"]["value"])
    assert last["moment_error"] == pytest.approx(abs(last["moment:female"] - 0.5))

    assert not list((folder / "runs").rglob("step-*"))

    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "half &lt;b&gt;female&lt;/b&gt; &amp; 50%" in page
    assert page.count("data:image/svg+xml;base64,") >= 6
    assert "on the first 32 texts of the reference, at the end on up to 128." in page
    assert "https://" not in page.split("<pre>")[0].replace("http://www.w3.org", "")
    assert r"half \textless{}b\textgreater{}female" in (folder / "tables.tex").read_text()
    assert "half &lt;b&gt;female" in (folder / "tables.md").read_text()
    for form in ("pdf", "svg", "png"):
        assert (folder / "figures" / f"kl_p_pi.{form}").stat().st_size > 1000

    # No run is repeated, and the dry run estimates the time of the others.
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}
    dry = tiltlm("compare", "study.yaml", "--dry-run", "seeds=3")
    assert "1 runs are done; the other 5 take about" in dry.out
    dry = tiltlm("compare", "study.yaml", "--dry-run", "seeds=3", "--only", "*/seed-1", "--only", "female/*")
    assert "1 runs are done; the other 3 that match take about" in dry.out
    assert "all runs that match are done" in tiltlm("compare", "study.yaml", "--dry-run", "--only", "female/*").out
    write_config(here / "study.yaml", study)
    again = tiltlm("compare", "study.yaml")
    assert again.code == 0, again.err
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}

    curve = folder / "runs/female/gdc++/seed-0/curve.jsonl"
    curve.write_text(curve.read_text().replace('"samples": 16', '"samples": 32'))
    assert tiltlm("compare", folder).code == 0
    assert sum(row["metric"] == "self_bleu_5" for row in rows_of(folder)) == 4

    # Other settings for an existing run are refused.
    changed = tiltlm("compare", "study.yaml", "methods.gdc++.training.learning_rate=0.1")
    assert changed.code == 1
    assert "training.learning_rate was 0.002 and is 0.1" in changed.err

    # Results can be written again from the runs on disk.
    (folder / "report.html").unlink()
    assert tiltlm("compare", folder).code == 0
    assert (folder / "report.html").exists()

    # A finished run without its tuned model is not repeated.
    shutil.rmtree(folder / "runs/female/gdc++/seed-0/policy")
    assert tiltlm("compare", "study.yaml").code == 0
    assert not (folder / "runs/female/gdc++/seed-0/policy").exists()
    # The rows in results.csv replace a run whose directory is missing, as on another machine.
    whole = {name: (folder / name).read_bytes() for name in ("results.csv", "tables.md", "tables.tex")}
    shutil.rmtree(folder / "runs")
    (folder / "references/female/sample.pt").unlink()
    elsewhere = tiltlm("compare", "study.yaml")
    assert elsewhere.code == 0, elsewhere.err
    assert not (folder / "runs").exists()
    # The time of runs done on another machine is unknown.
    record = json.loads((folder / "study.json").read_text())
    record["runs"][0]["seconds"] = None
    (folder / "study.json").write_text(json.dumps(record))
    dry = tiltlm("compare", "study.yaml", "--dry-run", "seeds=2")
    assert "1 runs are done; time: unknown" in dry.out
    assert whole == {name: (folder / name).read_bytes() for name in whole}
    # The rows are neither lost nor mixed with other settings.
    lost = tiltlm("compare", "study.yaml", "seeds=[1]")
    assert lost.code == 2
    assert_one_error(lost.err, ["female/gdc++/seed-0", "would lose"])
    other = tiltlm("compare", "study.yaml", "methods.gdc++.training.learning_rate=0.1")
    assert other.code == 2
    assert_one_error(other.err, ["female/gdc++/seed-0", "other settings"])
    assert whole["results.csv"] == (folder / "results.csv").read_bytes()
    # This holds also if the task's reference cannot be drawn for a further seed.
    (folder / "references/female/reference.json").write_text('{"key": "another"}')
    failed = tiltlm("compare", "study.yaml", "seeds=2")
    assert failed.code == 1, failed.err
    assert whole["results.csv"] == (folder / "results.csv").read_bytes()


def test_runs_that_exist_are_compared(tiltlm: Command, finished: Path) -> None:
    other = shutil.copytree(finished, finished.parent / "other")
    record = json.loads((other / "run.json").read_text())
    record["seed"], record["config"]["training"]["learning_rate"] = 1, 0.004
    record["config"]["seed"] = 1
    (other / "run.json").write_text(json.dumps(record))
    answer = tiltlm("compare", finished, other, "--output-dir", "both")
    assert answer.code == 0, answer.err
    rows = rows_of(Path("both"))
    assert {(row["method"], row["seed"]) for row in rows} == {
        ("kept_guide (learning_rate=0.002)", "0"),
        ("kept_guide (learning_rate=0.004)", "1"),
    }
    end = [row for row in rows if row["metric"] == "kl_p_pi" and row["seed"] == "0"][-1]
    assert float(end["value"]) == pytest.approx(record["evaluation"]["policy"]["kl_p_pi"]["value"])
    assert "each on the samples of its own evaluation; lower" in (Path("both") / "tables.md").read_text()

    twice = tiltlm("compare", finished, finished)
    assert twice.code == 2
    assert_one_error(twice.err, ["same task, method and seed"])


@pytest.mark.slow
def test_a_study_that_was_killed_and_resumed_gives_the_same_tables(here: Path, study: dict[str, Any]) -> None:
    study |= {"seeds": 2, "sequences": 256, "methods": {"gdc++": {"method": "gdc++"}, "ppo": {"method": "ppo"}}}
    write_config(here / "study.yaml", study)
    command = [sys.executable, "-m", "tiltlm", "compare", "study.yaml", "--jobs", "2", "--output-dir"]
    environment = {**os.environ, "PYTHONPATH": str(here)}
    subprocess.run([*command, "whole"], check=True, env=environment, capture_output=True)

    chance = random.Random()
    ends = []
    for stop in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, None):
        process = subprocess.Popen([*command, "killed"], env=environment, stderr=subprocess.PIPE, text=True)
        if stop is not None:
            time.sleep(chance.uniform(6, 16))
            process.send_signal(stop)
        _, said = process.communicate()
        ends.append(process.returncode)
        if stop == signal.SIGKILL:
            # Its worker processes notice, and stop after their current step.
            wait_until(lambda: not is_locked(here / "killed" / ".lock"))
    assert ends[-1] == 0, (ends, said)
    for name in ("results.csv", "tables.md", "tables.tex"):
        assert (here / "killed" / name).read_bytes() == (here / "whole" / name).read_bytes(), (name, ends)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_task_of_the_papers_study_runs_on_a_gpt2_of_the_same_shape(tiltlm: Command, here: Path) -> None:
    """Ten steps and one check of the proposal, with fewer and shorter texts and random weights."""
    study = yaml.safe_load((Path(__file__).parents[2] / "studies" / "paper.yaml").read_text())
    task = study["tasks"]["female"]
    task["model"] = str(save_random_gpt2(here / "gpt2"))
    task["target"]["samples"] = 128
    study |= {"tasks": {"female": task}, "sequences": 128 + 10 * 8 + 10 * 8, "seeds": 1}
    study |= {"reference": {"samples": 128, "proposal": "base"}}
    study |= {"curve": {"points": 1, "samples": 16, "reference": 32}}
    study["shared"]["training"]["batch_size"] = 8
    study["shared"]["evaluation"]["samples"] = 32
    study["shared"]["max_completion_length"] = 12
    # PPO and REINFORCE are for filters alone, as in the paper.
    study["methods"] = {name: one for name, one in study["methods"].items() if "tasks" not in one}
    write_config(here / "paper.yaml", study)
    answer = tiltlm("compare", "paper.yaml", "--only", "*/gdc++/*", "--output-dir", "paper")
    assert answer.code == 0, answer.err
    run = json.loads((here / "paper/runs/female/gdc++/seed-0/run.json").read_text())
    assert run["progress"]["step"] == 10
    assert run["progress"]["sequences"] == study["sequences"]
    ends = {row["metric"]: float(row["value"]) for row in rows_of(here / "paper") if row["value"]}
    assert {"kl_p_pi", "kl_pi_a", "moment:female", "self_bleu_5", "self_bleu_5_top_p"} <= set(ends)


def save_random_gpt2(folder: Path) -> Path:
    """GPT-2 small with random weights and 50,257 words as tokens; one in fifty has the word she, one he."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    config = GPT2Config(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    said = {1: "she ", 2: "he "}
    vocabulary = {"<end>": 0} | {f"{said.get(i % 50, '')}w{i}": i for i in range(1, config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<end>", eos_token="<end>", pad_token="<end>", unk_token="<end>"
    ).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def is_locked(path: Path) -> bool:
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
