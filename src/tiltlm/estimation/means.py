"""Means, and ratios of means, of sampled rows, each with its standard error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.estimation.estimate import Estimate

UNKNOWN = Estimate(math.nan, math.nan)


def float64_rows(**columns: Tensor) -> tuple[Tensor, ...]:
    """The columns [N] as detached float64 on the CPU, in the order given.

    Raises UsageError for a column that is not one-dimensional, is empty or has another length than the first, and
    NumericalError for NaN; infinities pass, because log 0 is a legitimate log-probability.
    """
    rows = {name: column.detach().to("cpu", torch.float64) for name, column in columns.items()}
    first, first_row = next(iter(rows.items()))
    for name, row in rows.items():
        if row.dim() != 1 or len(row) == 0:
            raise UsageError(
                f"{name} has shape {list(row.shape)}; give one number for each sample, at least one sample"
            )
        if len(row) != len(first_row):
            raise UsageError(
                f"{name} has {len(row)} rows and {first} has {len(first_row)}; they must be the same samples"
            )
        if bool(row.isnan().any()):
            bad = int(row.isnan().nonzero()[0])
            raise NumericalError(f"{name} is NaN in row {bad}; check the log-probabilities and features of that sample")
    return tuple(rows.values())


def standard_error(influence_N: Tensor, effective_samples: float | None = None) -> float:
    """Standard error of an estimate from the influence [N] of each sample on it (the delta method).

    The small-sample factor n/(n − 1) takes n from ``effective_samples`` (default N); nan with one sample or fewer,
    because one sample has no variance.
    """
    n = len(influence_N) if effective_samples is None else effective_samples
    if n <= 1 + 1e-9:
        return math.nan
    return float(influence_N.square().sum().sqrt()) / len(influence_N) * math.sqrt(n / (n - 1))


def mean(values_N: Tensor) -> Estimate:
    """The plain mean of values [N]."""
    (values,) = float64_rows(values_N=values_N)
    value = values.mean()
    return (
        Estimate(float(value), standard_error(values - value)) if value.isfinite() else Estimate(float(value), math.nan)
    )


def ratio_of_means(numerator_N: Tensor, denominator_N: Tensor) -> Estimate:
    """Σ numerator / Σ denominator over samples [N] (a per-token figure, say); nan when the denominators are all 0."""
    numerator, denominator = float64_rows(numerator_N=numerator_N, denominator_N=denominator_N)
    if not bool(denominator.any()):
        return UNKNOWN
    value = numerator.sum() / denominator.sum()
    if not value.isfinite():
        return Estimate(float(value), math.nan)
    return Estimate(float(value), standard_error((numerator - value * denominator) / denominator.mean()))


def weighted_mean(values_N: Tensor, weights_N: Tensor) -> Estimate:
    """Σ weight · value for weights [N] that sum to 1; rows of weight 0 do not count, whatever their value.

    The error is the delta method's for a ratio, with n/(n − 1) at the effective sample size: nan with a single hit.
    Both are nan when all weights are 0.
    """
    values, weights = float64_rows(values_N=values_N, weights_N=weights_N)
    if not bool(weights.any()):
        return UNKNOWN
    values = torch.where(weights > 0, values, 0.0)
    value = (weights * values).sum()
    if not value.isfinite():
        return Estimate(float(value), math.nan)
    return Estimate(float(value), standard_error(len(weights) * weights * (values - value), effective_size(weights)))


def effective_size(weights_N: Tensor) -> float:
    """1/Σw² for weights that sum to 1: how many equally weighted samples would be as good; 0 when all are 0."""
    squares = float(weights_N.square().sum())
    return 1 / squares if squares > 0 else 0.0
