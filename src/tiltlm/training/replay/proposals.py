"""The proposals of a replay buffer: base, guided base and earlier policies, each able to score other sequences."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.lm import LanguageModel, Samples
from tiltlm.rollouts.proposal import GUIDED, Proposal
from tiltlm.training.forward_passes import ForwardPasses
from tiltlm.training.guidance import Guidance


class PastProposals:
    """Log-probabilities under the base, the guided base and policies of the past.

    Of a past policy a copy of its trained weights is kept: its adapter, or all weights under full tuning. The buffer
    drops it with the last of its sequences.
    """

    def __init__(self, passes: ForwardPasses, guidance: Guidance | None) -> None:
        self.passes, self.roles, self.guidance = passes, passes.roles, guidance
        self.earlier: dict[Proposal, dict[str, Tensor]] = {}

    def keep(self, proposal: Proposal) -> None:
        """Copy the present weights of the policy, or of the proposal that the roles keep."""
        self.earlier[proposal] = self.roles.weights("policy" if proposal.kind == "policy" else "proposal")

    def keep_only(self, proposals: Collection[Proposal]) -> None:
        """Drop the weights of all others."""
        self.earlier = {name: weights for name, weights in self.earlier.items() if name in proposals}

    @torch.no_grad()
    def logprob(self, proposal: Proposal, samples: Samples) -> Tensor:
        """log q(x) [N] of whole sequences under this proposal, in nats, float64 on the CPU; one forward pass."""
        self.passes.counter.count_pass(samples)
        guide = self.guidance.guide if proposal == GUIDED and self.guidance is not None else None
        samples = replace(samples, guide=guide)
        with self._model(proposal) as model, self.passes.accelerator.autocast():
            return model.logprob(samples, batch_size=self.passes.rows_at_once).double().sum(-1).cpu()

    def state_dict(self) -> dict[str, Any]:
        """The weights of past policies by name, for a checkpoint."""
        return {str(proposal): weights for proposal, weights in self.earlier.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the past policies of a checkpoint."""
        device = self.roles.policy.device
        self.earlier = {
            Proposal.parse(name): {key: tensor.to(device) for key, tensor in weights.items()}
            for name, weights in state.items()
        }

    def _model(self, proposal: Proposal) -> AbstractContextManager[LanguageModel]:
        known = proposal in self.earlier
        return self.roles.earlier(self.earlier[proposal]) if known else self.roles.use("base")
