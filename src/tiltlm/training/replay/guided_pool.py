"""The replay buffer of guided distillation, with two proposals: base and guided base.

Of n sequences, a share α came from the base a and the others from the guided base g. Together they are a sample of
m = α a + (1 − α) g, whichever drew each (Owen & Zhou 2000), and P/m stays below P/(α a) and P/((1 − α) g) at once.
Moment feedback moves g, so base and guided base read the sequences again each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tiltlm.lm import Samples
from tiltlm.rollouts.proposal import POOL
from tiltlm.training.replay.buffer import ReplayBuffer, RowTable
from tiltlm.training.rollout_batch import RolloutBatch


class GuidedPool(ReplayBuffer):
    """The last ``size`` sequences of base and guided base, with their features, in memory; drawn from by ``seed``.

    A sequence of T tokens with K features takes 13 T + 8 K bytes. ``like`` are samples of the same run, with all of its
    prompts.
    """

    def __init__(self, size: int, seed: int, like: Samples) -> None:
        self.size, self.table = size, RowTable(like)
        self.generator = torch.Generator().manual_seed(seed)
        self.samples: Samples | None = None
        self.features = torch.empty(0, 0, dtype=torch.float64)
        self.from_base = torch.empty(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.from_base)

    @property
    def base_share(self) -> float:
        """The share α of sequences that the base drew."""
        return float(self.from_base.double().mean())

    def add(self, batch: RolloutBatch) -> None:
        new = torch.full((len(batch.samples),), batch.from_base)
        samples = self.table.rows(batch.samples, batch.samples.proposal_logprob)
        if self.samples is not None:
            samples = Samples.concatenate([self.samples, samples])
            new = torch.cat([self.from_base, new])
        features = torch.cat([self.features.reshape(-1, batch.features.shape[1]), batch.features])
        kept = torch.arange(max(0, len(new) - self.size), len(new))
        self.samples = samples.select(kept.to(samples.tokens.device))
        self.features, self.from_base = features[kept], new[kept]

    def draw(self, n: int) -> RolloutBatch:
        assert self.samples is not None, "a batch is added before any is drawn"
        rows = torch.randperm(len(self), generator=self.generator)[:n]
        samples = self.samples.select(rows.to(self.samples.tokens.device)).trimmed()
        return RolloutBatch(samples, self.features[rows], POOL, base_share=self.base_share)

    def state_dict(self) -> dict[str, Any]:
        own = {"features": self.features, "from_base": self.from_base, "generator": self.generator.get_state()}
        return {**self.table.state_dict(self.samples), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.features, self.from_base = state["features"], state["from_base"]
        self.generator.set_state(state["generator"])
        self.samples = self.table.loaded(state)
