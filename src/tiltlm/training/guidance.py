"""Guidance: the guide in force in a run, and the moment feedback that moves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tiltlm.guides import ValueFunction
from tiltlm.lm import Guide, LanguageModel
from tiltlm.targets import BaseSample, Target, TiltedTarget
from tiltlm.training.whole_batch import WholeBatch

# The largest change of a coefficient by feedback, in nats: a guide too far from the target has useless weights.
MOST_OFFSET = 2.0


class Guidance:
    """The guide toward ``target``, from the samples that the target was fitted on and their value function.

    With ``feedback`` above 0 the moments' coefficients, in the guide alone, move at each step by feedback · (goal −
    E_π[φ]) / Var_p(φ). Distillation closes the last part of a gap slowly; feedback closes it sooner. The target, and
    every distance to it, stays as it is. ``log_z`` [N] gives prompts equal weight where there are several; they share
    one guide.
    """

    def __init__(
        self,
        base: LanguageModel,
        target: Target,
        base_sample: BaseSample,
        values: ValueFunction,
        feedback: float,
        log_z: float | Tensor = 0.0,
    ) -> None:
        self.base, self.features, self.feedback = base, base_sample.features, feedback
        self.values = values
        self.log_weights, self.log_ratio = base_sample.log_weights(target), base_sample.log_ratio
        self.of_states = self.values.final_log_tilt(target)
        if isinstance(log_z, Tensor):
            self.log_weights = self.log_weights - log_z
            self.of_states = self.of_states - log_z.mean() if self.of_states is not None else None
        terms = target.terms if isinstance(target, TiltedTarget) else ()
        self.moments = [k for k, term in enumerate(terms) if term.kind == "moment"]
        self.goals = torch.tensor([float(terms[k].goal or 0.0) for k in self.moments], dtype=torch.float64)
        weights = self.log_weights.softmax(0)
        centred = self.features[:, self.moments].double() - self.goals
        self.variances = (weights[:, None] * centred.square()).sum(0)
        self.offsets = torch.zeros(len(self.moments), dtype=torch.float64)
        self.guide = self._build()

    def follow(self, batch: WholeBatch) -> None:
        """Move the guide by the gap between the policy's moments and their goals, before the update on the batch."""
        if not (self.feedback and self.moments):
            return
        reached = torch.tensor(batch.policy_moments(self.moments), dtype=torch.float64)
        gap = (self.goals - reached) / self.variances
        self.set_offsets(self.offsets + self.feedback * gap.nan_to_num(0.0))

    def set_offsets(self, offsets: Tensor) -> None:
        """Set how far each moment's coefficient in the guide is from that of the target [K'], in nats."""
        self.offsets = offsets.clamp(-MOST_OFFSET, MOST_OFFSET)
        self.guide = self._build()

    def state_dict(self) -> dict[str, Any]:
        """The offsets, for a checkpoint; the guide follows from them."""
        return {"offsets": self.offsets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the offsets of a checkpoint."""
        self.set_offsets(state["offsets"])

    def _build(self) -> Guide:
        of_states, values = self.of_states, self.values.states.values
        if of_states is not None and values is not None:
            of_states = of_states + values[:, self.moments].double() @ self.offsets
        log_weights = self.log_weights + self.features[:, self.moments].double() @ self.offsets
        return self.base.placed(self.values.guide(log_weights, self.log_ratio, of_states))
