"""DPG, GDC and GDC++: their coefficients by hand, and their expectation in full."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from tiltlm.exact import expected_gradient
from tiltlm.lm import LanguageModel
from tiltlm.objectives import BUILT_IN, Objective, Record
from tiny_world import KL_METHODS, flat, near, tiny_world, true_gradient

POLICY = [0.50, 0.20, 0.10, 0.15, 0.05]
PROPOSAL = [0.25, 0.40, 0.10, 0.05, 0.20]
SCORE = [1.00, 0.40, 0.00, 0.60, 2.00]
Z = 4.0
WEIGHT = [1.00, 0.25, 0.00, 3.00, 2.50]
RATIO = [2.00, 0.50, 1.00, 3.00, 0.25]


def record(shift: float = 0.0) -> Record:
    """Five sequences; ``shift`` is taken off all log-probabilities, as if each were so much longer."""
    policy, proposal, score = (torch.tensor(x, dtype=torch.float64).log() - shift for x in (POLICY, PROPOSAL, SCORE))
    return Record(policy, torch.zeros(5, dtype=torch.float64), proposal, score, math.log(Z))


EXPECTED = {
    "dpg": WEIGHT,
    "gdc": WEIGHT,
    "gdc++": [w - r for w, r in zip(WEIGHT, RATIO, strict=True)],
    "pooled": [w - BUILT_IN["pooled"]().kappa * r for w, r in zip(WEIGHT, RATIO, strict=True)],
}
# A sum over whole sequences knows no guide; test_guided.py has the others.
WITHOUT_GUIDE = [name for name in KL_METHODS if name != "guided"]


@pytest.mark.parametrize("name", WITHOUT_GUIDE)
@pytest.mark.parametrize("shift", [0.0, 140.0, 5000.0])
def test_coefficients_are_the_formulas_even_where_probabilities_underflow(name: str, shift: float) -> None:
    coefficients = BUILT_IN[name]().coefficients(record(shift))
    assert coefficients.tolist() == pytest.approx(EXPECTED[name], abs=1e-9)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_objective_names_itself_and_keeps_to_the_protocol(name: str) -> None:
    objective = BUILT_IN[name]()
    assert isinstance(objective, Objective)
    assert objective.name == name


def test_gdc_plus_plus_does_not_pull_where_the_policy_is_the_target() -> None:
    proposal = torch.tensor(PROPOSAL, dtype=torch.float64).log()
    target = torch.tensor(POLICY, dtype=torch.float64).log()
    at_the_target = Record(target, proposal, proposal, target + math.log(Z), math.log(Z))
    assert BUILT_IN["gdc++"]().coefficients(at_the_target).abs().max() < 1e-12


def laws() -> dict[str, LanguageModel]:
    base = tiny_world().base
    return {"on-policy": near(base, 0.03, seed=1), "base": base, "earlier policy": near(base, 0.03, seed=2)}


@pytest.mark.parametrize("proposal", ["on-policy", "base", "earlier policy"])
@pytest.mark.parametrize("name", WITHOUT_GUIDE)
def test_the_expected_gradient_is_that_of_the_divergence(name: str, proposal: str) -> None:
    world, models = tiny_world(), laws()
    policy = models["on-policy"]
    truth = flat(true_gradient(world, policy))
    expected = flat(expected_gradient(BUILT_IN[name](), policy, world.truth, world.logprob(models[proposal])))
    assert truth.norm() > 0.1
    assert float((expected - truth).abs().max()) < 1e-10


def test_the_target_of_that_test_has_rows_without_probability() -> None:
    world = tiny_world()
    assert 0.2 < float((world.truth.target_logscore == -math.inf).double().mean()) < 0.9


@dataclass(frozen=True)
class WithoutRatio(Objective):
    """The on-policy baseline used off-policy, where it is wrong: what the test above must be able to see."""

    name: ClassVar[str] = "P/(Zq) - 1"

    def coefficients(self, record: Record) -> Tensor:
        return BUILT_IN["gdc"]().coefficients(record) - 1


def test_the_baseline_without_its_ratio_is_right_only_on_policy() -> None:
    world, models = tiny_world(), laws()
    policy = models["on-policy"]
    truth = flat(true_gradient(world, policy))
    right = flat(expected_gradient(WithoutRatio(), policy, world.truth, world.logprob(policy)))
    wrong = flat(expected_gradient(WithoutRatio(), policy, world.truth, world.logprob(models["base"])))
    assert float((right - truth).abs().max()) < 1e-10
    assert float((wrong - truth).norm()) > 0.1 * float(truth.norm())


@pytest.mark.parametrize("name", WITHOUT_GUIDE)
def test_a_wrong_log_z_only_scales_the_expected_gradient(name: str) -> None:
    world, models = tiny_world(), laws()
    policy = models["on-policy"]
    truth = flat(true_gradient(world, policy))
    proposal = world.logprob(models["base"])
    off = flat(expected_gradient(BUILT_IN[name](), policy, world.truth, proposal, log_z=world.truth.log_z + 0.7))
    assert float((off * math.exp(0.7) - truth).abs().max()) < 1e-10


def variance(coefficients: Tensor, logprob: Tensor, scores: Tensor) -> float:
    """E‖c ∇log π‖² − ‖E c ∇log π‖² from every completion's coefficient [N], log-probability [N] and ∇log π [N, D]."""
    pulls = coefficients[:, None] * scores
    probability = logprob.exp()
    return float(probability @ pulls.square().sum(1) - (probability @ pulls).square().sum())


def test_near_the_target_the_baseline_lowers_the_variance_of_the_gradient() -> None:
    """2206.00761, §3.3: w − 1 vanishes at π = p, where w alone is 1 and all noise is left."""
    world = tiny_world(strength=0.05)
    policy, truth = near(world.base, 0.005), world.truth
    logprob = policy.logprob(world.samples).sum(-1)
    each = torch.autograd.grad(
        logprob,
        list(policy.model.transformer.ln_f.parameters()),
        torch.eye(len(logprob)).double(),
        is_grads_batched=True,
    )
    scores = torch.cat([gradient.flatten(1) for gradient in each], 1)
    logprob = logprob.detach()
    record = Record(logprob, truth.base_logprob, logprob, truth.target_logscore, truth.log_z)
    noise = {name: variance(BUILT_IN[name]().coefficients(record), logprob, scores) for name in WITHOUT_GUIDE}
    assert noise["gdc++"] < 0.1 * noise["gdc"]
    assert noise["dpg"] == noise["gdc"]
