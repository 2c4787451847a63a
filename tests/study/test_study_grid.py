"""The grid of a study: its runs, their settings and steps, and the cells that a method cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from tiltlm.config.run import parse_config
from tiltlm.config.study import parse_study
from tiltlm.errors import UsageError
from tiltlm.study.grid import expand, steps_within
from tiltlm.training.proposal_rules import proposal_rule

FEMALE = {"constraints": [{"feature": {"pronouns": "female"}, "moment": 0.5}], "samples": 64}
GOOD = {"constraints": [{"feature": {"contains": "good"}, "moment": 1.0}], "samples": 64}


@pytest.fixture
def study() -> dict[str, Any]:
    """A small study file."""
    training = {"batch_size": 32, "learning_rate": 0.002, "save_steps": 1}
    return {
        "sequences": 128,
        "seeds": 1,
        "shared": {"model": "embedded", "training": training, "max_completion_length": 12, "device": "cpu"},
        "tasks": {"female": {"target": FEMALE}},
        "methods": {"gdc++": {"method": "gdc++"}},
    }


@pytest.mark.parametrize(
    ("budget", "fit", "reuse", "rule", "expected"),
    [
        (1024, 256, True, "on_policy", (4 + 12, 1024)),
        (1024, 256, False, "on_policy", (12, 1024)),
        (1000, 250, True, "on_policy", (3 + 11, 954)),
        # Each fourth step draws ten further batches. The budget does not suffice for the second check.
        (1100, 0, False, "published", (7, 1088)),
    ],
)
def test_steps_follow_from_the_budget(budget: int, fit: int, reuse: bool, rule: str, expected: tuple[int, int]) -> None:
    assert steps_within(budget, fit, 64, reuse, proposal_rule(rule, 4)) == expected


def test_a_run_of_the_grid_merges_settings_of_study_task_and_method(study: dict[str, Any]) -> None:
    raw = study | {
        "seeds": [3, 5],
        "methods": {"m": {"method": "gdc", "training": {"learning_rate": 0.5}, "peft": None}},
    }
    raw["tasks"] = {"t": {"target": FEMALE, "training": {"batch_size": 16, "learning_rate": 0.25}, "sequences": 96}}
    grid = expand(parse_study(raw))
    assert [(run.name, run.config.seed, run.config.fit_seed) for run in grid.runs] == [
        ("t/m/seed-3", 3, 0),
        ("t/m/seed-5", 5, 0),
    ]
    training = grid.runs[0].config.training
    assert (training.batch_size, training.learning_rate, training.save_steps) == (16, 0.5, 1)
    assert (training.max_steps, grid.runs[0].sequences) == (4 + 2, 96)
    assert parse_config(grid.runs[0].config.to_json()) == grid.runs[0].config


def test_batch_sizes_are_variants_of_equal_samples_and_impossible_cells_are_skipped(study: dict[str, Any]) -> None:
    methods = {"gdc": {"method": "gdc", "batch_sizes": [8, 32]}, "vargrad": {"method": "vargrad"}}
    grid = expand(parse_study(study | {"methods": methods, "tasks": {"good": {"target": GOOD}}}))
    assert [(run.method, run.config.training.max_steps) for run in grid.runs] == [
        ("gdc, batch 8", 16),
        ("gdc, batch 32", 4),
    ]
    assert {run.sequences for run in grid.runs} == {128}
    assert [(one.task, one.method) for one in grid.skipped] == [("good", "vargrad")]
    assert "log P is −∞" in grid.skipped[0].reason


def test_an_unknown_key_of_a_section_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"unknown key .reference\.sample."):
        parse_study(
            {
                "sequences": 1,
                "tasks": {"a": {"target": {}}},
                "methods": {"m": {"method": "gdc"}},
                "reference": {"sample": 1},
            }
        )
