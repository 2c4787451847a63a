"""Where a run stands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a run stands: steps done of all, sequences drawn and sequence-forward passes so far, seconds spent.

    ``passes_per_token`` is how often a token went through a model for each token that the policy was trained on.
    """

    step: int
    max_steps: int
    sequences: int
    forward_passes: int
    seconds: float
    passes_per_token: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The ``progress`` section of ``run.json``."""
        return {name: value for name, value in asdict(self).items() if name != "seconds"}
