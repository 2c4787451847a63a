"""Accelerate's part: mixed precision, backward and trackers, on one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiltlm.errors import UsageError, nearest
from tiltlm.training.callbacks import Callback
from tiltlm.training.progress import Progress
from tiltlm.training.ranks import check_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tiltlm.config.training import TrainingArguments
    from tiltlm.training.metrics import StepMetrics


def build_accelerator(args: TrainingArguments, device: torch.device) -> Accelerator:
    """An accelerator for the device that the model is on. Raises UsageError for precision that it cannot do."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if args.bf16 and args.fp16:
        raise UsageError("training.bf16, training.fp16: choose one of them")
    # Accelerate shares its settings among all accelerators of a process. A new dictionary leaves those of a run that
    # is still alive unchanged; accelerate's own reset would clear them.
    AcceleratorState._shared_state = {}
    if PartialState._shared_state and PartialState().device.type != device.type:
        PartialState._shared_state = {}
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    except ValueError as error:
        raise UsageError(f"training.{precision}: not possible on {device}: {error}") from error
    if precision != "no" and not accelerator.native_amp:
        # Accelerate would go on in full precision without a word.
        raise UsageError(f"training.{precision}: not possible on {device}; leave it out, or try bf16")
    check_processes(accelerator)
    if precision != "no":
        # Accelerate's own asks the shared settings, which may be those of a younger run by now.
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        accelerator.autocast = partial(torch.autocast, device.type, dtype=dtype)
    return accelerator


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise UsageError for a tracker that accelerate does not know, or would leave out in silence."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    known, installed = [str(name) for name in LOGGER_TYPE_TO_CLASS], [str(name) for name in get_available_trackers()]
    for name in report_to:
        if name not in known:
            raise UsageError(f"report_to: '{name}' is no tracker of accelerate; {nearest(name, known)}")
        # Trackers that a user registered with accelerate are not among those that it counts as installed.
        if name in LoggerType.list() and name not in installed:
            raise UsageError(f"report_to: '{name}' is not installed; `pip install {name}`, or leave it out")


class Trackers(Callback):
    """Sends every logged step to the trackers of ``report_to``, through accelerate's own ``log_with``."""

    def __init__(self, report_to: Sequence[str], config: dict[str, Any], folder: Path) -> None:
        from accelerate import Accelerator

        check_trackers(report_to)
        try:
            self.accelerator = Accelerator(log_with=list(report_to), project_dir=str(folder))
            self.accelerator.init_trackers("tiltlm", config=flatten(config))
        except (ImportError, ValueError) as error:
            raise UsageError(f"report_to: {', '.join(report_to)} cannot be used here: {error}") from error

    def on_log(self, progress: Progress, metrics: StepMetrics) -> None:
        numbers = {key: value for key, value in flatten(metrics.to_json()).items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=progress.step)

    def close(self) -> None:
        """Tell the trackers that the run is over."""
        self.accelerator.end_training()


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a/b": 1}``; what no tracker stores becomes text."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}/"))
        else:
            flat[name] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
