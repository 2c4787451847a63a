"""The progress of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Steps done, sequences drawn, forward passes and seconds so far.

    ``passes_per_token`` is the number of passes per token that the policy was trained on.
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
