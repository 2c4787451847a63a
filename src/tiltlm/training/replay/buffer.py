"""What replay buffers share: the interface, and samples of any batch of a run as rows of one table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.estimation import Partition, PromptPartition
from tiltlm.lm import Samples
from tiltlm.lm.samples import TENSORS
from tiltlm.training.replay.weights import PoolMetrics
from tiltlm.training.rollout_batch import RolloutBatch


class ReplayBuffer(ABC):
    """Past samples that later updates train on again, weighted as drawn from the mixture of their proposals."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of sequences."""

    @abstractmethod
    def add(self, batch: RolloutBatch) -> None:
        """Keep a batch, before anything changes the proposal that drew it; the oldest sequences make room."""

    @abstractmethod
    def draw(self, n: int) -> RolloutBatch:
        """``n`` sequences, or all of them if there are fewer, each at most once, as a sample of the mixture."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint."""

    @property
    def metrics(self) -> PoolMetrics | None:
        """The ``pool`` entry of a step's metrics; None where the buffer has no weights of its own."""
        return None

    @property
    def partition(self) -> Partition | PromptPartition | None:
        """The estimate of log Z from the buffer's samples; None where it has none."""
        return None


class RowTable:
    """Samples of any batch of a run as rows of one table: unguided, with all prompts of ``like`` in its order."""

    def __init__(self, like: Samples) -> None:
        self.like = replace(like, guide=None)
        self.places = {name: place for place, name in enumerate(like.prompts.ids)}

    def rows(self, samples: Samples, token_logprob: Tensor) -> Samples:
        """These samples, with ``token_logprob`` [N, T] as the log-probabilities of their proposal."""
        ids = samples.prompts.ids
        here = torch.tensor([self.places[ids[i]] for i in samples.prompt_index.tolist()])
        rows = replace(self.like, **{name: getattr(samples, name) for name in TENSORS})
        return replace(rows, proposal_logprob=token_logprob, prompt_index=here.to(samples.tokens.device))

    def state_dict(self, samples: Samples | None) -> dict[str, Any]:
        """The rows, for a checkpoint."""
        return {} if samples is None else {name: getattr(samples, name) for name in TENSORS}

    def loaded(self, state: Mapping[str, Any]) -> Samples | None:
        """The rows of a checkpoint; None where it has none."""
        if "tokens" not in state:
            return None
        return replace(self.like, **{name: state[name].to(self.like.tokens.device) for name in TENSORS})
