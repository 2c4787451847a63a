"""examples/features: the script trains the models, and each example fits on a small sample."""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from tiltlm.app.build import build_terms
from tiltlm.app.plan import plan_run
from tiltlm.config.run import load_config
from tiltlm.features import build_feature, measure, sentiment
from tiltlm.lm import LanguageModel, Samples
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.targets.constrain import fit_target

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "features").glob("*.yaml"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository after the script has run, with less training."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "examples").mkdir()
    (folder / "examples" / "features").symlink_to(ROOT / "examples" / "features")
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from train_example_models import train_all  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    figures = train_all(folder / "examples" / "models", sentences=900, steps=160)
    assert figures["sentences"]["correlation with VADER"] > 0.1
    assert figures["code"]["nats per token"] < 1.2
    return folder


@cache
def drawn(model: str) -> Samples:
    """The same sample for all examples that tune this model."""
    return LanguageModel.from_pretrained(model).sample(384, seed=99, max_completion_length=40)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_example_fits_on_a_small_sample(path: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    config = load_config(path)
    plan_run(config)
    terms = build_terms(config)
    samples = drawn(config.model)
    sample = BaseSample(samples, measure_samples([term.feature for term in terms], samples), 40)
    for term, values in zip(terms, sample.features.unbind(1), strict=True):
        # Values differ, so that there is something to tune.
        assert values.std() > 0, term.feature.name
    target = fit_target(terms, sample)
    assert math.isfinite(target.report.kl_p_a.value)
    for term in target.report.terms:
        if term.goal is not None:
            assert term.achieved.value == pytest.approx(term.goal, abs=1e-6)


def test_the_models_are_small_and_safe(trained: Path) -> None:
    files = [path for path in (trained / "examples" / "models").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_the_reward_model_learned_from_its_teacher(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    texts = drawn("embedded").texts
    reward = build_feature({"reward_model": "examples/models/reward", "reads": "completion"})
    values = measure([reward, sentiment()], texts)
    assert torch.corrcoef(values.T)[0, 1] > 0.1
