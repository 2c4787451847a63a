"""Guidance: the guide of a run, and how it leans where the policy's moments lag behind their goals."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.estimation import moment_under_policy
from tiltlm.evaluation.scores import Scores
from tiltlm.guides import ValueFunction
from tiltlm.lm import Guide, LanguageModel
from tiltlm.targets import BaseSample, Target, TiltedTarget

# Nats that a coefficient may lean: a guide too far from the target gives weights that teach nothing.
MOST_LEANING = 2.0


class Guidance:
    """The guide toward ``target``, from the samples that it was fitted on and their ``twist``.

    With ``feedback`` above 0 the moments' coefficients, in the guide alone, move at each step by feedback · (goal −
    E_π[φ]) / Var_p(φ): distillation closes the last part of a gap slowly, and a guide that leans closes it sooner. The
    target, and every distance to it, stays what it is. ``log_z`` [N] makes prompts count alike where there are several;
    they share one guide.
    """

    def __init__(
        self,
        base: LanguageModel,
        target: Target,
        base_sample: BaseSample,
        twist: ValueFunction,
        feedback: float,
        log_z: float | Tensor = 0.0,
    ) -> None:
        self.base, self.features, self.feedback = base, base_sample.features, feedback
        self.twist = twist
        self.log_weights, self.log_ratio = base_sample.log_weights(target), base_sample.log_ratio
        self.of_states = self.twist.worth(target)
        if isinstance(log_z, Tensor):
            self.log_weights = self.log_weights - log_z
            self.of_states = self.of_states - log_z.mean() if self.of_states is not None else None
        terms = target.terms if isinstance(target, TiltedTarget) else ()
        self.moments = [k for k, term in enumerate(terms) if term.kind == "moment"]
        self.goals = torch.tensor([float(terms[k].goal or 0.0) for k in self.moments], dtype=torch.float64)
        weights = self.log_weights.softmax(0)
        centred = self.features[:, self.moments].double() - self.goals
        self.variances = (weights[:, None] * centred.square()).sum(0)
        self.leaning = torch.zeros(len(self.moments), dtype=torch.float64)
        self.guide = self._leant()

    def follow(self, scores: Scores, features: Tensor) -> None:
        """Lean by what a batch with ``features`` [N, K] says of the policy before its update."""
        if not (self.feedback and self.moments):
            return
        columns = features[:, self.moments].unbind(-1)
        reached = [moment_under_policy(c, scores.policy_logprob, scores.proposal_logprob).value for c in columns]
        lacking = (self.goals - torch.tensor(reached, dtype=torch.float64)) / self.variances
        self.lean(self.leaning + self.feedback * lacking.nan_to_num(0.0))

    def lean(self, leaning: Tensor) -> None:
        """Set how far each moment's coefficient leans [K'], in nats."""
        self.leaning = leaning.clamp(-MOST_LEANING, MOST_LEANING)
        self.guide = self._leant()

    def _leant(self) -> Guide:
        of_states, values = self.of_states, self.twist.states.values
        if of_states is not None and values is not None:
            of_states = of_states + values[:, self.moments].double() @ self.leaning
        log_weights = self.log_weights + self.features[:, self.moments].double() @ self.leaning
        return self.base.placed(self.twist.guide(log_weights, self.log_ratio, of_states))
