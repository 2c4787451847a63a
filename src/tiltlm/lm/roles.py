"""Base, policy and proposal of a run: LoRA adapters on one set of weights, or frozen copies."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from tiltlm.lm.model import LanguageModel

Role = Literal["base", "policy", "proposal"]
POLICY_ADAPTER, PROPOSAL_ADAPTER = "default", "proposal"


class Roles:
    """The base, the policy that is tuned from it, and the proposal that samples are drawn from.

    With LoRA the weights are in memory once: the base has no adapter, policy and proposal have one each. Without LoRA
    base and proposal are frozen copies. The first ``keep_proposal`` creates the proposal. Pass ``base`` to reuse a
    loaded model instead of a copy; it takes least memory after ``LanguageModel.freeze``.
    """

    def __init__(self, policy: LanguageModel, base: LanguageModel | None = None) -> None:
        self.policy = policy
        self.shared = policy.has_adapter and base is None
        if base is None and not self.shared:
            base = policy.copy()
            base.guide = None  # the guide belongs to the policy only
            base.freeze()
        self._base = base or policy
        self._proposal: LanguageModel | None = None

    @property
    def has_proposal(self) -> bool:
        """Whether an earlier policy is kept as the proposal."""
        return self._proposal is not None

    @contextlib.contextmanager
    def use(self, role: Role) -> Iterator[LanguageModel]:
        """The language model in this role, within the block."""
        if role == "policy" or not self.shared:
            chosen = {"base": self._base, "policy": self.policy, "proposal": self._proposal}[role]
            assert chosen is not None, "keep_proposal() comes before the proposal is used"
            yield chosen
        elif role == "base":
            with self.policy.model.disable_adapter(), self.policy.unguided():
                yield self.policy
        else:
            assert self._proposal is not None, "keep_proposal() comes before the proposal is used"
            self.policy.model.set_adapter(PROPOSAL_ADAPTER)
            try:
                yield self.policy
            finally:
                self.policy.model.set_adapter(POLICY_ADAPTER)

    @contextlib.contextmanager
    def cast_once(self) -> Iterator[None]:
        """``LanguageModel.cast_once`` of policy and base, within the block."""
        with self.policy.cast_once(), contextlib.nullcontext() if self.shared else self._base.cast_once():
            yield

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The policy's parameters that training changes, by name."""
        return {name: p for name, p in self.policy.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def keep_proposal(self) -> None:
        """Copy the current policy to the proposal."""
        if self._proposal is None:
            self._add_proposal()
        if not self.shared:
            assert self._proposal is not None
            self._proposal.model.load_state_dict(self.policy.model.state_dict())
            return
        weights = dict(self.policy.model.named_parameters())
        for name, parameter in self._proposal_parameters().items():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def weights(self, role: Literal["policy", "proposal"]) -> dict[str, Tensor]:
        """A copy of the trained parameters of policy or proposal, by the policy's names; ``earlier`` takes it."""
        named = self.trainable()
        if role == "proposal":
            own = self._proposal_parameters()
            named = {name: own[name] for name in named}
        return {name: p.detach().clone() for name, p in named.items()}

    @contextlib.contextmanager
    def earlier(self, weights: dict[str, Tensor]) -> Iterator[LanguageModel]:
        """The policy with earlier ``weights``, within the block; do not train it there."""
        parameters = self.trainable()
        now = {name: p.data for name, p in parameters.items()}
        try:
            for name, tensor in weights.items():
                parameters[name].data = tensor
            yield self.policy
        finally:
            for name, tensor in now.items():
                parameters[name].data = tensor

    def proposal_state(self) -> dict[str, Tensor] | None:
        """The proposal's own tensors by name, for a checkpoint; None without a proposal."""
        if self._proposal is None:
            return None
        named = self._proposal.model.named_parameters()
        return {name: p.detach() for name, p in named if not self.shared or PROPOSAL_ADAPTER in name.split(".")}

    @torch.no_grad()
    def load_proposal_state(self, state: dict[str, Tensor]) -> None:
        """Restore the tensors that ``proposal_state`` returned."""
        if self._proposal is None:
            self._add_proposal()
        assert self._proposal is not None
        parameters = dict(self._proposal.model.named_parameters())
        for name, tensor in state.items():
            parameters[name].copy_(tensor)

    def _proposal_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The proposal's own parameters, by the policy's names."""
        assert self._proposal is not None, "keep_proposal() comes before the proposal is used"
        named = dict(self._proposal.model.named_parameters())
        if not self.shared:
            return named
        own = {name: p for name, p in named.items() if PROPOSAL_ADAPTER in name.split(".")}
        policy = {PROPOSAL_ADAPTER: POLICY_ADAPTER}
        return {".".join(policy.get(part, part) for part in name.split(".")): p for name, p in own.items()}

    def _add_proposal(self) -> None:
        if self.shared:
            model = self.policy.model
            model.add_adapter(PROPOSAL_ADAPTER, copy.deepcopy(model.peft_config[POLICY_ADAPTER]))
            model.set_adapter(POLICY_ADAPTER)
            self._proposal = self.policy
        else:
            self._proposal = self.policy.copy()
            self._proposal.model.requires_grad_(False)
