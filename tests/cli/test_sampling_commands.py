"""`tiltlm sample --sampler`: texts of a target without tuning, after a forecast."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Answer, Command, assert_one_error, files_under, write_config
from tiltlm.sampling import Draws, TargetProposal

QUICK = ("--pilot", 256, "--device", "cpu")
SEEDED = (*QUICK, "--seed", 0)
NUMBER = r"(< )?\d[\d.e-]*( ± \d[\d.e-]*)?"


def rows_of(answer: Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer.err
    return [json.loads(line) for line in answer.out.splitlines()]


@pytest.mark.parametrize(
    ("sampler", "words", "said"),
    [
        ("rejection", (), r"^rejection: exact draws of p from the base, where log P/q is at most \d"),
        ("qrs", ("--proposal", "policy"), r"^qrs: draws of the policy, accepted with .* log β = \d"),
        ("qrs", ("--proposal", "base", "--log-beta", 0.5), r"^qrs: draws of the base.* log β = 0\.5$"),
        ("qrs", ("--proposal", "base", "--acceptance", 0.8), r"^acceptance +0\.800"),
        ("resample", ("--oversample", 4), r"4 draws for each text and at least 256 in a pool$"),
        ("mcmc", ("--chains", 2, "--burn-in", 9, "--thin", 3), r"up to 2 chains .* 9 steps of burn-in, 3 steps from"),
        ("guided", (), r"^guided: all draws of the guided base$"),
    ],
)
def test_texts_follow_their_forecast(
    tiltlm: Command, here: Path, finished: Path, sampler: str, words: tuple[Any, ...], said: str
) -> None:
    before = files_under(here)
    command = ("sample", "runs/done", "--sampler", sampler, "-n", 12, *SEEDED, *words)
    answer = tiltlm(*command)
    assert answer.code == 0, answer.err
    assert len(answer.out.splitlines()) == 12
    assert re.search(said, answer.err, re.MULTILINE), answer.err
    for figure in ("KL(p‖·), nats", "TV(p, ·)"):
        assert re.search(rf"^{re.escape(figure)} +{NUMBER} +{NUMBER} *$", answer.err, re.MULTILINE), answer.err
    for figure, shape in (
        ("acceptance", NUMBER),
        ("draws for 12 texts", r"about [\d,]+"),
        ("ESS of 256 pilot draws", NUMBER),
    ):
        assert re.search(rf"^{figure} +{shape} *$", answer.err, re.MULTILINE), answer.err
    assert re.search(r"^12 texts from [\d,]+ draws$", answer.err, re.MULTILINE)
    assert "\x1b" not in answer.out + answer.err
    assert tiltlm(*command).out == answer.out
    assert files_under(here) == before


def test_lines_of_json_have_log_weights(tiltlm: Command, finished: Path) -> None:
    rows = rows_of(tiltlm("sample", "runs/done", "--sampler", "rejection", "-n", 200, "--jsonl", *SEEDED))
    fitted = json.loads((finished / "run.json").read_text())["target"]["features"][0]["coefficient"]["value"]
    women = 0
    for row in rows:
        assert set(row) == {"prompt", "text", "logprob", "tokens", "log_weight"}
        words = row["text"].split()
        female = sum(word in ("she", "her") for word in words) > sum(word in ("he", "him") for word in words)
        assert row["log_weight"] == pytest.approx(fitted if female else 0.0, abs=1e-5)
        women += female
    assert women / 200 == pytest.approx(0.5, abs=0.15)
    # A regex has no automaton, so guided texts may lie outside of the support; JSON has null for their log-weight.
    config = (
        "target.constraints.0.feature={regex: she}",
        "target.constraints.0.moment=1.0",
        "--sampler",
        "guided",
        "-n",
        100,
        "--jsonl",
        *SEEDED,
    )
    weights = [row["log_weight"] for row in rows_of(tiltlm("sample", "run.yaml", *config))]
    assert None in weights
    assert all(weight is None or math.isfinite(weight) for weight in weights)


def test_a_config_that_was_never_tuned_is_enough(tiltlm: Command, here: Path) -> None:
    before = files_under(here)
    answer = tiltlm("sample", "run.yaml", "target.samples=300", "--sampler", "guided", "-n", 3, *SEEDED)
    assert answer.code == 0, answer.err
    assert answer.err.splitlines()[0] == "sampling the base …"
    assert len(answer.out.splitlines()) == 3
    assert files_under(here) == before
    # As a filter, all of the texts are about women.
    words = ("target.constraints.0.moment=1.0", "--sampler", "rejection", "-n", 5, *SEEDED)
    texts = tiltlm("sample", "run.yaml", *words).out.splitlines()
    assert len(texts) == 5
    assert all("she" in text.split() or "her" in text.split() for text in texts)
    answer = tiltlm("sample", "run.yaml", "--sampler", "mcmc", "-n", 3, *SEEDED)
    assert "draws of the guided base" in answer.err


def test_the_chosen_proposal_is_printed(tiltlm: Command, finished: Path) -> None:
    answer = tiltlm("sample", "runs/done", "--sampler", "mcmc", "-n", 2, *SEEDED)
    said = r"^note: draws come from the (guided base|policy): the ESS of 256 trial draws is"
    assert re.search(said, answer.err, re.MULTILINE)


def test_prompts_are_those_of_the_run_or_the_given_one(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    write_config(here / "asked.yaml", settings | {"prompts": ["she", "the team", "he was"]})
    command = ("sample", "asked.yaml", "--sampler", "mcmc", "-n", 6, "--jsonl", *SEEDED)
    rows = rows_of(tiltlm(*command))
    assert sorted(row["prompt"] for row in rows) == ["he was", "he was", "she", "she", "the team", "the team"]
    assert {row["prompt"] for row in rows_of(tiltlm(*command, "--prompt", "old"))} == {"old"}
    answer = tiltlm("sample", "asked.yaml", "--sampler", "mcmc", "-n", 6, *SEEDED)
    assert re.search(r"^prompts of the pilot +3 *$", answer.err, re.MULTILINE)
    assert all(line.startswith(("she", "the team", "he was")) for line in answer.out.splitlines())
    assert all(row["tokens"] <= 3 for row in rows_of(tiltlm(*command, "--max-completion-length", 3)))


def test_a_run_with_an_adapter(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    write_config(here / "lora.yaml", settings | {"peft": {"r": 2}})
    assert tiltlm("tune", "lora.yaml", "training.max_steps=2").code == 0
    for source in ("base", "guided", "policy"):
        answer = tiltlm("sample", "runs/lora", "--sampler", "qrs", "--proposal", source, "-n", 4, *SEEDED)
        assert len(answer.out.splitlines()) == 4, answer.err


def test_the_curve_as_table_and_figure(tiltlm: Command, here: Path, finished: Path) -> None:
    command = ("sample", "runs/done", "--sampler", "qrs", "--proposal", "policy", "-n", 1, *SEEDED, "--qrs-curve")
    answer = tiltlm(*command, "curve.png")
    assert answer.code == 0, answer.err
    assert re.search(r"^wrote curve\.png\nwrote curve\.csv$", answer.err, re.MULTILINE)
    assert (here / "curve.png").read_bytes().startswith(b"\x89PNG")
    with (here / "curve.csv").open() as file:
        table = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert list(table[0]) == ["log_beta", "acceptance", "acceptance_se", "kl", "kl_se", "tv", "tv_se"]
    for before, after in itertools.pairwise(table):
        assert before["log_beta"] < after["log_beta"]
        assert before["acceptance"] > after["acceptance"]
        assert before["kl"] > after["kl"]
    assert table[-1]["kl"] == pytest.approx(0, abs=1e-9)
    # The β of a row gives the acceptance rate of the row.
    row = table[len(table) // 2]
    exact = tiltlm("sample", "runs/done", "--sampler", "qrs", "--proposal", "policy", "-n", 1, *SEEDED,
                   "--log-beta", row["log_beta"])  # fmt: skip
    shown = re.search(r"^acceptance +([\d.]+)", exact.err, re.MULTILINE)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(row["acceptance"], abs=0.002)
    assert tiltlm(*command, "only.csv").code == 0
    assert tiltlm(*command, "drawn.svg").code == 0
    names = {path.name for path in here.iterdir() if path.is_file()}
    assert names == {"run.yaml", "curve.png", "curve.csv", "only.csv", "drawn.svg", "drawn.csv"}
    assert "<svg" in (here / "drawn.svg").read_text()


def test_too_few_accepted_draws_are_an_error_with_a_count(tiltlm: Command, finished: Path) -> None:
    answer = tiltlm("sample", "runs/done", "--sampler", "rejection", "-n", 400, "--max-draws", 500, *SEEDED)
    assert answer.code == 1
    assert answer.out == ""
    assert_one_error(answer.err, ["max_draws", "500 draws", "400 texts take about"])
    # The forecast was printed before.
    assert "KL(p‖·)" in answer.err
    never = ("target.constraints=[{feature: {contains: her her her}, moment: 0.5}]",)
    assert tiltlm("sample", "run.yaml", *never, "--sampler", "qrs", *SEEDED).code == 1


def test_ctrl_c_keeps_the_texts_found_so_far(tiltlm: Command, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, calls = TargetProposal.draw, []

    def until_stopped(self: TargetProposal, n: int, places: Any, generator: torch.Generator) -> Draws:
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(self, n, places, generator)

    monkeypatch.setattr(TargetProposal, "draw", until_stopped)
    answer = tiltlm("sample", "runs/done", "--sampler", "rejection", "-n", 900, *SEEDED)
    assert answer.code == 130
    found = len(answer.out.splitlines())
    assert 0 < found < 900
    assert f"stopped: {found} of 900 texts from {sum(calls[:2]):,} draws" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("runs/done", "--sampler", "rejct"), ["sampler: 'rejct'", "did you mean 'rejection'"]),
        (("runs/done", "--sampler", "qrs", "--proposal", "polcy"), ["proposal: 'polcy'", "did you mean 'policy'"]),
        (("run.yaml", "--sampler", "qrs", "--proposal", "policy"), ["no tuned policy"]),
        (("runs/done", "--sampler", "rejection", "--proposal", "guided"), ["of the base, not of the guided base"]),
        (("runs/done", "--sampler", "mcmc", "--acceptance", 0.5), ["acceptance: a setting of qrs, not of mcmc"]),
        (("runs/done", "--sampler", "qrs", "--acceptance", 0.5, "--log-beta", 1), ["give one of them"]),
        (("runs/done", "--sampler", "qrs", "--top-p", 0.9), ["--top-p", "does not go with --sampler"]),
        (("runs/done", "--sampler", "mcmc", "--thin", 0), ["thin: 0"]),
        (("runs/done", "--thin", 3), ["--thin: needs --sampler"]),
        (("runs/done", "--log-beta", 0), ["--log-beta: needs --sampler"]),
        (("runs/done", "seed=3"), ["'seed=3'", "config"]),
        (("runs/done", "seed=3", "--sampler", "qrs"), ["'seed=3'", "'runs/done' is a run"]),
        (("MODEL", "--sampler", "qrs"), ["'MODEL' is a model, which has no target"]),
        (("run.yaml",), ["'run.yaml' is a file", "--sampler"]),
        (("run.yaml", "sed=3", "--sampler", "qrs"), ["unknown key 'sed'"]),
        (("runs/done", "--sampler", "mcmc", "--qrs-curve", "c.png"), ["--qrs-curve: needs --sampler qrs"]),
        (("runs/done", "--sampler", "qrs", "--qrs-curve", "c.pdf"), ["'c.pdf'", ".csv, .png or .svg"]),
        (("runs/done", "--sampler", "qrs", "--qrs-curve", "no/c.csv"), ["no folder 'no'"]),
        (("runs/bare", "--sampler", "guided"), ["samples that the target was fitted on", "not there"]),
        (("runs/young", "--sampler", "qrs"), ["no tuned model", "--resume"]),
        (("runs/done", "--sampler", "qrs", "--pilot", 1), ["--pilot", "2"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_wrong_command_changes_nothing(
    tiltlm: Command, here: Path, finished: Path, tiny: Path, words: tuple[Any, ...], said: list[str]
) -> None:
    shutil.copytree(tiny, here / "MODEL")
    shutil.copytree(finished, here / "runs" / "bare", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(finished, here / "runs" / "young", ignore=shutil.ignore_patterns("policy"))
    before = files_under(here)
    answer = tiltlm("sample", *words, "--device", "cpu")
    assert_one_error(answer.err, said)
    assert (answer.code, answer.out) == (2, "")
    assert files_under(here) == before
