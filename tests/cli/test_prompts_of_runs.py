"""Runs with prompts from files: features read their columns, and held-out prompts are never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiltlm as package
from command_line import Command, assert_one_error, write_config
from tiltlm.app.prompts import read_prompts
from tiltlm.config.run import load_config
from tiltlm.training.drawer import Drawer

MEASURES = """
seen = []

def holds_word(prompts, completions, word, **columns):
    seen.extend(prompts)
    return [float(w in text.split()) for w, text in zip(word, completions)]
"""
ROWS = [
    {"prompt": f"{who} {what}", "word": word}
    for who in ("she", "he", "the team", "a game", "her team")
    for what, word in (("is", "good"), ("wins", "the"))
]


@pytest.fixture
def held(here: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A run with ten prompts in a file, three of which are held out, and a feature that reads their column."""
    (here / "measures.py").write_text(MEASURES)
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    changed = settings | {
        "prompts": {"path": "rows.jsonl", "held_out": 0.3},
        "target": {
            "constraints": [
                {"feature": {"python": "measures:holds_word", "binary": True}, "moment": 0.5, "name": "its word"}
            ],
            "samples": 400,
        },
        "training": {**settings["training"], "samples_per_prompt": 4},
    }
    write_config(here / "run.yaml", changed)
    return changed


def test_a_run_trains_on_some_prompts_and_is_evaluated_on_the_others(
    tiltlm: Command, here: Path, held: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = read_prompts(load_config("run.yaml"))
    assert split.training is not None
    assert split.held_out is not None
    assert len(split.held_out) == 3
    assert {*split.training.prompts, *split.held_out.prompts} == {row["prompt"] for row in ROWS}
    trained: set[str | None] = set()
    original = Drawer.next

    def noted(self: Drawer, *arguments: Any) -> Any:
        batch = original(self, *arguments)
        trained.update(batch.samples.prompt_texts)
        return batch

    monkeypatch.setattr(Drawer, "next", noted)
    answer = tiltlm("tune", "run.yaml", "--output-dir", "out", "training.reuse_fit_samples=false")
    assert answer.code == 0, answer.err
    assert trained == set(split.training.prompts)

    record = json.loads((here / "out" / "run.json").read_text())
    for model in ("base", "policy"):
        evaluation = record["evaluation"][model]
        assert (evaluation["prompts"], evaluation["prompts_from"], evaluation["samples"]) == (3, "held out", 64)
        assert {one["prompt"] for one in evaluation["per_prompt"]} == set(split.held_out.prompts)
    texts = [json.loads(line) for line in (here / "out" / "samples.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in texts} <= set(split.held_out.prompts)
    html = (here / "out" / "report.html").read_text()
    assert "64 fresh samples on 3 held-out prompts" in html
    assert "Prompt by prompt" in html
    assert all(str(prompt) in html for prompt in split.held_out.prompts)
    assert "on 3 held-out prompts" in (here / "out" / "policy" / "README.md").read_text()

    # The same split, read from the record of the run.
    answer = tiltlm("eval", "out", "--samples", 30, "--device", "cpu", "--json")
    found = json.loads(answer.out)
    assert (found["prompts"], found["prompts_from"]) == (3, "held out")
    assert {one["prompt"] for one in found["per_prompt"]} == set(split.held_out.prompts)


def test_eval_takes_other_prompts(tiltlm: Command, here: Path, held: dict[str, Any], tiny: Path) -> None:
    assert tiltlm("tune", "run.yaml", "--output-dir", "out").code == 0
    (here / "others.csv").write_text("prompt,word\nold game,is\nbad team,was\nhim,a\nher game,the\n")
    answer = tiltlm("eval", "out", "--samples", 40, "--device", "cpu", "--prompts", "others.csv", "--json")
    found = json.loads(answer.out)
    assert (found["prompts"], found["prompts_from"]) == (4, "others.csv")
    assert [one["prompt"] for one in found["per_prompt"]] == ["old game", "bad team", "him", "her game"]
    shown = tiltlm("eval", "out", "--samples", 40, "--device", "cpu", "--prompts", "others.csv")
    assert "40 on 4 prompts of others.csv" in shown.out
    alone = tiltlm("eval", tiny, "--samples", 20, "--device", "cpu", "--prompts", "others.csv", "--json")
    assert json.loads(alone.out)["prompts"] == 4
    assert json.loads(tiltlm("eval", tiny, "--samples", 20, "--device", "cpu", "--json").out)["prompts_from"] == "none"
    missing = tiltlm("eval", "out", "--device", "cpu", "--prompts", "none.csv")
    assert_one_error(missing.err, ["prompts", "none.csv", "No such file"])
    one = tiltlm("eval", "out", "--device", "cpu", "--samples", 20, "--prompts", "the team")
    assert_one_error(one.err, ["'word'", "not available"])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"path": "rows.jsonl", "held_out": 1.5}, ["held_out: 1.5", "between 0 and 1"]),
        ({"path": "rows.jsonl", "held_out": 0.01}, ["prompts.held_out", "0.01 of 10 prompts are 0"]),
        ({"path": "rows.jsonl", "held_out": 0.999}, ["prompts.held_out", "are 10"]),
        ({"path": "rows.jsonl", "held_out": "none.jsonl"}, ["none.jsonl", "No such file"]),
        ({"rows": ["a"], "path": "rows.jsonl"}, ["path", "dataset", "rows"]),
    ],
)
def test_an_impossible_split_is_refused_before_any_work(
    tiltlm: Command, here: Path, held: dict[str, Any], prompts: dict[str, Any], said: list[str]
) -> None:
    write_config(here / "run.yaml", held | {"prompts": prompts})
    answer = tiltlm("tune", "run.yaml")
    assert_one_error(answer.err, said)
    assert answer.code == 2
    assert "sampling" not in answer.err


def test_a_held_out_prompt_that_is_too_long_is_refused_before_training(
    tiltlm: Command, here: Path, held: dict[str, Any]
) -> None:
    long = [{"prompt": "he", "word": "a"}, {"prompt": "she " * 60, "word": "a"}]
    write_config(here / "run.yaml", held | {"prompts": {"path": "rows.jsonl", "held_out": long}})
    answer = tiltlm("tune", "run.yaml", "--output-dir", "out")
    assert_one_error(answer.err, ["prompt 2", "she she", "60", "64 positions"])
    assert "step" not in answer.err


@pytest.mark.parametrize("other", [7, 0])
def test_samples_per_prompt_must_divide_the_batch(
    tiltlm: Command, here: Path, held: dict[str, Any], other: int
) -> None:
    answer = tiltlm("tune", "run.yaml", f"training.samples_per_prompt={other}")
    said = ["samples_per_prompt", "7 does not divide batch_size 32"] if other else ["training.samples_per_prompt", "0"]
    assert_one_error(answer.err, said)


def test_held_out_prompts_given_in_python(tiny: Path, here: Path, tiltlm: Command, no_pictures: None) -> None:
    base = package.LanguageModel.from_pretrained(tiny, device="cpu")
    prompts = base.encode_prompts(["she", "he", "the team"], {"word": ["wins", "is", "a"]})
    (here / "measures.py").write_text(MEASURES)
    from tiltlm.features import build_feature

    feature = build_feature({"python": "measures:holds_word", "binary": True}).renamed("its word")
    target = package.constrain(
        base, {feature: 0.4}, samples=300, prompts=prompts, samples_per_prompt=5, max_completion_length=10
    )
    held_out = [{"prompt": "her game", "word": "good"}, {"prompt": "him", "word": "old"}]
    run = package.tune(
        base, target, output_dir="py", max_steps=2, batch_size=20, evaluation_samples=40, held_out=held_out
    )
    record = run.directory.read_run()
    assert record["config"]["prompts"]["held_out"] == held_out
    assert [row["word"] for row in record["config"]["prompts"]["rows"]] == ["wins", "is", "a"]
    assert [one["prompt"] for one in record["evaluation"]["policy"]["per_prompt"]] == ["her game", "him"]
    answer = tiltlm("eval", "py", "--samples", 20, "--device", "cpu", "--json")
    assert json.loads(answer.out)["prompts_from"] == "held out"
