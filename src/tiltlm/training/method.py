"""A method: an objective with the rule that chooses its proposal."""

from __future__ import annotations

from dataclasses import dataclass

from tiltlm.objectives import Objective
from tiltlm.training.proposal_rules import ProposalRule


@dataclass(frozen=True)
class Method:
    """An objective, and the rule that decides when the policy becomes the proposal."""

    objective: Objective
    rule: ProposalRule
