"""Optimizers and learning-rate schedules by name; an unknown name is an error, never a silent default."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tiltlm.errors import UsageError, nearest

if TYPE_CHECKING:
    from tiltlm.training.arguments import TrainingArguments


UNFIT = {
    "lbfgs": "evaluates the loss several times a step, which sampled gradients do not allow",
    "sparseadam": "takes sparse gradients only, which language models do not have",
}


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
    try:
        return chosen(list(parameters), **settings)
    except (TypeError, ValueError) as error:
        raise UsageError(f"training.optim: {args.optim} with {settings} was refused: {error}") from error


def build_scheduler(optimizer: torch.optim.Optimizer, args: TrainingArguments) -> torch.optim.lr_scheduler.LRScheduler:
    """The schedule of transformers that ``args`` name. Raises UsageError for an unknown one."""
    from transformers import SchedulerType, get_scheduler

    known = [kind.value for kind in SchedulerType]
    if args.lr_scheduler_type not in known:
        raise UsageError(
            f"training.lr_scheduler_type: '{args.lr_scheduler_type}' is no scheduler of transformers; "
            f"{nearest(args.lr_scheduler_type, known)}"
        )
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
