"""Callbacks: what a user may hang on to the loop, with the names that Hugging Face users expect."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiltlm.lm import Roles
    from tiltlm.targets import Target
    from tiltlm.training.metrics import StepMetrics


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


class Callback:
    """Base of callbacks; override what you need. An exception raised here stops the run like any other."""

    def on_train_begin(self, progress: Progress, roles: Roles, target: Target) -> None:
        """Before the first step of a sitting, with the models and the target; sampling from them changes nothing."""

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        """After every optimizer step, with its measurements."""

    def on_log(self, progress: Progress, metrics: StepMetrics) -> None:
        """Every ``logging_steps`` steps."""

    def on_save(self, progress: Progress, checkpoint: Path) -> None:
        """After a checkpoint is safely on disk."""
