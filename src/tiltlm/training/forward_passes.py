"""Forward passes of base and policy over a batch, in chunks of bounded memory, counted and timed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.lm import ForwardPass, Roles, Samples
from tiltlm.training.pass_counter import PassCounter
from tiltlm.training.timer import Timer

if TYPE_CHECKING:
    from accelerate import Accelerator


class ForwardPasses:
    """Reads samples with the models of ``roles``.

    ``rows_at_once`` sets the number of sequences of a chunk; None: as many as fit a fixed memory bound.
    """

    def __init__(
        self, roles: Roles, accelerator: Accelerator, rows_at_once: int | None, counter: PassCounter, timer: Timer
    ) -> None:
        self.roles, self.accelerator, self.rows_at_once = roles, accelerator, rows_at_once
        self.counter, self.timer = counter, timer

    def chunks(self, samples: Samples, selected: Tensor) -> list[Tensor]:
        """Row indices of the rows ``selected`` [N] (boolean), similar lengths together, one tensor a chunk."""
        rows = selected.nonzero().squeeze(-1).to(samples.tokens.device)
        if not len(rows):
            return []
        return [rows[piece] for piece in self.roles.policy.chunks(samples.select(rows), self.rows_at_once)]

    def base(self, chunk: Samples) -> ForwardPass:
        """One pass of the base, without gradient."""
        self.counter.count_pass(chunk)
        with self.timer("base"), torch.no_grad(), self.roles.use("base") as model, self.accelerator.autocast():
            return model.read(chunk)

    def policy(self, chunk: Samples) -> ForwardPass:
        """One pass of the policy, with gradient if enabled."""
        self.counter.count_pass(chunk)
        with self.accelerator.autocast():
            return self.roles.policy.read(chunk)
