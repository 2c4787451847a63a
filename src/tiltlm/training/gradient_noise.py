"""Gradient noise: the variance of single samples' gradients and advantages within a batch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tiltlm.lm import Guide
from tiltlm.objectives import Record
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.scoring import Scorer


@dataclass(frozen=True)
class GradientNoise:
    """Variances over n samples of a batch, before the update on it.

    ``gradient_variance`` is E‖g‖² − ‖E g‖², the trace of the covariance of one sample's gradient. The advantage is the
    coefficient of ∇ log π, averaged over a text's tokens where an objective has one for each token.
    """

    gradient_variance: float
    advantage_variance: float
    advantage_mean_abs: float
    advantage_max: float
    samples: int

    def to_json(self) -> dict[str, Any]:
        """The ``spread`` entry of a line of ``metrics.jsonl``."""
        return asdict(self)


def measure_gradient_noise(
    scorer: Scorer, batch: RolloutBatch, log_z: float | Tensor, guide: Guide | None, most: int
) -> GradientNoise:
    """The noise of the first ``most`` samples of a batch; gradients, counts and the objective stay as they were.

    One pass a sample, not torch.func's vmap over all: the log-probabilities come from a fused function that vmap cannot
    trace, and this diagnosis reads few samples.
    """
    n = min(most, len(batch.samples))
    parameters = list(scorer.roles.trainable().values())
    scaler = scorer.accelerator.scaler
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    advantages: list[float] = []

    def listen(record: Record, coefficients: Tensor) -> None:
        for row in coefficients.detach().double().cpu():
            tokens = record.tokens.mask.cpu().sum() if row.ndim and record.tokens is not None else 1
            advantages.append(float(row.sum() / tokens))

    sums = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    squares = 0.0
    with scorer.passes.counter.paused():
        for i in range(n):
            row_log_z = log_z[i : i + 1] if isinstance(log_z, Tensor) else log_z
            scorer.accumulate(batch.row(i), row_log_z, guide, listener=listen)
            for total, parameter in zip(sums, parameters, strict=True):
                if parameter.grad is not None:
                    gradient = parameter.grad.float() / scale
                    squares += float(gradient.square().sum())
                    total += gradient
                    parameter.grad = None
    scorer.minimum_variance.discard()
    for parameter in scorer.critic.parameters().values() if scorer.critic is not None else ():
        parameter.grad = None
    mean_squared = sum(float((total / n).square().sum()) for total in sums)
    # Rows with a coefficient known to be 0 take no pass, so the listener does not see them.
    advantage = torch.tensor([*advantages, *[0.0] * (n - len(advantages))], dtype=torch.float64)
    return GradientNoise(
        gradient_variance=(squares / n - mean_squared) * n / max(n - 1, 1),
        advantage_variance=float(advantage.var()) if n > 1 else 0.0,
        advantage_mean_abs=float(advantage.abs().mean()),
        advantage_max=float(advantage.abs().max()),
        samples=n,
    )
