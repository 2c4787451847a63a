"""Runs made in Python: the command line evaluates them, with features that were given as objects too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiltlm
from command_line import Command, assert_one_error
from tiltlm import load_run
from tiltlm.errors import UsageError
from tiltlm.evaluation.evaluate import evaluate_policy

MEASURES = """
import tiltlm

@tiltlm.feature(binary=True)
def about_games(texts):
    return [float("game" in text) for text in texts]

def words(texts):
    return [float(len(text.split())) for text in texts]
"""

pytestmark = pytest.mark.usefixtures("no_pictures")
PROMPTS = ["the team", "she is a", "he"]


@pytest.fixture
def base(tiny: Path) -> tiltlm.LanguageModel:
    return tiltlm.LanguageModel.from_pretrained(tiny, device="cpu", dtype="float64")


def tuned(base: tiltlm.LanguageModel, constraints: Any, folder: str, **further: Any) -> tuple[Any, tiltlm.Run]:
    target = tiltlm.constrain(base, constraints, samples=150, max_completion_length=10, prompts=PROMPTS, **further)
    return target, tiltlm.tune(base, target, output_dir=folder, max_steps=2, batch_size=20, evaluation_samples=30)


def test_features_given_as_objects_are_loaded_again(
    tiltlm: Command, here: Path, base: tiltlm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "measures.py").write_text(MEASURES)
    monkeypatch.syspath_prepend(str(here))
    import measures  # type: ignore[import-not-found]

    from tiltlm.features import callable_feature, pronouns, wordlist

    constraints = {
        "contains:good": 0.3,
        pronouns("female").renamed("about women"): 0.5,
        measures.about_games | wordlist(["team"]): 0.6,
    }
    target, run = tuned(base, constraints, "from-python", reward=callable_feature(measures.words), beta=3.0)
    del sys.modules["measures"]
    record = run.directory.read_run()
    assert [entry["feature"] for entry in record["config"]["target"]["constraints"]] == [
        {"contains": "good"},
        {"pronouns": "female", "name": "about women"},
        {"any": [{"python": "measures:about_games"}, {"wordlist": ["team"]}]},
    ]
    answer = tiltlm("eval", "from-python", "--samples", 60, "--device", "cpu", "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert [*found["moments"]] == [*record["evaluation"]["policy"]["moments"]]

    # The same model, target, prompts and dtype as in the run: the same seed gives the same figures.
    config, roles, loaded = load_run("from-python", "cpu")
    assert (config.prompts, config.dtype) == (PROMPTS, "float64")
    assert roles.policy.model.dtype == torch.float64
    same = [
        evaluate_policy(one, aim, 60, prompts=PROMPTS, max_completion_length=10, seed=1).to_json()
        for one, aim in ((roles, loaded), (run.roles, target))
    ]
    assert same[0]["moments"] == same[1]["moments"]
    for figure in ("kl_p_pi", "kl_pi_a", "log_z"):
        assert same[0][figure]["value"] == pytest.approx(same[1][figure]["value"], abs=1e-9)


def test_a_feature_that_no_run_file_can_name_is_recorded_by_its_name(
    tiltlm: Command, here: Path, base: tiltlm.LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    from tiltlm.features import Feature, callable_feature

    def made(function: Callable[[list[str]], list[float]]) -> Feature:
        return callable_feature(function, name="wordy", binary=True)

    wordy = made(lambda texts: [float(len(text.split()) > 5) for text in texts])
    tuned(base, {wordy: 0.7}, "unnamed")
    assert "note: no run file can name the feature 'wordy', so `tiltlm eval` cannot load it" in capfd.readouterr().err
    answer = tiltlm("eval", "unnamed", "--samples", 20, "--device", "cpu")
    assert_one_error(answer.err, ["target.constraints.0.feature: 'wordy'", "a module defines", "features=[...]"])
    assert answer.code == 2
    # Sampling and the report do not need the feature.
    assert tiltlm("sample", "unnamed", "-n", 2, "--device", "cpu").code == 0
    assert tiltlm("report", "unnamed").code == 0

    _, roles, target = load_run("unnamed", "cpu", features=[wordy])
    assert evaluate_policy(roles, target, 20, max_completion_length=10).moments["wordy"].value >= 0


def test_a_method_that_cannot_match_the_target_is_refused_before_anything_is_written(
    here: Path, base: tiltlm.LanguageModel
) -> None:
    target = tiltlm.constrain(base, {"pronouns:female": 1.0}, samples=150, max_completion_length=10, prompts=PROMPTS)
    with pytest.raises(UsageError, match="vargrad cannot reach a target with the filter"):
        tiltlm.tune(base, target, output_dir="refused", method="vargrad", peft={"r": 2})
    assert not Path("refused").exists()
    assert not hasattr(base.model, "peft_config")
