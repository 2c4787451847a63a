"""The partition function Z = Σ P(x), estimated in log space from rounds of samples as they stream in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from tiltlm.errors import CheckpointError
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.weights import checked_log_weights, no_hit

# The weight of a past round in the rating of the next one: proposals change, so recent rounds count most.
REMEMBERED = 0.5


@dataclass(frozen=True)
class Partition:
    """The state of the estimate of log Z; ``updated`` returns the next state.

    Each round's samples get one rating α, and Ẑ = Σ α w / Σ α n over all samples. α is the inverse of the
    expected variance of w/Z in the round, CV² = n/ESS − 1, predicted from earlier rounds. Logarithms are −inf where a
    sum is still 0; ``recent_*`` are sums over past rounds that fade by half with each.
    """

    rounds: int = 0
    samples: int = 0
    hits: int = 0
    rating_sum: float = 0.0
    rating_squares: float = 0.0
    log_weight_sum: float = -math.inf
    log_weight_rated_twice: float = -math.inf
    log_square_rated_twice: float = -math.inf
    recent_effective: float = 0.0
    recent_samples: float = 0.0

    @classmethod
    def empty(cls) -> Partition:
        """The state before the first round."""
        return cls()

    @property
    def known(self) -> bool:
        """Whether a sample has hit the target yet; while none has, the estimate of Z is 0 and log Z is −inf."""
        return self.log_weight_sum > -math.inf

    def rating(self, log_weights: Tensor) -> float:
        """α of a round with these log-weights [N]: the inverse variance that earlier rounds predict."""
        n = len(log_weights)
        # A round's own variance must not rate it: it is correlated with the round's estimate, which would bias Z.
        # Earlier rounds are independent of it; the +1s (rule of succession) keep ratings finite.
        past_effective, past = self.recent_effective, self.recent_samples
        if not self.rounds:
            past_effective, past = _effective(log_weights), float(n)
        return (past_effective + 1) / (max(past - past_effective, 0.0) + 1)

    def updated(self, log_weights_N: Tensor, prompts_N: Tensor | None = None) -> Partition:
        """The state after one more round, log w = log P − log q [N]; a round without hits lowers Z.

        All samples count alike, whatever their prompts [N].
        """
        log_weights = checked_log_weights(log_weights_N)
        n = len(log_weights)
        log_sum = float(log_weights.logsumexp(0))
        log_squares = float((2 * log_weights).logsumexp(0))
        effective, rating = _effective(log_weights), self.rating(log_weights)
        return Partition(
            rounds=self.rounds + 1,
            samples=self.samples + n,
            hits=self.hits + int((log_weights > -math.inf).sum()),
            rating_sum=self.rating_sum + rating * n,
            rating_squares=self.rating_squares + rating**2 * n,
            log_weight_sum=_log_add(self.log_weight_sum, math.log(rating) + log_sum),
            log_weight_rated_twice=_log_add(self.log_weight_rated_twice, 2 * math.log(rating) + log_sum),
            log_square_rated_twice=_log_add(self.log_square_rated_twice, 2 * math.log(rating) + log_squares),
            recent_effective=REMEMBERED * self.recent_effective + effective,
            recent_samples=REMEMBERED * self.recent_samples + n,
        )

    @property
    def log_z(self) -> Estimate:
        """log Ẑ, in nats, with standard error (the relative error of Ẑ); −inf with error nan while not ``known``."""
        if not self.known:
            return Estimate(-math.inf, math.nan)
        log_z = self.log_weight_sum - math.log(self.rating_sum)
        # Σ α²(w/Ẑ − 1)², about the pooled mean, so that a round without hits has a variance too.
        variance_sum = (
            math.exp(self.log_square_rated_twice - 2 * log_z)
            - 2 * math.exp(self.log_weight_rated_twice - log_z)
            + self.rating_squares
        )
        rated = self.rating_sum**2 / self.rating_squares
        if rated <= 1 + 1e-9:
            return Estimate(log_z, math.nan)
        return Estimate(log_z, math.sqrt(max(variance_sum, 0.0) * rated / (rated - 1)) / self.rating_sum)

    def at(self, prompts_N: Tensor) -> float:
        """log Ẑ of the one prompt."""
        return self.log_z.value

    def to_json(self) -> dict[str, float | None]:
        """The state for a checkpoint; ``from_json`` gives it back bit for bit (None stands for −inf)."""
        return {name: value if value > -math.inf else None for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, state: Mapping[str, float | None]) -> Partition:
        """The state that ``to_json`` wrote; raises CheckpointError for missing, unknown or non-numeric fields."""
        names = {field.name for field in fields(cls)}
        if set(state) != names:
            raise CheckpointError(
                f"partition has fields {sorted(state)} and needs {sorted(names)}; resume an intact save"
            )
        values: dict[str, Any] = {}
        for name, value in state.items():
            if value is None and name.startswith("log_"):
                value = -math.inf
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise CheckpointError(f"partition.{name} is {value!r} and must be a number; resume an intact save")
            values[name] = value
        return cls(**values)


def log_partition(log_weights_N: Tensor) -> Estimate:
    """log Z from one round of log-weights [N] alone: logsumexp − log N, with √(1/ESS − 1/N) as error."""
    return Partition.empty().updated(log_weights_N).log_z


def _effective(log_weights: Tensor) -> float:
    """(Σw)²/Σw² [N]; 0 where no sample hits."""
    log_sum, log_squares = float(log_weights.logsumexp(0)), float((2 * log_weights).logsumexp(0))
    return 0.0 if no_hit(log_weights) else math.exp(2 * log_sum - log_squares)


def _log_add(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
