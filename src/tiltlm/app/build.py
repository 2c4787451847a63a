"""From a config to objects: the only place that knows both."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tiltlm.config.prompt_data import PromptData, prompt_dataset, prompt_file, stated_prompts
from tiltlm.config.run import ConstraintConfig, MethodConfig, PromptsConfig, RewardConfig, RunConfig
from tiltlm.errors import TiltError, UsageError, nearest
from tiltlm.features import Feature, build_feature
from tiltlm.features.callables import load_object
from tiltlm.features.registry import OBJECT
from tiltlm.lm import LanguageModel, Prompts, Roles
from tiltlm.objectives import BUILT_IN, Objective
from tiltlm.targets import Target, Term, TiltedTarget, state_terms
from tiltlm.training.acceleration import check_trackers
from tiltlm.training.callbacks import Callback
from tiltlm.training.method import Method
from tiltlm.training.optimizers import build_optimizer, build_scheduler
from tiltlm.training.proposal_rules import proposal_rule
from tiltlm.training.replay.schedule import check_pool
from tiltlm.training.surrogate import updates_per_batch


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
            f"tune the model that it was tuned from toward both targets at once, or choose another method for it"
        )
    return base


def build_roles(config: RunConfig, base: LanguageModel) -> Roles:
    """Base and policy: one set of weights with ``peft``, else the base and a copy to tune."""
    if config.peft is not None:
        _check_peft(config.peft)
        return Roles(base.with_lora(seed=config.seed, **config.peft))
    return Roles(base.copy(), base=base)


def build_terms(config: RunConfig, objects: Sequence[Feature] = ()) -> list[Term]:
    """The features and moments of the target, not yet fitted. Raises UsageError for what is wrong as stated.

    ``objects`` are features that a run file cannot name, found by their names.
    """
    constraints = [
        (_named(f"target.constraints.{i}", constraint, objects), constraint.moment)
        for i, constraint in enumerate(config.target.constraints)
    ]
    reward = config.target.reward
    if reward is None:
        return state_terms(constraints)
    return state_terms(constraints, reward=_named("target.reward", reward, objects), beta=reward.beta)


def build_own_target(config: RunConfig) -> Target:
    """The user's own target, ``target.python``. Raises UsageError when it is none."""
    target = _built("target.python", str(config.target.python), config.target.args)
    if not isinstance(target, Target):
        raise UsageError(
            f"target.python: '{config.target.python}' has no features and log_score(base_logprob, features)"
        )
    return target


def build_method(config: MethodConfig) -> Method:
    """The objective and its proposal rule. Raises UsageError for unknown names."""
    objective: Any
    if config.name in BUILT_IN:
        objective = _built_in(config.name, config.args)
    elif ":" in config.name:
        objective = _built("method.name", config.name, config.args)
        if not isinstance(objective, Objective) or not objective.name:
            raise UsageError(
                f"method.name: '{config.name}' is no objective; derive it from tiltlm.Objective, give it a name and "
                f"coefficients(record)"
            )
    else:
        raise UsageError(f"method.name: '{config.name}' is not known; {nearest(config.name, BUILT_IN)}, module:name")
    rule = config.proposal or objective.default_proposal
    if objective.only_on_policy and rule != "on_policy":
        raise UsageError(f"method.proposal: {objective.name} trains on the policy's own samples; leave proposal out")
    return Method(objective, proposal_rule(rule, config.check_steps))


def check_expressible(objective: Objective, target: Target) -> None:
    """Raises UsageError where the method cannot reach the target, as one with infinite coefficients where P = 0."""
    reason = objective.needs_full_support
    filters = [term.feature.name for term in getattr(target, "terms", ()) if term.kind == "filter"]
    if reason and filters:
        raise UsageError(
            f"method.name: {objective.name} cannot reach a target with the filter '{filters[0]}': {reason}; or ask for "
            f"a moment below 1"
        )


def method_notes(objective: Objective, target: Target) -> list[str]:
    """What a user should know of this method on this target."""
    if objective.keeps_guide:
        return [
            f"{objective.name}: the policy is its weights and a guide, saved beside them as guide.safetensors. tiltlm "
            f"loads both; other libraries load only the weights, which define a different distribution. guided and "
            f"gdc++ leave a plain model"
        ]
    moments = [term.feature.name for term in getattr(target, "terms", ()) if term.kind == "moment"]
    if not moments or not objective.maximizes_reward:
        return []
    return [
        f"{objective.name} maximizes a reward and cannot stop at a moment: the reward is the sum of the target's tilts "
        f"λφ, and {', '.join(moments)} will end where that is largest, or where the KL penalty holds it"
    ]


def _built_in(name: str, args: dict[str, Any]) -> Objective:
    valid = list(inspect.signature(BUILT_IN[name]).parameters)
    for key in args:
        if not valid:
            raise UsageError(f"method.args: {name} takes no arguments, got {args}; leave them out")
        if key not in valid:
            raise UsageError(f"method.args: {name} has no '{key}'; {nearest(str(key), valid)}")
    return BUILT_IN[name](**args)


def build_callbacks(config: RunConfig) -> list[Callback]:
    """The user's own callbacks."""
    built = [_built("callbacks", name, {}) for name in config.callbacks]
    for name, callback in zip(config.callbacks, built, strict=True):
        if not isinstance(callback, Callback):
            raise UsageError(f"callbacks: '{name}' is no tiltlm.Callback; derive it from that class")
    return built


def check_names(config: RunConfig) -> None:
    """Everything that can be wrong as written, before any work begins. Raises UsageError."""
    build_scheduler(build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))], config.training), config.training)
    method = build_method(config.method)
    check_trackers(config.report_to)
    if config.peft is not None:
        _check_peft(config.peft)
    target = build_own_target(config) if config.target.python else TiltedTarget(tuple(build_terms(config)))
    check_expressible(method.objective, target)
    iterations = updates_per_batch(method.objective, config.training.num_iterations)
    check_pool(config.training, iterations, method.objective, method.rule)
    read_prompts(config)


@dataclass(frozen=True)
class PromptSplit:
    """The prompts to train on (None: none, a text begins with BOS), and those for evaluation alone, if there are."""

    training: PromptData | None
    held_out: PromptData | None = None


def read_prompts(config: RunConfig) -> PromptSplit:
    """The prompts of a config with their columns. Raises UsageError."""
    stated = config.prompts
    if stated is None:
        return PromptSplit(None)
    if not isinstance(stated, PromptsConfig):
        return PromptSplit(stated_prompts(stated))
    if stated.rows is not None:
        found = stated_prompts(stated.rows, stated.column)
    elif stated.path is not None:
        found = prompt_file(stated.path, stated.column)
    else:
        found = prompt_dataset(str(stated.dataset), stated.column, subset=stated.subset, split=stated.split)
    if stated.samples is not None:
        found = found.select(range(min(stated.samples, len(found))))
    if stated.held_out is None:
        return PromptSplit(found)
    if isinstance(stated.held_out, float):
        return PromptSplit(*found.split(stated.held_out, config.fit_seed))
    return PromptSplit(found, other_prompts(config, stated.held_out))


def other_prompts(config: RunConfig | None, given: str | list[Any]) -> PromptData:
    """Prompts beside those of a config, from the same column: a list, a file, or one prompt. Raises UsageError."""
    stated = config.prompts if config is not None else None
    return stated_prompts(given, stated.column if isinstance(stated, PromptsConfig) else "prompt")


def encode_prompts(model: LanguageModel, data: PromptData | None) -> Prompts:
    """The prompts as tokens of a model, with their columns; one that is just BOS where there are none."""
    return model.encode_prompts(None) if data is None else model.encode_prompts(data.prompts, data.columns)


@contextmanager
def _at(field: str) -> Iterator[None]:
    """Begin what is wrong inside with the place of the run file where it stands."""
    try:
        yield
    except TiltError as error:
        # Where it stands in the run file says it better than what it is.
        raise type(error)(f"{field}: {str(error).removeprefix('feature: ').removeprefix('python: ')}") from error


def _named(field: str, stated: ConstraintConfig | RewardConfig, objects: Sequence[Feature]) -> Feature:
    with _at(f"{field}.feature"):
        known = [feature for feature in objects if stated.feature == {OBJECT: feature.name}]
        feature = build_feature(known[0] if known else stated.feature)
        return feature.renamed(stated.name) if stated.name is not None else feature


def _built(field: str, name: str, args: dict[str, Any]) -> Any:
    """The object that ``package.module:name`` names, called with ``args`` when it is a class or a function."""
    with _at(field):
        found: Callable[..., Any] = load_object(name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return found
    try:
        return found(**args)
    except TiltError:
        raise
    except Exception as error:
        raise UsageError(f"{field}: '{name}' called with {args} raised {type(error).__name__}: {error}") from error


def _check_peft(settings: dict[str, Any]) -> None:
    """Refuse settings that peft.LoraConfig does not have, and those that it is not for users to set."""
    from peft import LoraConfig

    own = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode")
    valid = [name for name in inspect.signature(LoraConfig).parameters if name not in own]
    for key in settings:
        if key not in valid:
            raise UsageError(f"peft: unknown setting '{key}' of peft.LoraConfig; {nearest(key, valid)}")
