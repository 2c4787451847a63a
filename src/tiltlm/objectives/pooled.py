"""The pool's objective: samples of many laws count as drawn from their mixture m, and a measured multiple of π/m goes.

E_m[(π/m) ∇ log π] = 0, so any multiple κ of π/m may be taken off the weight P/(Z m). At κ = 1 nothing pulls at π = p.
Where hardly a sample carries the target's weight, though, that pull is noise in every step, and an optimizer that
scales its steps makes as much of it as of the few hits; and where few carry the policy's, less of it is less noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tiltlm.objectives.dpg import policy_weight, target_weight
from tiltlm.objectives.objective import Record
from tiltlm.objectives.settings import flag, number

# The ESS of P/m, in samples of an update, from which π/m is taken off at all; the ESS of π/m, as a share of them, above
# which all of it is; and how fast κ moves, an update.
ENOUGH_HITS, MOST_CARRY, RATE = 5.0, 0.5, 0.1


@dataclass(frozen=True)
class Pooled:
    """c = P/(Z m) − κ π/m.

    ``self_normalized``: Z is the mean of P/m over the pool, so that c = n w/Σw − κ r; else the running estimate, from
    earlier batches. With ``adaptive`` κ moves, from ``kappa``, to what is best for the samples of earlier updates, as
    none may set its own baseline: 0 while few of them carry w = P/(Z m), 1 while most of them carry r = π/m, and else
    E[w r]/E[r²], the regression of w on r, in [0, 1].
    """

    name: str = "pooled"
    self_normalized: bool = True
    kappa: float = 0.0
    adaptive: bool = True
    moving: ClassVar[str] = "kappa"

    def __post_init__(self) -> None:
        flag("self_normalized", self.self_normalized)
        number("kappa", self.kappa, 0, 1)
        flag("adaptive", self.adaptive)

    def coefficients(self, record: Record) -> Tensor:
        """P/(Z m) − κ π/m [N]."""
        return target_weight(record) - self.kappa * policy_weight(record)

    def adapted(self, record: Record) -> Pooled:
        """The same for the next samples, with ``kappa`` a little nearer to what is best for these."""
        best = best_kappa(target_weight(record), policy_weight(record))
        if not self.adaptive or not math.isfinite(best):
            return self
        return replace(self, kappa=self.kappa + RATE * (best - self.kappa))


def best_kappa(w: Tensor, r: Tensor) -> float:
    """The multiple of r [N] to take off w [N]; not finite where they are not."""
    if float(w.sum()) ** 2 < ENOUGH_HITS * float(w.square().sum()) or not bool(w.any()):
        return 0.0
    squares = float(r.square().mean())
    if squares == 0:
        return 0.0
    if float(r.mean()) ** 2 > MOST_CARRY * squares:
        return 1.0
    regression = float((w * r).mean()) / squares
    return min(max(regression, 0.0), 1.0) if math.isfinite(regression) else math.nan
