"""The pool of every distribution matching: sequences of all proposals so far, weighed as drawn from their mixture."""

from __future__ import annotations

import math
from typing import Any

import torch

from tiltlm.estimation import Partition, PromptPartition, partition_for
from tiltlm.lm import Samples
from tiltlm.lm.samples import TENSORS
from tiltlm.targets import Target
from tiltlm.training.replay.guided_pool import POOLED, Rows
from tiltlm.training.replay.proposals import Laws
from tiltlm.training.replay.weights import BASE, PoolMetrics, mixture_logprob
from tiltlm.training.rollout_batch import Assessment, Batch

# At least so many of a full pool are the base's: that bounds every weight by P/(DEFENSIVE_SHARE · a).
DEFENSIVE_SHARE = 0.1
OWN = ("names", "features", "score", "under", "origin", "mixture", "batches")


class MixedPool:
    """The last ``size`` sequences, whatever laws drew them, with log P and their log-probability under each law.

    The fit samples come first. The oldest sequences make room for a batch, but those of the base that the defensive
    share asks for stay; a law without sequences is forgotten. Each new law reads all that are kept, and each kept law
    every new batch, once. A sequence of T tokens with K features and Q laws takes 13 T + 8 (K + Q) + 32 bytes, and each
    earlier policy what ``Laws`` holds of it; of these there are at most size / (batch_size · check_steps) + 1, and with
    a proposal that is always the policy size / batch_size + 1.
    """

    def __init__(self, size: int, seed: int, like: Samples, target: Target, laws: Laws) -> None:
        self.size, self.rows, self.target, self.laws = size, Rows(like), target, laws
        self.generator = torch.Generator().manual_seed(seed)
        self.names = ["base"]
        # Token by token log a takes the place of the law that drew them: whole sequences are all that is asked of that.
        self.samples: Samples | None = None
        self.features = torch.empty(0, len(target.features), dtype=torch.float64)
        self.score = torch.empty(0, dtype=torch.float64)
        self.under = torch.empty(0, 1, dtype=torch.float64)
        self.origin = torch.empty(0, dtype=torch.long)
        self.mixture = torch.empty(0, dtype=torch.float64)
        self.batches = 0

    def __len__(self) -> int:
        return len(self.origin)

    def add(self, batch: Batch) -> None:
        """Keep a batch, whose log a is known, before anything changes the law that drew it."""
        assert batch.base_logprob is not None, "the base reads a batch before the pool takes it"
        self._make_room(len(batch.samples))
        samples = self.rows.of(batch.samples, batch.base_logprob)
        origin = self._law_of(batch)
        base = samples.sequence_logprob.cpu()
        own = batch.samples.sequence_logprob.cpu()
        columns = [
            base if k == BASE else own if k == origin else self.laws.logprob(name, samples)
            for k, name in enumerate(self.names)
        ]
        self.samples = samples if self.samples is None else Samples.concatenate([self.samples, samples])
        self.features = torch.cat([self.features, batch.features.double()])
        self.score = torch.cat([self.score, self.target.log_score(base, batch.features).double()])
        self.under = torch.cat([self.under, torch.stack(columns, -1)])
        self.origin = torch.cat([self.origin, torch.full((len(samples),), origin)])
        self.mixture = mixture_logprob(self.under, self.origin)
        self.batches += 1

    def draw(self, n: int) -> Batch:
        """As many sequences, or all of them if there are fewer, each at most once, as a sample of the mixture."""
        assert self.samples is not None, "a batch is added before any is drawn"
        rows = torch.randperm(len(self), generator=self.generator)[:n]
        samples = self.samples.select(rows.to(self.samples.tokens.device)).trimmed()
        known = Assessment(base=samples.proposal_logprob)
        return Batch(samples, self.features[rows], POOLED, assessment=known, mixture=self.mixture[rows])

    @property
    def partition(self) -> Partition | PromptPartition:
        """What its sequences say of log Z."""
        assert self.samples is not None, "a batch is added before Z is asked for"
        empty = partition_for(len(self.samples.prompts))
        return empty.updated(self.score - self.mixture, self.samples.prompt_ids)

    @property
    def metrics(self) -> PoolMetrics:
        """What a step reports of the pool."""
        return PoolMetrics.of(self.score - self.mixture, self.origin)

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        kept = {} if self.samples is None else {name: getattr(self.samples, name) for name in TENSORS}
        own = {name: getattr(self, name) for name in OWN}
        return {**kept, **own, "earlier": self.laws.earlier, "generator": self.generator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        for name in OWN:
            setattr(self, name, state[name])
        self.laws.restore(state["earlier"])
        self.generator.set_state(state["generator"])
        self.samples = self.rows.restored(state)

    def _law_of(self, batch: Batch) -> int:
        """The place of the law that drew a batch; a new one reads all sequences."""
        name = f"policy {self.batches}" if batch.source == "policy" else batch.source
        if name not in self.names:
            if name != "guided":
                self.laws.keep(name, "policy" if batch.source == "policy" else "proposal")
            column = self.laws.logprob(name, self.samples) if self.samples is not None else self.score
            self.under = torch.cat([self.under, column[:, None]], -1)
            self.names.append(name)
        return self.names.index(name)

    def _make_room(self, n: int) -> None:
        """Let the oldest sequences leave, so that ``n`` more fit."""
        surplus = len(self) + n - self.size
        if self.samples is None or surplus <= 0:
            return
        stays = torch.zeros(len(self), dtype=torch.bool)
        base = (self.origin == BASE).nonzero().squeeze(-1)
        stays[base[-math.ceil(DEFENSIVE_SHARE * self.size) :]] = True
        leaving = torch.cat([(~stays).nonzero().squeeze(-1), stays.nonzero().squeeze(-1)])[:surplus]
        kept = torch.ones(len(self), dtype=torch.bool).index_fill(0, leaving, False)
        self.samples = self.samples.select(kept.to(self.samples.tokens.device))
        alive = [k for k in range(len(self.names)) if k == BASE or bool((self.origin[kept] == k).any())]
        places = torch.zeros(len(self.names), dtype=torch.long)
        places[alive] = torch.arange(len(alive))
        self.features, self.score = self.features[kept], self.score[kept]
        self.under, self.origin = self.under[kept][:, alive], places[self.origin[kept]]
        self.names = [self.names[k] for k in alive]
        self.laws.keep_only(self.names)
