"""The ground of ``benchmarks/estimators.py``: the mean of its sampled gradients is the exact gradient of KL(p‖π)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from ground.distilled import guide_law, mixture_of, pulls
from ground.runs import Drawn, Runs
from ground.worlds import enumerable

from tiltlm.objectives import GDCPlusPlus, Guided

RUNS, SAMPLES = 100, 2000


def on_policy(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    return sampled(runs, log_z, table, table)


def from_the_base(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    return sampled(runs, log_z, table, runs.base)


def sampled(runs: Runs, log_z: Tensor, table: Tensor, proposal: Tensor) -> Tensor:
    batch = runs.score(runs.draw(proposal, SAMPLES))
    records = runs.records(batch, batch.drawn.under(table), log_z)
    return runs.pull(batch.drawn, torch.stack([GDCPlusPlus().coefficients(record) for record in records]))


def guided(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    guide = guide_law(runs)
    return pulls(runs, Guided(), runs.draw(guide, SAMPLES), table, guide, log_z)


def from_the_pool(runs: Runs, log_z: Tensor, table: Tensor) -> Tensor:
    guide = guide_law(runs)
    kept = Drawn.joined([runs.draw(runs.base, SAMPLES // 4), runs.draw(guide, SAMPLES - SAMPLES // 4)])
    kept = replace(kept, logprob=mixture_of(runs, kept, guide, 0.25))
    return pulls(runs, Guided(), kept, table, guide, log_z)


# A guide alone is tried where its weights are small; in the pool the base bounds them.
@pytest.mark.parametrize(
    ("method", "target"),
    [(on_policy, "hybrid"), (from_the_base, "hybrid"), (guided, "moment"), (from_the_pool, "hybrid")],
)
def test_mean_of_sampled_gradients_is_exact(method: Callable[[Runs, Tensor, Tensor], Tensor], target: str) -> None:
    world = enumerable(target)
    runs = Runs(world, RUNS, [0.01], SAMPLES)
    # The same target for all, with its exact coefficients: only what is drawn differs.
    runs.log_tilt = world.target.log_tilt(world.values).expand_as(runs.log_tilt)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in runs.policy.parameters:
            parameter += 0.2 * torch.randn(parameter.shape[1:], generator=generator)
    table = runs.policy.log_table()
    log_z = torch.full((RUNS,), world.log_z, dtype=torch.float64)

    pulled = method(runs, log_z, table.detach())
    found = torch.cat([g.flatten(1) for g in runs.gradients(table, pulled)], 1).double()
    divergence = world.kl(runs.policy.log_table()).sum()
    wanted = torch.cat([g[0].flatten() for g in torch.autograd.grad(divergence, runs.policy.parameters)]).double()

    mean, error = found.mean(0), found.std(0) / RUNS**0.5
    assert float(error.norm()) < 0.1 * float(wanted.norm())
    assert float((mean - wanted).norm()) < 1.7 * float(error.norm())
