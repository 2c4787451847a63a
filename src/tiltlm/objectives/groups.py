"""Sums, means and standard deviations over the samples of one prompt, repeated for each row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.estimation import Strata

Baseline = Literal["none", "mean", "leave_one_out"]
BASELINES: tuple[Baseline, ...] = ("none", "mean", "leave_one_out")


def group_sum(values: Tensor, groups: Tensor | None) -> Tensor:
    """The sum of the values [N] over each row's group [N]; without ``groups`` [N] all rows are one group."""
    strata = Strata.of(groups, len(values))
    return strata.sum(values)[strata.index]


def group_size(values: Tensor, groups: Tensor | None) -> Tensor:
    """The number of rows in each row's group [N]."""
    return group_sum(torch.ones_like(values), groups)


def group_mean(values: Tensor, groups: Tensor | None) -> Tensor:
    """The mean over each row's group [N], the row included."""
    return group_sum(values, groups) / group_size(values, groups)


def group_std(values: Tensor, groups: Tensor | None) -> Tensor:
    """The sample standard deviation of each row's group [N]; 0 in a group of one."""
    squares = group_sum((values - group_mean(values, groups)).square(), groups)
    return (squares / (group_size(values, groups) - 1).clamp_min(1)).sqrt()


def others_mean(values: Tensor, groups: Tensor | None) -> Tensor:
    """The mean over the other rows of each row's group [N]. Raises UsageError for a group of one."""
    size = group_size(values, groups)
    if bool((size < 2).any()):
        raise UsageError(
            "training.batch_size: a prompt has only one sample in a batch, so there are no others to compare it with; "
            "draw at least two of each prompt"
        )
    return (group_sum(values, groups) - values) / (size - 1)


def baseline(kind: Baseline, rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """The baseline of each reward [N]: 0, the mean of its group, or the mean of the others in its group."""
    if kind == "none":
        return torch.zeros_like(rewards)
    return group_mean(rewards, groups) if kind == "mean" else others_mean(rewards, groups)
