"""The run file: descriptions, defaults and overrides; its JSON is read back as the same config."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

from tiltlm.app.build import build_terms
from tiltlm.config.run import (
    ConstraintConfig,
    EvaluationConfig,
    MethodConfig,
    RewardConfig,
    RunConfig,
    TargetConfig,
    load_config,
    parse_config,
)
from tiltlm.config.starter import starter_config
from tiltlm.config.training import TrainingArguments
from tiltlm.config.yaml_file import apply_override
from tiltlm.errors import UsageError

LEAST: dict[str, Any] = {
    "model": "embedded",
    "target": {"constraints": [{"feature": {"pronouns": "female"}, "moment": 0.5}]},
}
SECTIONS = (RunConfig, TargetConfig, ConstraintConfig, RewardConfig, MethodConfig, EvaluationConfig, TrainingArguments)


def fields_of(section: type[Any]) -> dict[str, str | None]:
    """Every key of a section with its description; a key that is a section has the docstring of the section."""
    if dataclasses.is_dataclass(section):
        hints = get_type_hints(section, include_extras=True)
        return {
            field.name: next((part.description for part in hints[field.name].__metadata__), None)
            for field in dataclasses.fields(section)
        }
    documented: dict[str, str | None] = {}
    for name, field in section.model_fields.items():
        documented[name] = field.annotation.__doc__ if field.annotation in SECTIONS else field.description
    return documented


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_has_a_description(section: type[Any]) -> None:
    for name, description in fields_of(section).items():
        assert description, f"{section.__name__}.{name} has no description"
        assert len(description.split()) >= 2, f"{section.__name__}.{name}: '{description}' is too short"


def test_only_model_and_target_have_no_default() -> None:
    assert [name for name, field in RunConfig.model_fields.items() if field.is_required()] == ["model", "target"]
    config = parse_config(LEAST)
    assert config.method == MethodConfig(name="kept_guide", proposal=None, check_steps=10)
    assert config.training == TrainingArguments()
    assert (config.seed, config.peft, config.prompts, config.report_to) == (0, None, None, [])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "gdc", "report_to": "wandb", "callbacks": ["a:b"], "prompts": ["she", "he"], "seed": 3},
        {"method": {"name": "m:o", "args": {"a": [1, 2.5, None]}}, "training": {"optim_args": {"betas": [0.9, 0.95]}}},
        {"peft": {"r": 4, "target_modules": ["q_proj"]}, "evaluation": {"top_p": None, "samples": 10}},
        {"target": {"reward": {"feature": "sentiment:compound", "beta": 0.1}}, "prompts": "prompts.txt"},
        {"prompts": {"path": "rows.csv", "column": "question", "samples": 10}},
        {"prompts": ["a", [{"role": "user", "content": "b"}], {"prompt": "c", "word": "d"}]},
        {"target": {"python": "mine:Target", "args": {"x": {"y": 1}}}, "training": {"max_grad_norm": 0}},
    ],
)
def test_a_stored_config_is_read_back_unchanged(changes: dict[str, Any]) -> None:
    config = parse_config(LEAST | changes)
    stored = json.loads(json.dumps(config.model_dump(mode="json"), allow_nan=False))
    assert parse_config(stored) == config
    assert parse_config(LEAST) == config if not changes else parse_config(LEAST) != config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", {"seed": 7}),
        ("prompts=", {"prompts": None}),
        ("prompts=a = b", {"prompts": "a = b"}),
        ("prompts.dataset=us/ers", {"prompts": {"dataset": "us/ers"}}),
        ("training.max_steps=100", {"training": {"max_steps": 100}}),
        ("training.learning_rate=1e-5", {"training": {"learning_rate": 1e-5}}),
        ("training={max_steps: 3}", {"training": {"max_steps": 3}}),
        ("method=gdc", {"method": "gdc"}),
        ("method.proposal=kl", {"method": {"proposal": "kl"}}),
        ("peft={r: 8, target_modules: all-linear}", {"peft": {"r": 8, "target_modules": "all-linear"}}),
        ("peft.r=8", {"peft": {"r": 8}}),
        ("report_to=[wandb, mlflow]", {"report_to": ["wandb", "mlflow"]}),
        ("training.optim_args.weight_decay=1e-2", {"training": {"optim_args": {"weight_decay": 0.01}}}),
    ],
)
def test_an_override_sets_one_key(override: str, expected: dict[str, Any]) -> None:
    raw: dict[str, Any] = {}
    apply_override(raw, override)
    assert raw == expected


def test_overrides_change_nested_keys() -> None:
    raw: dict[str, Any] = {
        "method": "gdc",
        "peft": {"r": 8},
        "target": {"constraints": [{"feature": {"pronouns": "female"}, "moment": 0.5}, {"feature": "a:b"}]},
    }
    for override in (
        "method.proposal=tv",
        "peft=null",
        "target.constraints.0.moment=0.3",
        "target.constraints.0.feature=pronouns:male",
        "target.constraints.1={feature: length, moment: 9}",
    ):
        apply_override(raw, override)
    assert raw == {
        "method": {"name": "gdc", "proposal": "tv"},
        "peft": None,
        "target": {"constraints": [{"feature": "pronouns:male", "moment": 0.3}, {"feature": "length", "moment": 9}]},
    }
    apply_override(raw, "method=dpg")
    assert raw["method"] == {"name": "dpg", "proposal": "tv"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed': an override has the form key=value"),
        ("=1", "'=1': an override has the form key=value"),
        ("seed={", r"'seed=\{': the value is not valid YAML: .*line 1"),
        ("training=3", r"training has keys of its own \(max_steps\)"),
        ("target.constraints.1.moment=0.3", "'1' is not an index of a list of 1"),
        ("target.constraints.-1.moment=0.3", "'-1' is not an index of a list of 1"),
        ("target.constraints.first=0.3", "'first' is not an index of a list of 1"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_override({"training": {"max_steps": 1}, **LEAST}, override)


def test_a_file_and_its_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: embedded\n"
        "target: {constraints: [{feature: pronouns:female, moment: 5e-1}]}\n"
        "training: {learning_rate: 1e-4, optim_args: {eps: 1E-6, weight_decay: .5}}\n"
    )
    config = load_config(file, ["training.max_steps=7", "training.max_steps=8"])
    assert config.target.constraints[0].moment == 0.5
    assert config.training == TrainingArguments(max_steps=8, optim_args={"eps": 1e-6, "weight_decay": 0.5})


@pytest.mark.parametrize("text", ["seed: 1\nseed: 2\n", "training: {max_steps: 1, max_steps: 2}\n"])
def test_a_repeated_key_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"not valid YAML: the key '(seed|max_steps)' appears twice \(line"):
        load_config(file)


@pytest.mark.parametrize("key", ["seed", "training.learning_rate", "target.constraints.0.moment", "evaluation.top_p"])
def test_true_is_not_a_number(key: str) -> None:
    raw = json.loads(json.dumps(LEAST))
    apply_override(raw, f"{key}=true")
    with pytest.raises(UsageError, match=re.escape(f"{key}: must be a number (it is True)")):
        parse_config(raw)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(UsageError) as raised:
        parse_config({"modle": "x", "target": {"constraints": [{"momnt": 1}]}, "training": {"optm": 1}})
    message = str(raised.value)
    for part in ("'model' is missing", "'modle'; did you mean 'model'", "'target.constraints.0.feature' is missing"):
        assert part in message
    assert "'target.constraints.0.momnt'; did you mean 'moment'" in message
    assert "'training.optm'; did you mean 'optim'" in message


def test_the_starter_is_valid_and_shows_every_default() -> None:
    text = starter_config()
    as_it_is = parse_config(yaml.safe_load(text))
    assert as_it_is == parse_config(LEAST)
    uncommented = re.sub(r"^# (?=\w+:|  \w+:)", "", text.split("\ntarget:")[1], flags=re.MULTILINE)
    raw = yaml.safe_load("model: embedded\n\ntarget:" + uncommented)
    assert parse_config(raw) == as_it_is
    assert set(raw) == set(RunConfig.model_fields)
    for name in ("method", "training", "evaluation"):
        section = {"method": MethodConfig, "training": TrainingArguments, "evaluation": EvaluationConfig}[name]
        assert set(raw[name]) == set(fields_of(section))


def test_the_examples_in_the_starter_are_valid_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_rewards.py").write_text("def brevity(texts, words):\n    return [0.0] * len(texts)\n")
    target = starter_config().split("\ntarget:")[1].split("\n\n")[0]
    # Inside of the target a commented line is an example, or the default of a key.
    raw = {"model": "embedded", "target": yaml.safe_load(re.sub(r"^( +)# ", r"\1", target, flags=re.MULTILINE))}
    terms = build_terms(parse_config(raw))
    assert [term.kind for term in terms] == ["moment", "filter", "moment", "moment", "reward"]
    assert [term.goal for term in terms] == [0.5, 1.0, 0.1, 0.3, None]
    assert terms[3].feature.name == "brief"
    assert raw["target"]["samples"] == TargetConfig.model_fields["samples"].default


def test_lines_of_the_starter_are_short() -> None:
    assert all(len(line) <= 120 for line in starter_config().splitlines())
