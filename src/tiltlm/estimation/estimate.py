"""An estimate: a number with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A value estimated from samples, in the unit of what it estimates, with its standard error in the same unit."""

    value: float
    se: float

    def to_json(self) -> dict[str, float | None]:
        """``{"value": v, "se": s}``; None for numbers that are not finite, as JSON has no NaN."""
        return {name: x if math.isfinite(x) else None for name, x in (("value", self.value), ("se", self.se))}

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.se:.2g}"
