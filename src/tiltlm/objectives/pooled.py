"""The pool's objective: samples of many laws count as drawn from their mixture m, and a measured multiple of π/m goes.

E_m[(π/m) ∇ log π] = 0, so any multiple κ of π/m may be taken off the weight P/(Z m). At κ = 1 nothing pulls at π = p;
where few samples carry π/m, as under laws that the policy has left behind, taking off less of it is less noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from tiltlm.objectives.dpg import policy_weight, target_weight
from tiltlm.objectives.objective import Record
from tiltlm.objectives.settings import flag, number

# A share of the samples: with an ESS of π/m above it κ is 1. And how fast κ moves, for each update.
HIGH_ESS, RATE = 0.5, 0.1


@dataclass(frozen=True)
class Pooled:
    """c = P/(Z m) − κ π/m.

    ``self_normalized``: Z is the mean of P/m over the pool, so that c = n w/Σw − κ r; else the running estimate, from
    earlier batches. With ``adaptive`` κ moves from ``kappa`` to the best for the samples of earlier updates, as no
    sample may set its own baseline: 1 while the ESS of r = π/m is high, else E[w r]/E[r²], the regression of w on r,
    in [0, 1].
    """

    name: str = "pooled"
    self_normalized: bool = True
    kappa: float = 1.0
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
        w, r = target_weight(record), policy_weight(record)
        squares = float(r.square().mean())
        regression = float((w * r).mean()) / squares if squares > 0 else math.nan
        if not self.adaptive or not math.isfinite(regression):
            return self
        best = 1.0 if float(r.mean()) ** 2 > HIGH_ESS * squares else min(max(regression, 0.0), 1.0)
        return replace(self, kappa=self.kappa + RATE * (best - self.kappa))
