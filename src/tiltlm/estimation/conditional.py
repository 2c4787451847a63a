"""log Z of each of several prompts as samples stream in: an own estimate, shrunk if it rests on few samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tiltlm.errors import CheckpointError
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.partition import Partition
from tiltlm.estimation.strata import Strata
from tiltlm.estimation.weights import checked_log_weights

# The hits that a prompt without any hit counts as.
HALF_A_HIT = 0.5
# The smallest variance of a prompt's own estimate: logarithms of equal weights differ by rounding.
LEAST_VARIANCE = 1e-12
BISECTIONS = 60
SUMS = ("rated", "rated_twice", "hits", "hits_twice")
LOG_SUMS = ("log_weights", "log_weights_twice", "log_squares_twice")


@dataclass(frozen=True, eq=False)
class PromptPartition:
    """The state of the estimate of log Z for C prompts; ``updated`` returns the next state.

    ``pooled`` is the ``Partition`` of all samples whatever their prompt: it estimates Z̄, the mean of Z over prompts,
    and rates the rounds with α. The sums [C] are each prompt's own: Σα and Σα² over its samples and over those that hit
    the target, log Σαw, log Σα²w and log Σα²w². The estimate of a prompt is

        log Z_c = b_c y_c + (1 − b_c) log Z̄,        b_c = τ² / (τ² + s_c²),        y_c = log Σαw/Σα

    with τ² the variance of log Z between prompts and s_c² that of y_c about it. That is the logarithm of E[Z_c | y_c]
    where log Z is normal with E[Z] = Z̄ (empirical Bayes; Efron & Morris 1973): a prompt without samples has Z̄, one with
    many its own estimate. For n_c samples with h_c hits (Kish's numbers, (Σα)²/Σα²)

        s_c² = (1 + κ)/h_c − 1/n_c

    where κ, the relative variance of the weights of a prompt's hits, is pooled over prompts: a few weights estimate
    their variance badly, most of all without the large ones. A prompt without hits counts as having half a hit of mean
    weight. τ² is the estimate of Paule & Mandel (1982), 0 where prompts differ no more than
    their errors explain.
    """

    pooled: Partition
    rated: Tensor
    rated_twice: Tensor
    hits: Tensor
    hits_twice: Tensor
    log_weights: Tensor
    log_weights_twice: Tensor
    log_squares_twice: Tensor

    @classmethod
    def empty(cls, count: int) -> PromptPartition:
        """The state of ``count`` prompts before the first round."""
        nothing = torch.zeros(count, dtype=torch.float64)
        return cls(
            Partition.empty(),
            **dict.fromkeys(SUMS, nothing),
            **dict.fromkeys(LOG_SUMS, torch.full_like(nothing, -math.inf)),
        )

    @property
    def count(self) -> int:
        """The number C of prompts."""
        return len(self.rated)

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return self.pooled.rounds

    @property
    def samples(self) -> int:
        """Samples so far."""
        return self.pooled.samples

    @property
    def known(self) -> bool:
        """Whether a sample has hit the target yet."""
        return self.pooled.known

    def updated(self, log_weights_N: Tensor, prompts_N: Tensor) -> PromptPartition:
        """The state after one more round, log w = log P − log q [N], with the place of each sample's prompt [N]."""
        log_weights = checked_log_weights(log_weights_N)
        strata, rating = Strata(prompts_N.cpu(), self.count), self.pooled.rating(log_weights)
        everyone, hit = torch.ones_like(log_weights), (log_weights > -math.inf).double()
        plain = {"rated": rating * everyone, "rated_twice": rating**2 * everyone}
        plain |= {"hits": rating * hit, "hits_twice": rating**2 * hit}
        twice = 2 * math.log(rating)
        logs = {"log_weights": math.log(rating) + log_weights, "log_weights_twice": twice + log_weights}
        logs |= {"log_squares_twice": twice + 2 * log_weights}
        return replace(
            self,
            pooled=self.pooled.updated(log_weights),
            **{name: getattr(self, name) + strata.sum(values) for name, values in plain.items()},
            **{name: torch.logaddexp(getattr(self, name), strata.logsumexp(values)) for name, values in logs.items()},
        )

    @cached_property
    def _shrinkage(self) -> tuple[Tensor, Tensor, Tensor]:
        """y, s² and b [C]; b is 0 for a prompt without samples, or if the variance of hits is unknown."""
        seen, hit = self.rated > 0, self.hits > 0
        n = torch.where(seen, self.rated**2 / self.rated_twice.clamp_min(1e-300), 1.0)
        h = torch.where(hit, self.hits**2 / self.hits_twice.clamp_min(1e-300), HALF_A_HIT)
        kappa = self._relative_variance_of_hits()
        half = math.log(HALF_A_HIT) + self.log_weights.logsumexp(0) - self.hits.sum().log() - n.log()
        own = torch.where(hit, self.log_weights - self.rated.clamp_min(1e-300).log(), half)
        variance = ((1 + kappa) / h - 1 / n).clamp_min(LEAST_VARIANCE)
        between = _variance_between(own[seen], variance[seen]) if math.isfinite(kappa) else 0.0
        weight = torch.where(seen & variance.isfinite(), between / (between + variance), 0.0)
        return torch.where(weight > 0, own, 0.0), torch.where(weight > 0, variance, 0.0), weight

    def _relative_variance_of_hits(self) -> float:
        """κ: Σ_c Σ α²(w/w̄_c − 1)² over hits, w̄_c their mean weight, per degree of freedom; inf where there is none."""
        hit = self.hits > 0
        hits, twice = self.hits[hit], self.hits_twice[hit]
        log_mean = self.log_weights[hit] - hits.log()
        squares = (
            (self.log_squares_twice[hit] - 2 * log_mean).exp()
            - 2 * (self.log_weights_twice[hit] - log_mean).exp()
            + twice
        )
        freedom = float((twice * (1 - twice / hits**2)).sum())
        return float(squares.clamp_min(0).sum()) / freedom if freedom > 1e-9 else math.inf

    @cached_property
    def by_prompt(self) -> Tensor:
        """log Z of each prompt [C], in nats; −inf for all while not ``known``."""
        own, _, weight = self._shrinkage
        pooled = self.pooled.log_z.value
        if not self.known:
            return torch.full_like(own, pooled)
        return weight * own + (1 - weight) * pooled

    @property
    def log_z(self) -> Estimate:
        """log Z averaged over the prompts, with its standard error for these prompts."""
        if not self.known:
            return self.pooled.log_z
        _, variance, weight = self._shrinkage
        # b s² is a prompt's own part of the error; the shrunk part shares the error of the pooled estimate.
        own = float((weight.square() * variance).sum()) / self.count**2
        borrowed = float((1 - weight).mean()) * self.pooled.log_z.se
        return Estimate(float(self.by_prompt.mean()), math.sqrt(own + borrowed**2))

    def at(self, prompts_N: Tensor) -> Tensor:
        """log Z of each sample's prompt [N]."""
        return self.by_prompt[prompts_N.cpu()]

    def to_json(self) -> dict[str, Any]:
        """The state for a checkpoint; ``from_json`` gives it back bit for bit (None stands for −inf)."""
        sums = {name: getattr(self, name).tolist() for name in (*SUMS, *LOG_SUMS)}
        own = {name: [x if x > -math.inf else None for x in values] for name, values in sums.items()}
        return {"pooled": self.pooled.to_json(), "own": own}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> PromptPartition:
        """The state that ``to_json`` wrote; raises CheckpointError if it is incomplete."""
        try:
            own = {name: [-math.inf if x is None else float(x) for x in state["own"][name]] for name in SUMS + LOG_SUMS}
            tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in own.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"partition of the prompts is damaged ({error!r}); resume an intact save") from error
        if len({len(values) for values in own.values()}) != 1:
            raise CheckpointError("partition of the prompts is damaged (uneven columns); resume an intact save")
        return cls(Partition.from_json(state["pooled"]), **tensors)


def _variance_between(values: Tensor, variances: Tensor) -> float:
    """The variance between true values, of which ``values`` [C] were seen with errors of these variances [C].

    The one at which Σ (value − mean)²/(variance + τ²), with the same weights in the mean, is the C − 1 expected of it.
    """

    def excess(between: float) -> float:
        weights = 1 / (variances + between)
        mean = (weights * values).sum() / weights.sum()
        return float((weights * (values - mean).square()).sum()) - (len(values) - 1)

    if len(values) < 2 or excess(0.0) <= 0:
        return 0.0
    low, high = 0.0, float((values - values.mean()).square().sum())
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def partition_for(prompts: int) -> Partition | PromptPartition:
    """The state before the first round for so many prompts."""
    return PromptPartition.empty(prompts) if prompts > 1 else Partition.empty()
