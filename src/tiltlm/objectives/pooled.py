"""The objective of a replay buffer: samples count as drawn from the mixture m of all proposals that drew them.

E_m[(π/m) ∇ log π] = 0, so any multiple κ of π/m may be subtracted from the weight P/(Z m). At κ = 1 the coefficient is
0 at π = p. If few samples carry the target's weight, the baseline is mostly noise, and an optimizer that normalizes
its steps amplifies it. If few samples carry the policy's weight, a smaller κ has less variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tiltlm.objectives.dpg import policy_weight, target_weight
from tiltlm.objectives.objective import Objective
from tiltlm.objectives.record import Record
from tiltlm.objectives.settings import flag, number

# κ moves to 0 below this ESS of P/m, in samples of an update, and to 1 above this ESS of π/m, as a share of them.
ENOUGH_HITS, MOST_CARRY = 5.0, 0.5
# The step of κ per update, as a share of its distance to the best value.
RATE = 0.1


@dataclass(frozen=True)
class Pooled(Objective):
    """c = P/(Z m) − κ π/m.

    With ``self_normalized`` Z is the mean of P/m over the buffer, so c = n w/Σw − κ r; without, it is the running
    estimate from earlier batches. With ``adaptive`` κ starts at ``kappa`` and moves to the best value for samples of
    earlier updates, because a batch that set its own baseline would bias it. The best κ is 0 while few samples carry
    w = P/(Z m), 1 while most carry r = π/m, and else E[w r]/E[r²], the regression of w on r, in [0, 1].
    """

    name: ClassVar[str] = "pooled"
    default_proposal: ClassVar[str] = "interval"
    adaptive_field: ClassVar[str | None] = "kappa"
    self_normalized: bool = True
    kappa: float = 0.0
    adaptive: bool = True

    def __post_init__(self) -> None:
        flag("self_normalized", self.self_normalized)
        number("kappa", self.kappa, 0, 1)
        flag("adaptive", self.adaptive)

    @property
    def normalized_by_replay(self) -> bool:
        return self.self_normalized

    def coefficients(self, record: Record) -> Tensor:
        """P/(Z m) − κ π/m [N]."""
        return target_weight(record) - self.kappa * policy_weight(record)

    def adapted(self, record: Record) -> Pooled:
        """The objective for the next samples, with ``kappa`` one step nearer to the best value for these."""
        best = best_kappa(target_weight(record), policy_weight(record))
        if not self.adaptive or not math.isfinite(best):
            return self
        return replace(self, kappa=self.kappa + RATE * (best - self.kappa))


def best_kappa(w: Tensor, r: Tensor) -> float:
    """The multiple of r [N] to subtract from w [N]; not finite where the weights are not."""
    if float(w.sum()) ** 2 < ENOUGH_HITS * float(w.square().sum()) or not bool(w.any()):
        return 0.0
    squares = float(r.square().mean())
    if squares == 0:
        return 0.0
    if float(r.mean()) ** 2 > MOST_CARRY * squares:
        return 1.0
    regression = float((w * r).mean()) / squares
    return min(max(regression, 0.0), 1.0) if math.isfinite(regression) else math.nan
