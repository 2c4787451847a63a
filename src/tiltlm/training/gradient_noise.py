"""How far the single samples of a batch disagree: the variance of their gradients, and of what multiplies them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.lm import Guide
from tiltlm.objectives import Objective, Record
from tiltlm.training.rollout_batch import Batch
from tiltlm.training.scoring import Scorer


@dataclass(frozen=True)
class Spread:
    """Of n samples of a batch, each by itself, before the update on it.

    ``gradient_variance`` is E‖g‖² − ‖E g‖², the trace of the covariance of one sample's gradient; the advantage is the
    coefficient of ∇ log π, a mean over a text's tokens where an objective gives one for each.
    """

    gradient_variance: float
    advantage_variance: float
    advantage_mean_abs: float
    advantage_max: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        """The ``spread`` of a line of ``metrics.jsonl``."""
        return asdict(self)


def measure_spread(scorer: Scorer, batch: Batch, log_z: float | Tensor, guide: Guide | None, most: int) -> Spread:
    """Pull the first ``most`` samples of a batch one by one; nothing of it stays, in gradients, counts or objective.

    One pass a sample, not torch.func's vmap over all: the log-probabilities come from a fused function that vmap cannot
    see into, and for a diagnosis of a few samples the time is small.
    """
    n = min(most, len(batch.samples))
    objective, passes = scorer.objective, replace(scorer.passes)
    parameters = list(scorer.roles.trainable().values())
    scaler = scorer.accelerator.scaler
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    heard: Any = _Heard(objective)
    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    squares = 0.0
    for i in range(n):
        scorer.objective = heard
        scorer.pull(_only(batch, i), log_z[i : i + 1] if isinstance(log_z, Tensor) else log_z, guide)
        for total, parameter in zip(sums, parameters, strict=True):
            if parameter.grad is not None:
                gradient = parameter.grad.float() / scale
                squares += float(gradient.square().sum())
                total += gradient
                parameter.grad = None
    scorer.objective = objective
    scorer.balance.forget()
    for parameter in scorer.critic.parameters().values() if scorer.critic is not None else ():
        parameter.grad = None
    vars(scorer.passes).update(vars(passes))
    mean_squared = sum(float((total / n).square().sum()) for total in sums)
    # A row that the scorer knows to pull with 0 is not asked about.
    advantage = torch.tensor([*heard.said, *[0.0] * (n - len(heard.said))], dtype=torch.float64)
    return Spread(
        gradient_variance=(squares / n - mean_squared) * n / max(n - 1, 1),
        advantage_variance=float(advantage.var()) if n > 1 else 0.0,
        advantage_mean_abs=float(advantage.abs().mean()),
        advantage_max=float(advantage.abs().max()),
        samples=n,
    )


class _Heard:
    """An objective that is listened to."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.said: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.objective, name)

    def coefficients(self, record: Record) -> Tensor:
        found = self.objective.coefficients(record)
        for row in found.detach().double().cpu():
            tokens = record.tokens.mask.cpu().sum() if row.ndim and record.tokens is not None else 1
            self.said.append(float(row.sum() / tokens))
        return found


def _only(batch: Batch, row: int) -> Batch:
    """A batch of one of its samples, which what was found out about the whole batch still holds for."""
    rows = torch.tensor([row])

    def of(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows.to(value.device)]

    known = batch.assessment
    return replace(
        batch,
        samples=batch.samples.select(rows.to(batch.samples.tokens.device)),
        measured=batch.features[rows],
        assessment=replace(known, **{name: of(value) for name, value in vars(known).items()}) if known else None,
        mixture=of(batch.mixture),
    )
