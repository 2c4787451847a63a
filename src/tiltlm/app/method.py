"""The method of a run: objective and proposal rule from the config, and notes on them."""

from __future__ import annotations

import inspect
from typing import Any

from tiltlm.app.objects import build_object
from tiltlm.config.run import MethodConfig
from tiltlm.errors import MethodTargetError, UsageError, nearest
from tiltlm.objectives import BUILT_IN, Objective
from tiltlm.targets import Target
from tiltlm.training.method import Method
from tiltlm.training.proposal_rules import proposal_rule


def build_method(config: MethodConfig) -> Method:
    """The objective and its proposal rule. Raises UsageError for unknown names."""
    objective: Any
    if config.name in BUILT_IN:
        objective = _built_in(config.name, config.args)
    elif ":" in config.name:
        objective = build_object("method.name", config.name, config.args)
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
    """Raise MethodTargetError if the method cannot match the target, e.g. if its loss is infinite where P = 0."""
    reason = objective.needs_full_support
    filters = _features(target, "filter")
    if reason and filters:
        raise MethodTargetError(
            f"method.name: {objective.name} cannot reach a target with the filter '{filters[0]}': {reason}; or ask for "
            f"a moment below 1"
        )


def method_notes(objective: Objective, target: Target) -> list[str]:
    """Notes for the user on this method with this target."""
    if objective.keeps_guide:
        return [
            f"{objective.name}: the policy is its weights and a guide, saved beside them as guide.safetensors. tiltlm "
            f"loads both; other libraries load only the weights, which define a different distribution. guided and "
            f"gdc++ leave a plain model"
        ]
    moments = _features(target, "moment")
    if not moments or not objective.maximizes_reward:
        return []
    return [
        f"{objective.name} maximizes a reward and cannot stop at a moment: the reward is the sum of the target's tilts "
        f"λφ, and {', '.join(moments)} will end where that is largest, or where the KL penalty holds it"
    ]


def _features(target: Target, kind: str) -> list[str]:
    """The names of the features of this kind; a user's own target may not say, then none."""
    return [term.feature.name for term in getattr(target, "terms", ()) if term.kind == kind]


def _built_in(name: str, args: dict[str, Any]) -> Objective:
    valid = list(inspect.signature(BUILT_IN[name]).parameters)
    for key in args:
        if not valid:
            raise UsageError(f"method.args: {name} takes no arguments, got {args}; leave them out")
        if key not in valid:
            raise UsageError(f"method.args: {name} has no '{key}'; {nearest(str(key), valid)}")
    return BUILT_IN[name](**args)
