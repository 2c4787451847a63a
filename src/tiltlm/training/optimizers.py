"""Optimizers and learning-rate schedules by name; an unknown name is an error, never a silent default."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tiltlm.errors import UsageError, nearest

if TYPE_CHECKING:
    from tiltlm.config.training import TrainingArguments


UNFIT = {
    "lbfgs": "evaluates the loss several times a step, which sampled gradients do not allow",
    "sparseadam": "takes sparse gradients only, which language models do not have",
}
# Settings of an optimizer that say how it computes.
OTHER_WAYS = {"fused", "foreach", "differentiable", "capturable"}
# Parameters of a schedule that other settings of a run decide.
SET_BY_US = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of torch.optim with this name, whatever its case. Raises UsageError for an unknown one."""
    known = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name.lower() in UNFIT:
        raise UsageError(f"training.optim: '{name}' {UNFIT[name.lower()]}; choose another, such as adam or sgd")
    if name.lower() not in known:
        raise UsageError(f"training.optim: '{name}' is no optimizer of torch.optim; {nearest(name.lower(), known)}")
    return known[name.lower()]


def build_optimizer(parameters: Iterable[torch.nn.Parameter], args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that ``args`` name. Raises UsageError when it refuses its arguments or the parameters."""
    if "lr" in args.optim_args:
        raise UsageError(f"training.optim_args: lr {args.optim_args['lr']!r} belongs into training.learning_rate")
    chosen, settings = optimizer_class(args.optim), {"lr": args.learning_rate, **args.optim_args}
    weights = list(parameters)
    # One kernel for all of a step, where torch has it and the user has not chosen another way. Under loss scaling it
    # would hide that a step was skipped.
    possible = "fused" in inspect.signature(chosen).parameters and not args.fp16
    if possible and not OTHER_WAYS & set(args.optim_args):
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            return chosen(weights, **{**settings, "fused": True})
    try:
        return chosen(weights, **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"training.optim: {args.optim} with {settings} was refused: {error}") from error


def build_scheduler(optimizer: torch.optim.Optimizer, args: TrainingArguments) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of transformers that ``args`` name. Raises UsageError for an unknown one and unknown settings."""
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    known = [kind.value for kind in SchedulerType]
    if args.lr_scheduler_type not in known:
        raise UsageError(
            f"training.lr_scheduler_type: '{args.lr_scheduler_type}' is no scheduler of transformers; "
            f"{nearest(args.lr_scheduler_type, known)}"
        )
    _reject_ignored(args, list(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type]).parameters))
    try:
        scheduler: torch.optim.lr_scheduler.LRScheduler = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.warmup_steps,
            num_training_steps=args.max_steps,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs) or None,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"training.lr_scheduler_kwargs: {args.lr_scheduler_type} refused {dict(args.lr_scheduler_kwargs)}: {error}"
        ) from error
    if "metrics" in inspect.signature(scheduler.step).parameters:
        raise UsageError(
            f"training.lr_scheduler_type: '{args.lr_scheduler_type}' follows a validation metric, and there is none "
            f"here; choose one that counts steps, such as linear or cosine"
        )
    return scheduler


def _reject_ignored(args: TrainingArguments, parameters: list[str]) -> None:
    """Refuse what transformers would leave out without a word: the constant schedules look at few settings."""
    name = args.lr_scheduler_type
    if "kwargs" in parameters:
        return  # those that follow a metric: not for us anyway
    if args.warmup_steps and "num_warmup_steps" not in parameters:
        raise UsageError(
            f"training.warmup_steps: {args.warmup_steps} would be ignored, because the schedule '{name}' has no "
            f"warm-up; choose training.lr_scheduler_type constant_with_warmup, or leave warmup_steps out"
        )
    further = [key for key in parameters if key not in SET_BY_US]
    for key in args.lr_scheduler_kwargs:
        if key not in further:
            advice = nearest(key, further) if further else "it takes none, so leave them out"
            raise UsageError(f"training.lr_scheduler_kwargs: the schedule '{name}' takes no '{key}'; {advice}")
