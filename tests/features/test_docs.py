"""docs/features.md is correct: both forms of each built-in kind, every example, every word list."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiltlm.features
from tiltlm.features import (
    Feature,
    build_feature,
    builtin_wordlists,
    classifier,
    measure,
    perplexity,
    reward_model,
    similarity,
)
from tiltlm.features.kinds import FEATURE_KINDS
from tiny_models import classifier_model, embedding_model

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(\{.+?\})` \| `(.+?)` \|", PAGE, flags=re.MULTILINE)
CODE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
TEXTS = ["She won the race.", "He won the world cup in 1966!", "", "An amazing painting of an album. " * 5]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder ``examples``, with models of random weights in place of those of scripts/train_example_models.py."""
    folder = tmp_path_factory.mktemp("examples")
    classifier_model(folder / "models" / "topics", "sports", "other")
    classifier_model(folder / "models" / "reward", "positive")
    embedding_model(folder / "models" / "sentences")
    (folder / "features").symlink_to(Path(__file__).parents[2] / "examples" / "features")
    return folder


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, examples: Path) -> None:
    """The page's examples as my_rewards.py in the current directory."""
    (tmp_path / "examples").symlink_to(examples)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.delitem(FEATURE_KINDS, "exclaims", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text("\n".join(CODE[1:]))


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize(("config", "code"), ROWS)
def test_both_forms_of_a_built_in_are_the_same_feature(config: str, code: str) -> None:
    names: dict[str, Any] = {name: getattr(tiltlm.features, name) for name in tiltlm.features.__all__}
    exec("from my_rewards import brevity\nfemale, sporty = pronouns('female'), wordlist('sports')", names)
    from_code = eval(code.replace(r"\|", "|"), names)
    from_config = build_feature(yaml.safe_load(config))
    assert isinstance(from_code, Feature)
    assert (from_config.name, from_config.binary) == (from_code.name, from_code.binary)
    assert torch.equal(from_config(TEXTS), from_code(TEXTS))


def test_the_table_holds_every_kind_of_feature() -> None:
    kinds = {next(iter(yaml.safe_load(config))) for config, _ in ROWS}
    ours = {name for name, make in FEATURE_KINDS.items() if make.__module__.startswith("tiltlm.")}
    assert kinds == ours | set(tiltlm.features.registry.COMBINATORS)


def test_the_first_example_gives_what_it_shows() -> None:
    names: dict[str, Any] = {}
    exec(CODE[0], names)
    assert "# tensor([[1., 0., 4.], [0., 1., 5.]], dtype=torch.float64)" in CODE[0]
    values = measure([names["female"], names["sporty"], names["length"]("words")], ["She won the race.", TEXTS[1][:20]])
    assert values.tolist() == [[1.0, 0.0, 4.0], [0.0, 1.0, 5.0]]
    assert names["sporty"].evidence("He won the world cup.") == [(11, 20)]


@pytest.mark.usefixtures("my_rewards")
def test_the_examples_of_own_features_work_from_a_run_file() -> None:
    section = PAGE[PAGE.index("## Your own") :]
    specs = [
        yaml.safe_load(block)[0]["feature"] for block in re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    ]
    specs.append(yaml.safe_load(re.findall(r"`(\{python: \"my_rewards:exclaims\".*?\}\})`", PAGE)[0]))
    features = [build_feature(spec) for spec in specs]
    assert [feature.name for feature in features] == ["brevity(words=12)", "repeats_prompt", "exclaims"]
    values = measure(features, ["one two three", "She sang!"], prompts=["one", "He"])
    assert values.tolist() == [[0.75, 1.0, 0.0], [1 - 2 / 12, 0.0, 1.0]]
    assert features[2].evidence("No! Yes!") == [(2, 3), (7, 8)]


@pytest.mark.usefixtures("my_rewards")
def test_the_examples_of_models_and_code_work_from_a_run_file() -> None:
    section = PAGE[PAGE.index("## Models that") : PAGE.index("## Your own")]
    specs = [
        yaml.safe_load(block)[0]["feature"] for block in re.findall(r"```yaml\n(.*?)```", section, flags=re.DOTALL)
    ]
    features = [build_feature(spec) for spec in specs]
    assert [(feature.name, feature.binary) for feature in features] == [("sports", True), ("doubles", True)]
    assert features[1](["def f(x):\n    return 2 * x", "def f(x):\n    return x"]).tolist() == [1.0, 0.0]


def test_the_page_lists_every_option_of_the_models() -> None:
    section = PAGE[PAGE.index("## Models that") : PAGE.index("## Code")]
    named = set(
        re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in section.splitlines() if line[:3] == "| `"))
    )
    for make in (classifier, reward_model, similarity, perplexity):
        own = {"model", "label", "threshold", "to", "value"}
        assert set(inspect.signature(make).parameters) - own == named


def test_the_page_names_the_word_lists_and_is_one_page() -> None:
    paragraph = PAGE[PAGE.index("**Word lists**") :].split("\n\n")[0]
    assert re.findall(r"`(\w+)`", paragraph.split(". ")[0]) == builtin_wordlists()
    assert len(PAGE.splitlines()) < 200
