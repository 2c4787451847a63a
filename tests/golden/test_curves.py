"""A fresh run follows the golden curve, figure by figure, and draws texts of the same law (`make golden`: anew)."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from curves import CURVES, RUNS, TEXTS, run

from tiltlm.estimation import mean
from tiltlm.lm import Samples

# On the same texts CPUs differ by float32 rounding alone: under SSE4, AVX2 and AVX-512 by at most a seventh of this. A
# training loop that has changed differs by percents.
RELATIVE, ABSOLUTE = 1e-3, 1e-5
STANDARD_ERRORS = 5.0


def same(found: Any, golden: Any, where: str = "") -> None:
    """Equal but for rounding, down to the last figure."""
    if isinstance(golden, dict | list):
        assert len(found) == len(golden), where
        for key in golden if isinstance(golden, dict) else range(len(golden)):
            same(found[key], golden[key], f"{where}/{key}")
    elif isinstance(golden, float):
        assert found == pytest.approx(golden, rel=RELATIVE, abs=ABSOLUTE), where
    else:
        assert found == golden, where


def same_law(one: Samples, other: Samples) -> None:
    """The same means of lengths and log-probabilities, as far as their standard errors tell."""
    for name in ("lengths", "sequence_logprob"):
        a, b = (mean(getattr(samples, name).double()) for samples in (one, other))
        assert abs(a.value - b.value) <= STANDARD_ERRORS * math.hypot(a.se, b.se), name


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_run_follows_the_golden_curve(name: str) -> None:
    texts = json.loads(TEXTS.read_text())
    outcome = run(name, [texts["fit"], *texts[name]])
    same(outcome.curve, json.loads(CURVES.read_text())[name], name)
    for drawn, used in zip(outcome.drawn, outcome.used, strict=True):
        same_law(drawn, used)
