"""The laws of pooled sequences: base, guided base and earlier policies, each asked of other sequences by one pass."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm.lm import Guide, LanguageModel, Roles, Samples
from tiltlm.training.pass_counter import Passes


class Laws:
    """Log-probabilities under the base, under the base as ``guide`` leads it, and under policies of the past.

    Of each of these a copy is held of what it does not share with the base: its adapter, or all weights where these
    are tuned. None is held longer than sequences of it are pooled.
    """

    def __init__(
        self,
        roles: Roles,
        guide: Guide | None,
        rows_at_once: int | None,
        autocast: Callable[[], AbstractContextManager[Any]],
        passes: Passes,
    ) -> None:
        self.roles, self.guide, self.rows_at_once = roles, guide, rows_at_once
        self.autocast, self.passes = autocast, passes
        self.earlier: dict[str, dict[str, Tensor]] = {}

    def keep(self, name: str, role: Literal["policy", "proposal"]) -> None:
        """Hold the policy, or the proposal, as it is at this moment."""
        self.earlier[name] = self.roles.weights(role)

    def keep_only(self, names: Collection[str]) -> None:
        """Forget all others."""
        self.earlier = {name: weights for name, weights in self.earlier.items() if name in names}

    @torch.no_grad()
    def logprob(self, name: str, samples: Samples) -> Tensor:
        """log q(x) [N] of whole sequences under the law of this name, in nats, float64 on the CPU."""
        self.passes.read(samples)
        samples = replace(samples, guide=self.guide if name == "guided" else None)
        with self._model(name) as model, self.autocast():
            return model.logprob(samples, batch_size=self.rows_at_once).double().sum(-1).cpu()

    def restore(self, earlier: dict[str, dict[str, Tensor]]) -> None:
        """Put back the policies of a checkpoint."""
        device = self.roles.policy.device
        self.earlier = {
            law: {name: tensor.to(device) for name, tensor in weights.items()} for law, weights in earlier.items()
        }

    def _model(self, name: str) -> AbstractContextManager[LanguageModel]:
        return self.roles.earlier(self.earlier[name]) if name in self.earlier else self.roles.use("base")
