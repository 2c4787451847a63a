"""The replay buffer of every other method: sequences of all proposals, weighted as drawn from their mixture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from tiltlm.estimation import Partition, PromptPartition, partition_for
from tiltlm.lm import Samples
from tiltlm.rollouts.proposal import BASE, GUIDED, POOL, Proposal
from tiltlm.targets import Target
from tiltlm.training.replay.buffer import ReplayBuffer, RowTable
from tiltlm.training.replay.proposals import PastProposals
from tiltlm.training.replay.weights import BASE_INDEX, PoolMetrics, mixture_logprob
from tiltlm.training.rollout_batch import Assessment, RolloutBatch

# At least this share of a full buffer is the base's: it bounds every weight by P/(DEFENSIVE_SHARE · a).
DEFENSIVE_SHARE = 0.1
TABLES = ("features", "target_logscore", "logprobs", "origin", "mixture", "batches")


class MixturePool(ReplayBuffer):
    """The last ``size`` sequences of all proposals, with log P and their log-probability under each proposal.

    Fit samples come first. The oldest sequences make room for a batch, except the defensive share of the base's. A
    proposal without sequences is dropped. Each new proposal scores all kept sequences once, each kept proposal every
    new batch once. A sequence of T tokens with K features and Q proposals takes 13 T + 8 (K + Q) + 32 bytes, and each
    earlier policy its trained weights. There are at most size / (batch_size · check_steps) + 1 earlier policies, with
    the proposal rule ``on_policy`` size / batch_size + 1.
    """

    def __init__(self, size: int, seed: int, like: Samples, target: Target, past: PastProposals) -> None:
        self.size, self.table, self.target, self.past = size, RowTable(like), target, past
        self.generator = torch.Generator().manual_seed(seed)
        self.proposals = [BASE]
        # Their proposal_logprob is log a: of the proposals that drew them only whole sequences are needed.
        self.samples: Samples | None = None
        self.features = torch.empty(0, len(target.features), dtype=torch.float64)
        self.target_logscore = torch.empty(0, dtype=torch.float64)
        self.logprobs = torch.empty(0, 1, dtype=torch.float64)
        self.origin = torch.empty(0, dtype=torch.long)
        self.mixture = torch.empty(0, dtype=torch.float64)
        self.batches = 0

    def __len__(self) -> int:
        return len(self.origin)

    def add(self, batch: RolloutBatch) -> None:
        assert batch.base_logprob is not None, "the base reads a batch before the buffer takes it"
        self._make_room(len(batch.samples))
        samples = self.table.rows(batch.samples, batch.base_logprob)
        origin = self._index_of(batch.proposal)
        base = samples.sequence_logprob.cpu()
        own = batch.samples.sequence_logprob.cpu()
        columns = [
            base if k == BASE_INDEX else own if k == origin else self.past.logprob(proposal, samples)
            for k, proposal in enumerate(self.proposals)
        ]
        self.samples = samples if self.samples is None else Samples.concatenate([self.samples, samples])
        self.features = torch.cat([self.features, batch.features.double()])
        score = self.target.log_score(base, batch.features).double()
        self.target_logscore = torch.cat([self.target_logscore, score])
        self.logprobs = torch.cat([self.logprobs, torch.stack(columns, -1)])
        self.origin = torch.cat([self.origin, torch.full((len(samples),), origin)])
        self.mixture = mixture_logprob(self.logprobs, self.origin)
        self.batches += 1

    def draw(self, n: int) -> RolloutBatch:
        assert self.samples is not None, "a batch is added before any is drawn"
        rows = torch.randperm(len(self), generator=self.generator)[:n]
        samples = self.samples.select(rows.to(self.samples.tokens.device)).trimmed()
        known = Assessment(base=samples.proposal_logprob)
        return RolloutBatch(samples, self.features[rows], POOL, assessment=known, mixture=self.mixture[rows])

    @property
    def partition(self) -> Partition | PromptPartition:
        """The estimate of log Z from all kept sequences."""
        assert self.samples is not None, "a batch is added before Z is estimated"
        empty = partition_for(len(self.samples.prompts))
        return empty.updated(self.target_logscore - self.mixture, self.samples.prompt_ids)

    @property
    def metrics(self) -> PoolMetrics:
        return PoolMetrics.of(self.target_logscore - self.mixture, self.origin)

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in TABLES}
        return {
            **self.table.state_dict(self.samples),
            **own,
            "proposals": [str(proposal) for proposal in self.proposals],
            "past": self.past.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in TABLES:
            setattr(self, name, state[name])
        self.proposals = [Proposal.parse(name) for name in state["proposals"]]
        self.past.load_state_dict(state["past"])
        self.generator.set_state(state["generator"])
        self.samples = self.table.loaded(state)

    def _index_of(self, proposal: Proposal) -> int:
        """The index of a proposal; a new one scores all kept sequences."""
        if proposal.kind == "policy":
            proposal = replace(proposal, number=self.batches)
        if proposal not in self.proposals:
            if proposal != GUIDED:
                self.past.keep(proposal)
            kept = self.samples
            column = self.past.logprob(proposal, kept) if kept is not None else self.target_logscore
            self.logprobs = torch.cat([self.logprobs, column[:, None]], -1)
            self.proposals.append(proposal)
        return self.proposals.index(proposal)

    def _make_room(self, n: int) -> None:
        """Drop the oldest sequences, so that ``n`` more fit."""
        surplus = len(self) + n - self.size
        if self.samples is None or surplus <= 0:
            return
        protected = torch.zeros(len(self), dtype=torch.bool)
        base = (self.origin == BASE_INDEX).nonzero().squeeze(-1)
        protected[base[-math.ceil(DEFENSIVE_SHARE * self.size) :]] = True
        order = torch.cat([(~protected).nonzero().squeeze(-1), protected.nonzero().squeeze(-1)])
        kept = torch.ones(len(self), dtype=torch.bool).index_fill(0, order[:surplus], False)
        self.samples = self.samples.select(kept.to(self.samples.tokens.device))
        counts = torch.bincount(self.origin[kept], minlength=len(self.proposals))
        alive = [k for k in range(len(self.proposals)) if k == BASE_INDEX or counts[k] > 0]
        index = torch.zeros(len(self.proposals), dtype=torch.long)
        index[alive] = torch.arange(len(alive))
        self.features, self.target_logscore = self.features[kept], self.target_logscore[kept]
        self.logprobs, self.origin = self.logprobs[kept][:, alive], index[self.origin[kept]]
        self.proposals = [self.proposals[k] for k in alive]
        self.past.keep_only(self.proposals)
