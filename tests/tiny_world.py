"""A world small enough to be known in full: a base, a target on it, policies near it, and trainers of those."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from enumerable import tiny_model
from tiltlm.config.training import TrainingArguments
from tiltlm.exact import ExactTarget, enumerate_completions, exact_target
from tiltlm.features import build_feature, length
from tiltlm.lm import LanguageModel, Roles, Samples, SamplingSettings
from tiltlm.objectives import BUILT_IN, Objective
from tiltlm.targets import BaseSample, Term, TiltedTarget, draw_base_sample
from tiltlm.training.callbacks import Callback
from tiltlm.training.method import Method
from tiltlm.training.proposal_rules import ProposalRule, proposal_rule
from tiltlm.training.trainer import Trainer

LENGTH = 4
# Those whose mean gradient is that of KL(p‖π), whatever the proposal.
KL_METHODS = ("dpg", "gdc", "gdc++", "pooled", "guided")
LORA: dict[str, Any] = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}


@dataclass(frozen=True)
class World:
    """The base a, a target with a filter, a moment and a reward, and both on all 341 completions."""

    base: LanguageModel
    target: TiltedTarget
    samples: Samples
    truth: ExactTarget
    base_sample: BaseSample

    def logprob(self, model: LanguageModel) -> Tensor:
        """log-probability [N] of every completion under a model."""
        with torch.no_grad():
            return model.logprob(self.samples, settings=SamplingSettings()).double().sum(-1)

    def kl(self, model: LanguageModel) -> float:
        """KL(p‖model), exactly."""
        p = self.truth.logprob
        return float((p.exp() * torch.where(p.isfinite(), p - self.logprob(model), 0.0)).sum())

    def tv(self, model: LanguageModel) -> float:
        """TV(p, model), exactly."""
        return 0.5 * float((self.truth.logprob.exp() - self.logprob(model).exp()).abs().sum())


@cache
def tiny_world(strength: float = 1.0) -> World:
    """The world; ``strength`` scales how far the target's tilt leads away from the base."""
    base = tiny_model("gpt2", "pad_is_eos")
    terms = (
        Term(build_feature({"not": {"contains": "c"}}).renamed("no c"), "filter", 1.0),
        Term(build_feature({"contains": "a"}).renamed("a"), "moment", 0.6, 1.1 * strength),
        Term(length("words").renamed("words"), "reward", coefficient=0.5 * strength),
    )
    # Without the filter, a small strength brings the target as near to the base as one likes.
    target = TiltedTarget(terms if strength >= 1 else terms[1:])
    samples = enumerate_completions(base, max_completion_length=LENGTH)
    drawn = draw_base_sample(base, target.features, 600, None, LENGTH, seed=11)
    return World(base, target, samples, exact_target(base, target, samples), drawn)


def as_if_uniform(samples: Samples) -> Samples:
    """All N completions as a sample from the law 1/N, under which a plain mean is an exact expectation."""
    # Token by token it is the share of completions that go on so, which a weight of prefixes asks for.
    rows = samples.completion_ids
    shared = Counter(tuple(row[:t]) for row in rows for t in range(len(row) + 1))
    logprob = torch.zeros_like(samples.proposal_logprob)
    for i, row in enumerate(rows):
        for t in range(len(row)):
            logprob[i, t] = math.log(shared[tuple(row[: t + 1])] / shared[tuple(row[:t])])
    return replace(samples, proposal_logprob=logprob)


def near(model: LanguageModel, distance: float = 0.01, seed: int = 0) -> LanguageModel:
    """A copy with noise on every weight."""
    copied = model.copy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter += distance * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return copied


def build_trainer(
    world: World,
    *,
    policy: LanguageModel | None = None,
    method: str | Objective = "gdc++",
    rule: str | ProposalRule = "on_policy",
    check_steps: int = 2,
    lora: bool = False,
    folder: Path | None = None,
    seed: int = 5,
    callbacks: tuple[Callback, ...] = (),
    base_sample: BaseSample | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer in the world: batches of 200 by default, no reuse of the fit's samples."""
    args = {"batch_size": 200, "max_steps": 8, "learning_rate": 0.001, "reuse_fit_samples": False, **settings}
    adapted = Roles(world.base.copy().with_lora(**LORA)) if lora else None
    objective = BUILT_IN[method]() if isinstance(method, str) else method
    chosen = Method(objective, proposal_rule(rule, check_steps) if isinstance(rule, str) else rule)
    trainer = Trainer(
        adapted or Roles(policy or world.base.copy(), base=world.base),
        world.target,
        chosen,
        TrainingArguments(**args),
        base_sample=base_sample or world.base_sample,
        seed=seed,
    )
    trainer.checkpoint_dir = folder
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def gradient(trainer: Trainer, *, clear: bool = True) -> Tensor:
    """What has accumulated on the policy's parameters, as one vector."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in trainer.parameters.values()]
    vector = torch.cat([part.detach().clone().flatten() for part in parts])
    if clear:
        trainer.optimizer.zero_grad(set_to_none=True)
    return vector


def flat(gradients: dict[str, Tensor], trainer: Trainer | None = None) -> Tensor:
    """Gradients by name as one vector, in the trainer's order."""
    names = trainer.parameters if trainer is not None else gradients
    return torch.cat([gradients[name].flatten() for name in names])


def true_gradient(world: World, policy: LanguageModel) -> dict[str, Tensor]:
    """∇KL(p‖π) by differentiating the exact divergence itself."""
    logprob = policy.logprob(world.samples, settings=SamplingSettings()).sum(-1)
    p = world.truth.logprob
    kl = (p.exp() * torch.where(p.isfinite(), p - logprob, 0.0)).sum()
    named = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(kl, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}
