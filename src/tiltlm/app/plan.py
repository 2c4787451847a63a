"""The plan of a run: the parts of its config that need no model, built once and in one order."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tiltlm.app.build import build_own_target, build_terms, check_peft
from tiltlm.app.method import build_method, check_expressible
from tiltlm.app.objects import build_object
from tiltlm.app.prompts import PromptSplit, read_prompts
from tiltlm.config.run import RunConfig
from tiltlm.errors import UsageError
from tiltlm.features import Feature
from tiltlm.targets import Target, Term, TiltedTarget
from tiltlm.training.acceleration import check_trackers
from tiltlm.training.callbacks import Callback
from tiltlm.training.method import Method
from tiltlm.training.optimizers import build_optimizer, build_scheduler
from tiltlm.training.replay.schedule import check_pool
from tiltlm.training.surrogate import updates_per_batch


@dataclass(frozen=True)
class RunPlan:
    """The parts of a run before any model is loaded.

    ``terms`` are the features and moments of the target, not yet fitted; empty if the user gave an ``own_target``.
    """

    config: RunConfig
    method: Method
    terms: tuple[Term, ...]
    own_target: Target | None
    prompts: PromptSplit
    callbacks: tuple[Callback, ...] = ()

    @property
    def features(self) -> list[Feature]:
        """The features of the target."""
        own = self.own_target
        return list(own.features) if own is not None else [term.feature for term in self.terms]


def plan_run(config: RunConfig) -> RunPlan:
    """Build the parts of a config, before any model is loaded. Raises UsageError for a mistake in it."""
    # The run's optimizer needs the model's parameters; this one only checks its settings.
    build_scheduler(build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], config.training), config.training)
    method = build_method(config.method)
    check_trackers(config.report_to)
    if config.peft is not None:
        check_peft(config.peft)
    own = build_own_target(config) if config.target.python else None
    terms = () if own is not None else tuple(build_terms(config))
    check_expressible(method.objective, own if own is not None else TiltedTarget(terms))
    iterations = updates_per_batch(method.objective, config.training.num_iterations)
    check_pool(config.training, iterations, method.objective, method.rule)
    return RunPlan(config, method, terms, own, read_prompts(config), tuple(build_callbacks(config)))


def build_callbacks(config: RunConfig) -> list[Callback]:
    """The callbacks that the config names. Raises UsageError."""
    built = [build_object("callbacks", name, {}) for name in config.callbacks]
    for name, callback in zip(config.callbacks, built, strict=True):
        if not isinstance(callback, Callback):
            raise UsageError(f"callbacks: '{name}' is not a tiltlm.Callback; derive it from that class")
    return built
