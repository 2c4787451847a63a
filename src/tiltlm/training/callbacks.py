"""Callbacks: what a user may hang on to the loop, with the names that Hugging Face users expect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tiltlm.training.progress import Progress

if TYPE_CHECKING:
    from tiltlm.lm import Roles
    from tiltlm.targets import Target
    from tiltlm.training.metrics import StepMetrics


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
