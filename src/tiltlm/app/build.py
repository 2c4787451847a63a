"""Build the models and the target of a config."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from tiltlm.app.objects import at_field, build_object
from tiltlm.config.run import ConstraintConfig, RewardConfig, RunConfig
from tiltlm.errors import UsageError, nearest
from tiltlm.features import Feature, build_feature
from tiltlm.features.registry import OBJECT
from tiltlm.lm import LanguageModel, Roles
from tiltlm.targets import Target, Term, target_terms


def build_base(config: RunConfig) -> LanguageModel:
    """The model that the config names, on its device, without an adapter."""
    base = LanguageModel.from_pretrained(
        config.model,
        device=config.device,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        revision=config.revision,
    )
    if base.guide is not None:
        raise UsageError(
            f"model: '{config.model}' keeps a guide (method kept_guide, or training.keep_guide) and cannot be a base; "
            f"tune its own base toward both targets at once, or choose another method for it"
        )
    return base


def build_roles(config: RunConfig, base: LanguageModel) -> Roles:
    """Base and policy: one set of weights with an adapter for ``peft``, else the base and a copy of it."""
    if config.peft is not None:
        check_peft(config.peft)
        return Roles(base.with_lora(seed=config.seed, **config.peft))
    return Roles(base.copy(), base=base)


def build_terms(config: RunConfig, objects: Sequence[Feature] = ()) -> list[Term]:
    """The features and moments of the target, not yet fitted. Raises UsageError for a wrong constraint.

    ``objects`` are features that a run file cannot name; they are matched by name.
    """
    constraints = [
        (_feature(f"target.constraints.{i}", constraint, objects), constraint.moment)
        for i, constraint in enumerate(config.target.constraints)
    ]
    reward = config.target.reward
    if reward is None:
        return target_terms(constraints)
    return target_terms(constraints, reward=_feature("target.reward", reward, objects), beta=reward.beta)


def build_own_target(config: RunConfig) -> Target:
    """The user's own target, ``target.python``. Raises UsageError if it is not a target."""
    target = build_object("target.python", str(config.target.python), config.target.args)
    if not isinstance(target, Target):
        raise UsageError(
            f"target.python: '{config.target.python}' has no features and log_score(base_logprob, features)"
        )
    return target


def _feature(field: str, section: ConstraintConfig | RewardConfig, objects: Sequence[Feature]) -> Feature:
    with at_field(f"{field}.feature"):
        known = [feature for feature in objects if section.feature == {OBJECT: feature.name}]
        feature = build_feature(known[0] if known else section.feature)
        return feature.renamed(section.name) if section.name is not None else feature


def check_peft(settings: dict[str, Any]) -> None:
    """Raise UsageError for settings that peft.LoraConfig does not have or that tiltlm sets itself."""
    from peft import LoraConfig

    own = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode")
    valid = [name for name in inspect.signature(LoraConfig).parameters if name not in own]
    for key in settings:
        if key not in valid:
            raise UsageError(f"peft: unknown setting '{key}' of peft.LoraConfig; {nearest(key, valid)}")
